"""GIVT (arXiv:2312.02116): continuous codes, masked, by Gaussian mixtures, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/givt.py:default \
        --workdir=runs/givt --config.tokenizer_checkpoint=runs/imagenet_kl \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012. Arguments
(``--config=...py:ARG``), default if none:

    argument  parameters
    base         86,442,000
    default     304,159,248
    large     1,664,775,696

Sizes and recipe: the masked style of big_vision/configs/proj/givt/givt_imagenet2012.py of
github.com/google-research/big_vision, 500 epochs of batches of 8192, rate 1e-3 after a tenth of
warm-up, then half a cosine, no weight decay, gradients clipped at 1, dropout 0.4. What differs:

    - Biases in the blocks, which have none there; positions and norms are ours. So the parameters
      counted above are not the official ones.
    - The tokenizer is KL-16 of tokenizer_kl.py, not GIVT's own autoencoder.
    - The share of hidden codes is normal, cut to [0.3, 1], not the cosine of a uniform draw.
    - Codes are drawn in random orders, not the densest first, and guided by resampling, not by
      rejection (`ar_jax.heads.mixture`). The scale is 1 + the official weight.
"""

import ml_collections

SIZES = ("default", "base", "large")

WIDTH = {"base": 768, "default": 1024, "large": 1536}
DEPTH = {"base": 12, "default": 24, "large": 48}
HEADS = {"base": 12, "default": 16, "large": 16}
MLP = {"base": 3072, "default": 4096, "large": 8192}


def get_config(arg: str = "default") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of givt.py is none of {SIZES}")
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
    config.schedule = dict(name="masked", grid=16, iterations=16)
    config.backbone = dict(
        name="encoder_decoder",
        code_width=16,
        num_classes=1000,
        width=WIDTH[arg],
        depth=0,
        decoder_width=WIDTH[arg],
        decoder_depth=DEPTH[arg],
        decoder_heads=HEADS[arg],
        buffer=1,
        mlp_ratio=MLP[arg] / WIDTH[arg],
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=0.4,
        dropout=0.4,
        init_std=0.02,
        remat="none" if arg == "base" else "block",
    )
    config.head = dict(name="mixture", code_width=16, components=16, candidates=64)
    config.objective = dict(
        name="masked", label_dropout=0.1, rate_mean=1.0, rate_std=0.35, rate_min=0.3
    )
    config.sampling = dict(temperature=1.0, guidance=dict(scale=1.4, kind="constant"))
    iterations = 156  # of an epoch: 1,281,167 images, batches of 8192, the last one left out
    config.train = dict(
        steps=500 * iterations,
        batch_size=8192,
        log_every=100,
        eval_every=10 * iterations,
        preview_every=10 * iterations,
        checkpoint_every=1_000,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adam",
        learning_rate=1e-3,
        schedule="cosine",
        warmup_steps=50 * iterations,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.9999)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
