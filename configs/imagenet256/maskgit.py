"""MaskGIT (arXiv:2202.04200): masked codes, decoded by confidence, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/maskgit.py \
        --workdir=runs/maskgit --config.tokenizer_checkpoint=runs/imagenet_maskgit \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
that of tokenizer_maskgit.py. 173,243,392 parameters: 24 blocks of width 768 with norms after the
sums, one norm of the embeddings and one output layer, as BERT and the official JAX code have them.
The published FID is 6.18, without guidance.

Recipe: the paper's, 300 epochs in batches of 256, Adam of 0.9 and 0.96, label smoothing and dropout
of 0.1; shares of hidden codes by the cosine and not below a half, 16 iterations of choice
temperature 4.5, as in the official configuration (github.com/google-research/maskgit, which has no
training code). What differs here:

    - The head has a matrix of its own, where the official logits are products with the table of
      codes; classes have a table of their own with a null class, where theirs are further codes.
      No label is dropped: ``--config.objective.label_dropout=0.1`` makes guidance possible.
    - Weights start from a normal of deviation 0.02, where theirs is truncated.
    - Rate, warm-up, weight decay and clipping are this project's choice.
    - For cached codes (experiments/cache_codes.py --copies=4) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``.
"""

import ml_collections

MODES = ("",)


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of maskgit.py is none of {MODES}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.precision = "default"
    config.attention = "auto"
    config.data = dict(
        source="folder:data/imagenet",
        image_size=256,
        channels=3,
        num_classes=1000,
        crop="random",
        min_crop=0.8,
        max_crop=1.0,
        flip=True,
        num_workers=8,
    )
    config.tokenizer_checkpoint = ""
    config.tokenizer = dict(
        name="vq",
        codebook_size=1024,
        l2_norm=False,
        autoencoder=dict(
            name="pooled",
            image_size=256,
            image_channels=3,
            code_width=256,
            channels=128,
            multipliers=(1, 1, 2, 2, 4),
            blocks=2,
            groups=32,
        ),
    )
    config.schedule = dict(name="masked", grid=16, iterations=16, method="cosine", slack=1e-9)
    config.backbone = dict(
        name="bidirectional",
        width=768,
        depth=24,
        heads=8,
        num_classes=1000,
        vocab_size=1024,
        mlp_hidden=3072,
        post_norm=True,
        output_layer=True,
        norm_epsilon=1e-12,
        activation="gelu_tanh",
        attention_dropout=0.1,
        dropout=0.1,
        init_std=0.02,
    )
    config.head = dict(name="categorical", vocab_size=1024, bias=True, init_std=0.02)
    config.objective = dict(
        name="masked_codes",
        label_dropout=0.0,
        label_smoothing=0.1,
        method="cosine",
        rate_min=0.5,
        seen_weight=0.0,
        per_image=True,
    )
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=0.0,
        min_p=0.0,
        choice_temperature=4.5,
        confidence="probability",
        guidance=dict(scale=1.0, kind="constant"),
    )
    iterations = 5_004  # of an epoch: 1,281,167 images, batches of 256, the last one left out
    config.train = dict(
        steps=300 * iterations,
        batch_size=256,
        log_every=100,
        eval_every=10 * iterations,
        preview_every=10 * iterations,
        checkpoint_every=5_000,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=1e-4,
        schedule="constant",
        warmup_steps=iterations,
        b1=0.9,
        b2=0.96,
        eps=1e-8,
        weight_decay=0.045,
        no_decay=("_embed/embedding", "position"),
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
