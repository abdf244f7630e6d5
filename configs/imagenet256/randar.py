"""RandAR (arXiv:2412.01827): next-token prediction in random orders by instructions, ImageNet, 256.

    python experiments/train.py --config=configs/imagenet256/randar.py:L \
        --workdir=runs/randar_L --config.tokenizer_checkpoint=runs/imagenet_vq \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
VQ-16 of tokenizer_vq.py, for L_maskgit that of tokenizer_maskgit.py. Arguments
(``--config=...py:ARG``), L if none:

    argument     parameters  published FID  guidance
    L           342,912,000           2.65       3.4
    L_maskgit   311,454,720           2.47       4.0
    XL          774,700,800           2.27       4.0

Recipe of github.com/ziqipang/RandAR: 360,000 steps of 1024 images (300 epochs), every sample in a
random order, no averaging of the weights; after the first 100 a step is skipped where the norms of
all parameters' clipped gradients sum up to 10 or more. Samples are drawn in random orders too, 256
codes in 88 steps (``--config.schedule.steps``). What differs here:

    - The official run reads codes made beforehand of centre crops, plain and mirrored. Here each
      visit mirrors the centre crop half of the time and tokenises it. For cached codes
      (experiments/cache_codes.py --copies=2) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``.
"""

import ml_collections

SIZES = ("L", "L_maskgit", "XL")

WIDTH = {"L": 1024, "L_maskgit": 1024, "XL": 1280}
DEPTH = {"L": 24, "L_maskgit": 24, "XL": 36}
HEADS = {"L": 16, "L_maskgit": 16, "XL": 20}
MLP_HIDDEN = {"L": 2816, "L_maskgit": 2816, "XL": 3584}
GUIDANCE = {"L": 3.4, "L_maskgit": 4.0, "XL": 4.0}


def get_config(arg: str = "L") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of randar.py is none of {SIZES}")
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
    codes = 1024 if arg == "L_maskgit" else 16_384
    config.tokenizer = dict(name="vq", codebook_size=codes)
    if arg == "L_maskgit":
        config.tokenizer.update(
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
    else:
        config.tokenizer.update(
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
    config.schedule = dict(name="random_groups", grid=16, steps=88, curve="cosine_ahead")
    config.backbone = dict(
        name="instructed_decoder",
        width=WIDTH[arg],
        depth=DEPTH[arg],
        heads=HEADS[arg],
        num_classes=1000,
        vocab_size=codes,
        mlp_hidden=MLP_HIDDEN[arg],
        rope_base=10_000.0,
        norm_epsilon=1e-5,
        token_dropout=0.1,
        residual_dropout=0.1,
        mlp_dropout=0.1,
        init_std=0.02,
        remat="block",
    )
    config.head = dict(name="categorical", vocab_size=codes, bias=False, init_std=0.0)
    config.objective = dict(name="likelihood", label_dropout=0.1)
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        guidance=dict(scale=GUIDANCE[arg], kind="linear_before"),
    )
    config.train = dict(
        steps=360_000,
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
        warmup_steps=50_000,
        end_ratio=0.05,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
        skip_norm=10.0,
        skip_from=100,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
