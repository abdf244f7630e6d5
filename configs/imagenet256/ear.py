"""EAR (arXiv:2505.07812): continuous codes, masked and drawn by an energy score, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/ear.py:base \
        --workdir=runs/ear_base --config.tokenizer_checkpoint=runs/imagenet_kl \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
KL-16 of tokenizer_kl.py. Arguments (``--config=...py:ARG``), base if none:

    argument  parameters   of which head
    base     205,608,720      34,469,904
    large    474,755,088      70,302,736
    huge     937,314,576     148,500,496

Recipe: main_ear.py of github.com/shaochenze/EAR as its README runs it: batches of 2048, rate 8e-4
after 100 epochs of linear warm-up, a quarter of it for the head's matrices, weight decay 0.02 on
all other ones, gradients clipped at 3, each code drawn for twice a step. After these 750 epochs
come 50 at 5.6e-4 with samples that keep closer together:

    ``--config.init_from.workdir=runs/ear_base --config.head.train_temperature=0.99
    --config.optimizer.learning_rate=5.6e-4 --config.optimizer.warmup_steps=0
    --config.train.steps=31250``

in a workdir of their own (there the optimiser's moments go on, here they start anew). What else
differs is what mar.py lists. Samples are drawn as officially, by the temperature of 0.7 that acts
on the head's shifts.
"""

import ml_collections

SIZES = ("base", "large", "huge")

WIDTH = {"base": 768, "large": 1024, "huge": 1280}
DEPTH = {"base": 24, "large": 32, "huge": 40}
HEADS = {"base": 12, "large": 16, "huge": 16}
HEAD = {"base": (6, 1024), "large": (8, 1280), "huge": (12, 1536)}  # blocks and width


def get_config(arg: str = "base") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of ear.py is none of {SIZES}")
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
    config.init_from = dict(workdir="")
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
    config.schedule = dict(name="masked", grid=16, iterations=64)
    config.backbone = dict(
        name="encoder_decoder",
        code_width=16,
        num_classes=1000,
        width=WIDTH[arg],
        depth=0,
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
        name="energy",
        code_width=16,
        width=width,
        depth=depth,
        noise_width=64,
        alpha=1.0,
        train_temperature=1.0,
    )
    config.objective = dict(
        name="masked", label_dropout=0.1, rate_mean=1.0, rate_std=0.25, rate_min=0.7, repeats=2
    )
    config.sampling = dict(temperature=0.7, guidance=dict(scale=3.0, kind="linear_known"))
    iterations = 625  # of an epoch: 1,281,167 images, batches of 2048, the last one left out
    config.train = dict(
        steps=750 * iterations,
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
        rate_factors=((r"^head/.*kernel$", 0.25),),
        clip_norm=3.0,
    )
    config.ema = dict(decay=0.9999, warmup=False)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
