"""LlamaGen (arXiv:2406.06525): class-conditional raster next-token prediction, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/llamagen.py:B \
        --workdir=runs/llamagen_B --config.tokenizer_checkpoint=runs/imagenet_vq \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
VQ-16 of tokenizer_vq.py. Arguments (``--config=...py:ARG``), B if none:

    argument     parameters  published FID  guidance
    B           110,888,448           5.46      2.0
    L           342,910,976           3.80      2.0
    XL          774,699,520           2.62      1.75   trained at 384 px
    XXL       1,410,972,672           2.34      1.75   trained at 384 px
    3B        3,096,659,200           2.18      1.65   trained at 384 px

All are scored at 256 px. XL, XXL and 3B were released at 384 px only, and the guidance is what is
published for 384 px. For that size add ``--config.data.image_size=384
--config.tokenizer.autoencoder.image_size=384 --config.schedule.grid=24``, the first two to the
tokenizer's run as well.

Recipe: autoregressive/train/train_c2i.py of github.com/FoundationVision/LlamaGen, 300 epochs of
5004 steps at a constant learning rate, no averaging of the weights. What differs here:

    - The official run reads codes of ten fixed crops of each image, made beforehand in float32: the
      corners and the centre of a centre crop of 281 pixels, plain and mirrored. Here each visit
      draws a window of the whole image, its shorter side resized to 281 pixels by a Lanczos filter
      (officially box halving, then bicubic), mirrors it half of the time and tokenises it. For
      cached codes (experiments/cache_codes.py --copies=10) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``; they are
      cut as the tokenizer's run cuts its images.
    - Blocks of XL, XXL and 3B are rematerialised (``--config.backbone.remat=none`` where memory
      allows); XXL and 3B split their parameters over all devices, of which their width allows up
      to 128. From 64 devices on ``--config.mesh.data=-1 --config.mesh.fsdp=16`` is faster: a part
      of the width that is no multiple of 8 fills a TPU's registers badly.
"""

import ml_collections

SIZES = ("B", "L", "XL", "XXL", "3B")

WIDTH = {"B": 768, "L": 1024, "XL": 1280, "XXL": 1536, "3B": 3200}
DEPTH = {"B": 12, "L": 24, "XL": 36, "XXL": 48, "3B": 24}
HEADS = {"B": 12, "L": 16, "XL": 20, "XXL": 24, "3B": 32}
MLP_HIDDEN = {"B": 2048, "L": 2816, "XL": 3584, "XXL": 4096, "3B": 8704}
GUIDANCE = {"B": 2.0, "L": 2.0, "XL": 1.75, "XXL": 1.75, "3B": 1.65}


def get_config(arg: str = "B") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of llamagen.py is none of {SIZES}")
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
        crop="margin",
        margin=281 / 256,
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
    config.schedule = dict(name="raster", grid=16)
    config.backbone = dict(
        name="decoder",
        width=WIDTH[arg],
        depth=DEPTH[arg],
        heads=HEADS[arg],
        num_classes=1000,
        context="codes",
        vocab_size=16_384,
        positions="rope",
        rope_base=10_000.0,
        norm="rmsnorm",
        norm_epsilon=1e-5,
        activation="silu",
        gated=True,
        mlp_hidden=MLP_HIDDEN[arg],
        token_dropout=0.1,
        residual_dropout=0.1,
        mlp_dropout=0.1,
        init_std=0.02,
        remat="none" if arg in ("B", "L") else "block",
    )
    config.head = dict(name="categorical", vocab_size=16_384, bias=False, init_std=0.0)
    config.objective = dict(name="likelihood", label_dropout=0.1, label_smoothing=0.0)
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        min_p=0.0,
        guidance=dict(scale=GUIDANCE[arg], kind="constant"),
    )
    iterations = 5004  # of an epoch: 1,281,167 images, batches of 256, the last one left out
    config.train = dict(
        steps=300 * iterations,
        batch_size=256,
        log_every=100,
        eval_every=10 * iterations,
        preview_every=5 * iterations,
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
        warmup_steps=0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg in ("XXL", "3B"):
        config.mesh.update(data=1, fsdp=-1)
    return config
