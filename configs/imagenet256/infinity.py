"""Infinity (arXiv:2412.04431), next-scale prediction of bits, by class on ImageNet at 256 px.

    python experiments/train.py --config=configs/imagenet256/infinity.py:2b \
        --workdir=runs/infinity_2b --config.tokenizer_checkpoint=runs/imagenet_bitwise_d32 \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
that of tokenizer_bitwise.py: of d32, for 8b of d14_f8. Arguments (``--config=...py:ARG``), layer12
if none:

    argument     parameters  of them not in the official model  bits of a code
    layer12     132,337,312                          7,151,616              32
    layer16     368,785,408                          7,151,616              32
    layer24     948,096,448                          7,151,616              32
    2b        2,211,715,648                          7,151,616              32
    8b        8,382,943,440                          7,151,616              56

Infinity is a model of texts. Here the caption of a class is four learned rows in place of up to 512
features of a text encoder, which are read and attended to in the same way; so the table of 1,000
classes and a null one replaces that of 512 null rows. Everything else is of the official size:
blocks, the table of 15 scales, rotary positions on the 64 x 64 cells of the largest images.
No FID on ImageNet is published.

Recipe: the launch script of github.com/FoundationVision/Infinity for 256 px: AdamW of 0.9 and 0.97,
a base rate of 6e-3 for 256 images, clipping at 5, no warm-up to speak of, linear decay, a tenth of
the conditions dropped, drop path of 0.1, up to 0.3 of the bits of a scale flipped, codes weighted
by scale, gates near 0. Sampling as its scripts do. What differs, or is this project's choice:

    - batch and number of epochs, which are not stated; no gradient accumulation (theirs of 3
      multiplies the rate too);
    - weight decay of 0.05, of matrices alone;
    - blocks are rematerialised (``--config.backbone.remat=none`` where memory allows), and the
      larger models split their parameters over all devices.
"""

import ml_collections

SIZES = ("layer12", "layer16", "layer24", "2b", "8b")

# depth, width, heads, bits of a cell
FORMS = {
    "layer12": (12, 768, 8, 32),
    "layer16": (16, 1152, 12, 32),
    "layer24": (24, 1536, 16, 32),
    "2b": (32, 2048, 16, 32),
    "8b": (40, 3584, 28, 14),
}
ITERATIONS = 5005  # of an epoch: 1,281,167 images, the last batch of 256 filled up


def get_config(arg: str = "layer12") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of infinity.py is none of {SIZES}")
    depth, width, heads, code_width = FORMS[arg]
    patch = 2 if arg == "8b" else 1
    bits = code_width * patch**2
    scales = (1, 2, 4, 6, 8, 12, 16)
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
        margin=1.125,
        flip=False,
        num_workers=8,
    )
    config.tokenizer_checkpoint = ""
    config.tokenizer = dict(
        name="multiscale_bitwise",
        scales=scales,
        patch=patch,
        entropy=True,
        entropy_group=1,
        autoencoder=dict(
            image_size=256,
            image_channels=3,
            latent=code_width,
            code_width=code_width,
            channels=128,
            multipliers=(1, 2, 4, 4) if patch == 2 else (1, 2, 4, 4, 4),
            encoder_blocks=2,
            decoder_blocks=3,
            attention=False,
            middle=True,
            groups=32,
            projection=0,
        ),
    )
    config.schedule = dict(name="next_scale", scales=scales)
    config.backbone = dict(
        name="cross_decoder",
        width=width,
        depth=depth,
        heads=heads,
        condition="class",
        num_classes=1000,
        caption_length=4,
        caption_features=2048,
        pool_heads=16,
        feature_width=bits,
        reference_grid=(64, 64),
        spare_scales=15 - len(scales),
        norm_epsilon=1e-6,
        modulation="shared",
        qk_norm="cosine",
        activation="gelu_tanh",
        drop_path=0.1,
        gate_init=5e-6,
        remat="block",
    )
    config.head = dict(name="bitwise", bits=bits, bias=True, init_std=0.02 * (3 * width) ** -0.5)
    config.objective = dict(
        name="likelihood", label_dropout=0.1, bit_flips=0.3, balance_scales=True
    )
    config.sampling = dict(
        temperature=0.5,
        top_k=900,
        top_p=0.97,
        min_p=0.0,
        guidance=dict(scale=4.0, kind="constant"),
    )
    config.train = dict(
        steps=200 * ITERATIONS,
        batch_size=256,
        log_every=100,
        eval_every=10 * ITERATIONS,
        preview_every=5 * ITERATIONS,
        checkpoint_every=ITERATIONS,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=6e-3,
        schedule="linear",
        warmup_steps=1,
        end_ratio=0.01,
        b1=0.9,
        b2=0.97,
        eps=1e-8,
        weight_decay=0.05,
        no_decay=(r"(^|/)(position_start|scale_embed|log_scale|modulation_table)$",),
        clip_norm=5.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg in ("2b", "8b"):
        config.mesh.update(data=1, fsdp=-1)
    return config
