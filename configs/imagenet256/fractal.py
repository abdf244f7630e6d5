"""FractalAR and FractalMAR (arXiv:2502.17437): patches of patches down to pixels, ImageNet.

    python experiments/train.py --config=configs/imagenet256/fractal.py:base \
        --workdir=runs/fractalmar_base --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012. There is no
tokenizer: pixels are the codes. Arguments (``--config=...py:ARG``), base if none:

    argument  levels, pixels a side       parameters  published FID  guidance
    ar_64     FractalAR, 64, 4, 1        442,068,224           5.30      11.0
    mar_64    FractalMAR, 64, 4, 1       431,995,648           2.72       6.5
    base      FractalMAR, 256, 16, 4, 1  186,300,224          11.80      29.0
    large     FractalMAR, 256, 16, 4, 1  437,000,064           7.30      21.0
    huge      FractalMAR, 256, 16, 4, 1  849,586,240           6.15      19.0

Recipe: that of the README of github.com/LTH14/fractalgen: 800 epochs in batches of 2048 (64 pixels)
or 1024, rates 4e-4 or 2e-4 after 40 epochs of warm-up, half a cosine to 0, weight decay on all but
vectors and biases, gradients clipped at 3, red counted five times. The temperature is one over the
official one, with which logits are multiplied. What differs here:

    - bfloat16 in place of float16 with loss scaling.
    - Linear layers of the blocks start from a normal of deviation 0.02 instead of Xavier's uniform.
    - Patches of a masked level that are known count nothing below, instead of not being there: it
      takes more operations, and gives the same loss.
"""

import ml_collections

SIZES = ("base", "large", "huge", "ar_64", "mar_64")

WIDTHS = {"base": (768, 384, 192), "large": (1024, 512, 256), "huge": (1280, 640, 320)}
DEPTHS = {"base": (24, 6, 3), "large": (32, 8, 4), "huge": (40, 10, 5)}
HEADS = {"base": (12, 6, 3), "large": (16, 8, 4), "huge": (16, 8, 4)}
# Guidance and the official temperature.
SAMPLING = {
    "ar_64": (11.0, 1.03),
    "mar_64": (6.5, 1.02),
    "base": (29.0, 1.1),
    "large": (21.0, 1.1),
    "huge": (19.0, 1.1),
}


def get_config(arg: str = "base") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of fractal.py is none of {SIZES}")
    small, masked = arg.endswith("_64"), arg != "ar_64"
    size = 64 if small else 256
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.precision = "default"
    config.attention = "auto"
    config.data = dict(
        source="folder:data/imagenet",
        image_size=size,
        channels=3,
        num_classes=1000,
        crop="center",
        flip=True,
        num_workers=8,
    )
    config.tokenizer_checkpoint = ""
    config.tokenizer = dict(name="pixels", image_size=size, image_channels=3)
    iterations = (64, 16) if small else (64, 16, 16)
    config.schedule = dict(
        name="nested",
        sizes=(64, 4, 1) if small else (256, 16, 4, 1),
        iterations=iterations if masked else (0,) * len(iterations),
    )
    config.backbone = dict(
        name="fractal",
        num_classes=1000,
        channels=3,
        values=256,
        widths=(1024, 512) if small else WIDTHS[arg],
        depths=(32, 8) if small else DEPTHS[arg],
        heads=(16, 8) if small else HEADS[arg],
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        attention_dropout=0.1 if masked else 0.0,
        dropout=0.1,
        init_std=0.02,
        remat="block",
    )
    if masked:
        config.backbone.update(conditions=5, colour=not small)
    config.head = dict(
        name="pixels",
        channels=3,
        values=256,
        width=128 if small else 64,
        depth=3 if small else 1,
        heads=4,
        init_std=0.02,
        remat="block",
    )
    config.objective = dict(name="nested", label_dropout=0.1, channel_weights=(5.0, 1.0, 1.0))
    if masked:
        config.objective.update(rate_mean=1.0, rate_std=0.25)
    if not small:
        config.objective.colour_weights = (5.0, 1.0, 1.0)
    scale, temperature = SAMPLING[arg]
    config.sampling = dict(
        temperature=1.0 / temperature,
        guidance=dict(scale=scale, kind="linear_known" if masked else "linear_after"),
    )
    batch_size = 2048 if small else 1024
    epoch = 1_281_167 // batch_size  # iterations, the last batch left out
    config.train = dict(
        steps=800 * epoch,
        batch_size=batch_size,
        log_every=100,
        eval_every=10 * epoch,
        preview_every=10 * epoch,
        checkpoint_every=5_000,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=5e-5 * batch_size / 256,
        schedule="cosine",
        warmup_steps=40 * epoch,
        end_ratio=0.0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=3.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
