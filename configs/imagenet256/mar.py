"""MAR (arXiv:2406.11838): continuous codes, masked and denoised by a small head, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/mar.py:base \
        --workdir=runs/mar_base --config.tokenizer_checkpoint=runs/imagenet_kl \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
KL-16 of tokenizer_kl.py. Arguments (``--config=...py:ARG``), base if none:

    argument  parameters   of which head  published FID  guidance
    base     207,924,768      35,749,920           2.31       2.9
    large    478,326,304      72,230,432           1.78       3.0
    huge     942,403,104     151,206,944           1.55       3.2

The published samples take 256 iterations of 100 diffusion steps; a quarter of the iterations,
``--config.schedule.iterations=64``, is the official script's default.

Recipe: main_mar.py of github.com/LTH14/mar as its README runs it, the 800 epochs of the released
models: batches of 2048, rate 8e-4 after 100 epochs of linear warm-up, weight decay 0.02 on all
matrices but the head's, gradients clipped at 3, each code denoised four times a step. What differs
here:

    - bfloat16 in place of float16 with loss scaling.
    - Linear layers of the blocks start from a normal of deviation 0.02 instead of Xavier's uniform.
    - For moments that are cached (experiments/cache_codes.py --copies=2: plain and mirrored) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``.
    - Blocks of large and huge are rematerialised (``--config.backbone.remat=none`` where memory
      allows).
"""

import ml_collections

SIZES = ("base", "large", "huge")

WIDTH = {"base": 768, "large": 1024, "huge": 1280}
DEPTH = {"base": 12, "large": 16, "huge": 20}  # of the encoder, and of the decoder
HEADS = {"base": 12, "large": 16, "huge": 16}
HEAD = {"base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}  # blocks and width
GUIDANCE = {"base": 2.9, "large": 3.0, "huge": 3.2}


def get_config(arg: str = "base") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of mar.py is none of {SIZES}")
    config = ml_collections.ConfigDict()
    config.seed = 1
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
    config.schedule = dict(name="masked", grid=16, iterations=256)
    config.backbone = dict(
        name="encoder_decoder",
        code_width=16,
        num_classes=1000,
        width=WIDTH[arg],
        depth=DEPTH[arg],
        heads=HEADS[arg],
        decoder_width=WIDTH[arg],
        decoder_depth=DEPTH[arg],
        decoder_heads=HEADS[arg],
        buffer=64,
        mlp_ratio=4.0,
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=0.1,
        dropout=0.1,
        init_std=0.02,
        remat="none" if arg == "base" else "block",
    )
    depth, width = HEAD[arg]
    config.head = dict(
        name="diffusion", code_width=16, width=width, depth=depth, steps=1000, sampling_steps="100"
    )
    config.objective = dict(
        name="masked", label_dropout=0.1, rate_mean=1.0, rate_std=0.25, rate_min=0.7, repeats=4
    )
    config.sampling = dict(temperature=1.0, guidance=dict(scale=GUIDANCE[arg], kind="linear_known"))
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
        learning_rate=8e-4,
        schedule="constant",
        warmup_steps=100 * iterations,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.02,
        no_decay=(r"^head/",),
        clip_norm=3.0,
    )
    config.ema = dict(decay=0.9999, warmup=False)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
