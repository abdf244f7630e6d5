"""xAR (arXiv:2502.20388): noisy cells of continuous codes, one after the other, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/xar.py:base \
        --workdir=runs/xar_base --config.tokenizer_checkpoint=runs/imagenet_kl \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
KL-16 of tokenizer_kl.py. Arguments (``--config=...py:ARG``), base if none:

    argument  parameters     evaluations a cell  guidance
    base        172,638,224                  40       2.7
    large       608,397,968                  50       2.3
    huge      1,186,024,096                  50       2.2

The README of github.com/OliverRensu/xAR names these settings, and an FID of 1.24 for huge. A cell
is 8 x 8 of the 16 x 16 codes. Guidance grows from none in the first cell to that of the table in
the last.

Recipe: the official trainer's, the 800 epochs of the released models: batches of 2048, rate 4e-4
after 100 epochs of linear warm-up, from epoch 600 on half a cosine down to 1e-5, weight decay 0.02
on all matrices and tables, gradients clipped at 1. What differs here:

    - bfloat16 in place of float16 with loss scaling (the official advice for NaN is TF32).
    - Initial values are ours: normals of deviation 0.02, gates and velocities zero.
    - For moments that are cached (experiments/cache_codes.py --copies=2: plain and mirrored) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``.
    - Blocks of large and huge are rematerialised (``--config.backbone.remat=none`` where memory
      allows).
"""

import ml_collections

SIZES = ("base", "large", "huge")

WIDTH = {"base": 768, "large": 1024, "huge": 1280}
DEPTH = {"base": 8, "large": 16, "huge": 20}  # of each half
HEADS = {"base": 12, "large": 16, "huge": 16}
SAMPLING_STEPS = {"base": 40, "large": 50, "huge": 50}
GUIDANCE = {"base": 2.7, "large": 2.3, "huge": 2.2}


def get_config(arg: str = "base") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of xar.py is none of {SIZES}")
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
        name="kl",
        scale=0.2325,
        patch=1,
        autoencoder=dict(
            image_size=256,
            image_channels=3,
            latent=16,
            code_width=16,
            channels=128,
            multipliers=(1, 1, 2, 2, 4),
            encoder_blocks=2,
            decoder_blocks=3,
            attention=True,
            decoder_attention=(),
            middle=True,
            groups=32,
            projection=1,
        ),
    )
    config.schedule = dict(name="next_entity", grid=16, entity="cell", parts=2)
    config.backbone = dict(
        name="noisy_decoder",
        code_width=16,
        num_classes=1000,
        width=WIDTH[arg],
        depth=DEPTH[arg],
        heads=HEADS[arg],
        decoder_depth=DEPTH[arg],
        decoder_heads=HEADS[arg],
        mlp_hidden=int(WIDTH[arg] * 4 * 2 / 3),
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=0.1,
        dropout=0.1,
        init_std=0.02,
        remat="none" if arg == "base" else "block",
    )
    config.head = dict(
        name="velocity",
        code_width=16,
        sampler="euler_maruyama",
        sampling_steps=SAMPLING_STEPS[arg],
        last=0.04,
    )
    config.objective = dict(
        name="flow_matching", label_dropout=0.1, by_step=False, time_mean=0.0, time_std=1.0
    )
    config.sampling = dict(temperature=1.0, guidance=dict(scale=GUIDANCE[arg], kind="linear"))
    iterations = 625  # of an epoch: 1,281,167 images, batches of 2048, the last one left out
    config.train = dict(
        steps=800 * iterations,
        batch_size=2048,
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
        learning_rate=4e-4,
        schedule="cosine",
        warmup_steps=100 * iterations,
        hold=5 / 7,
        end_ratio=1e-5 / 4e-4,
        b1=0.9,
        b2=0.96,
        eps=1e-8,
        weight_decay=0.02,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.9999, warmup=False)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
