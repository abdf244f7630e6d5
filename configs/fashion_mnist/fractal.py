"""FractalAR, patches of patches down to pixels (arXiv:2502.17437), on Fashion-MNIST.

    python experiments/train.py --config=configs/fashion_mnist/fractal.py --workdir=runs/fractal

Arguments (``--config=...py:ARG``): none, the default run; ``demo``, some minutes on 2 CPU cores;
``smoke``, seconds. There is no tokenizer to train: pixels are the codes.

An image of 28 pixels a side is 49 patches of 4, each of these 16 pixels. Both levels take their
patches one by one, so that the loss is the exact likelihood. For FractalMAR, whose levels draw sets
of patches in random orders:

    --config.schedule.iterations='(12, 8)' --config.backbone.conditions=5 \
        --config.sampling.guidance.kind=linear_known
"""

import ml_collections

MODES = ("", "demo", "smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of fractal.py is none of {MODES}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.precision = "default"
    config.attention = "auto"
    config.data = dict(
        source="embedded", image_size=28, channels=1, num_classes=10, crop="none", flip=False
    )
    config.tokenizer_checkpoint = ""
    config.tokenizer = dict(name="pixels", image_size=28, image_channels=1)
    config.schedule = dict(name="nested", sizes=(28, 4, 1), iterations=(0, 0))
    config.backbone = dict(
        name="fractal",
        num_classes=10,
        channels=1,
        values=256,
        widths=(192, 64),
        depths=(6, 3),
        heads=(4, 4),
        mlp_hidden=(384, 128),
        conditions=1,
        mean=(0.286,),
        std=(0.353,),
        dropout=0.05,
    )
    config.head = dict(name="pixels", channels=1, values=256, width=64, depth=1, heads=4)
    config.objective = dict(name="nested", label_dropout=0.1)
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=0.0,
        min_p=0.0,
        guidance=dict(scale=2.0, kind="constant"),
    )
    config.train = dict(
        steps=6_000,
        batch_size=32,
        log_every=50,
        eval_every=1_000,
        preview_every=1_000,
        checkpoint_every=1_000,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        end_ratio=0.02,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.999)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg == "demo":
        config.backbone.update(
            widths=(128, 32), depths=(4, 1), heads=(4, 2), mlp_hidden=(256, 64), dropout=0.0
        )
        config.head.update(width=32, heads=2)
        config.optimizer.name = "muon"
        config.train.update(
            steps=1_600, batch_size=16, eval_every=800, preview_every=800, checkpoint_every=800
        )
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.backbone.update(widths=(32, 16), depths=(2, 1), heads=(2, 2), mlp_hidden=(64, 32))
        config.head.update(width=16, heads=2)
        config.train.update(
            steps=4,
            batch_size=8,
            log_every=1,
            eval_every=4,
            eval_batches=2,
            preview_every=4,
            checkpoint_every=2,
        )
        config.optimizer.warmup_steps = 1
    return config
