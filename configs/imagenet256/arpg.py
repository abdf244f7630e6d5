"""ARPG (arXiv:2503.10568): random orders by content and queries of positions, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/arpg.py:L \
        --workdir=runs/arpg_L --config.tokenizer_checkpoint=runs/imagenet_vq \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
VQ-16 of tokenizer_vq.py. Arguments (``--config=...py:ARG``), L if none:

    argument     parameters  published FID  guidance
    L           319,845,376           2.38       5.0
    XL          718,997,760           2.02       6.0
    XXL       1,302,449,664           1.91       7.5

Recipe of github.com/hp-l33/ARPG: 400 epochs of 1251 steps at 1024 images, every sample in a random
order, no averaging of the weights. The counts hold a row of the table that nothing reads, as the
released files do. Samples are drawn in 64 steps (``--config.schedule.steps``), in groups by the
arccos curve. Within a group the cached codes see each other, as in the official sampler and unlike
in training; ``--config.backbone.group_attention=causal`` keeps to training. What differs here:

    - Officially one random order is drawn for a batch of samples, here one for each.
    - The official run reads codes made beforehand of centre crops, plain and mirrored. Here each
      visit mirrors the centre crop half of the time and tokenises it. For cached codes
      (experiments/cache_codes.py --copies=2) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``.
    - XXL splits its parameters over all devices.
"""

import ml_collections

SIZES = ("L", "XL", "XXL")

WIDTH = {"L": 1024, "XL": 1280, "XXL": 1536}
DEPTH = {"L": 24, "XL": 36, "XXL": 48}
HEADS = {"L": 16, "XL": 20, "XXL": 24}
MLP_HIDDEN = {"L": 2816, "XL": 3584, "XXL": 4096}
GUIDANCE = {"L": 5.0, "XL": 6.0, "XXL": 7.5}


def get_config(arg: str = "L") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of arpg.py is none of {SIZES}")
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
        crop="center",
        flip=True,
        num_workers=8,
    )
    config.tokenizer_checkpoint = ""
    config.tokenizer = dict(
        name="vq",
        codebook_size=16_384,
        l2_norm=True,
        autoencoder=dict(
            image_size=256,
            image_channels=3,
            latent=256,
            code_width=8,
            channels=128,
            multipliers=(1, 1, 2, 2, 4),
            encoder_blocks=2,
            decoder_blocks=3,
            attention=True,
            middle=True,
            groups=32,
            projection=1,
        ),
    )
    config.schedule = dict(name="random_groups", grid=16, steps=64, curve="arccos")
    config.backbone = dict(
        name="two_pass_decoder",
        width=WIDTH[arg],
        depth=DEPTH[arg],
        heads=HEADS[arg],
        num_classes=1000,
        vocab_size=16_384,
        mlp_hidden=MLP_HIDDEN[arg],
        group_attention="bidirectional",
        rope_base=10_000.0,
        norm_epsilon=1e-5,
        token_dropout=0.1,
        residual_dropout=0.1,
        mlp_dropout=0.1,
        init_std=0.02,
        remat="block",
    )
    config.head = dict(name="categorical", vocab_size=16_384, bias=False, init_std=0.0)
    config.objective = dict(name="likelihood", label_dropout=0.1)
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        guidance=dict(scale=GUIDANCE[arg], kind="linear_after"),
    )
    iterations = 1251  # of an epoch: 1,281,167 images, batches of 1024, the last one left out
    config.train = dict(
        steps=400 * iterations,
        batch_size=1024,
        log_every=100,
        eval_every=5_000,
        preview_every=5_000,
        checkpoint_every=5_000,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=4e-4,
        schedule="cosine",
        warmup_steps=100 * iterations,
        end_ratio=1e-5 / 4e-4,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg == "XXL":
        config.mesh.update(data=1, fsdp=-1)
    return config
