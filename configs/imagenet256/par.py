"""PAR (arXiv:2412.15119): groups of distant codes in parallel, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/par.py:XL \
        --workdir=runs/par_XL --config.tokenizer_checkpoint=runs/imagenet_vq \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
VQ-16 of tokenizer_vq.py. Arguments (``--config=...py:ARG``), XL if none:

    argument     parameters  published FID  guidance  codes of a group
    XL          774,703,360           2.61       1.5                 4
    XXL       1,410,977,280           2.35       1.435               4
    3B        3,096,668,800           2.29       1.345               4
    3B_16x    3,096,707,200           2.88       1.5                16

All were trained and released at 384 px and are scored at 256 px; so are the FID and the guidance.
For that size add ``--config.data.image_size=384 --config.tokenizer.autoencoder.image_size=384
--config.schedule.grid=24``, the first two to the tokenizer's run as well.

Recipe of github.com/Epiphqny/PAR, which is LlamaGen's: 300 epochs of 5004 steps at a constant
learning rate, no averaging of the weights. What differs here is said in llamagen.py.
"""

import ml_collections

SIZES = ("XL", "XXL", "3B", "3B_16x")

WIDTH = {"XL": 1280, "XXL": 1536, "3B": 3200, "3B_16x": 3200}
DEPTH = {"XL": 36, "XXL": 48, "3B": 24, "3B_16x": 24}
HEADS = {"XL": 20, "XXL": 24, "3B": 32, "3B_16x": 32}
MLP_HIDDEN = {"XL": 3584, "XXL": 4096, "3B": 8704, "3B_16x": 8704}
REGIONS = {"XL": 4, "XXL": 4, "3B": 4, "3B_16x": 16}
GUIDANCE = {"XL": 1.5, "XXL": 1.435, "3B": 1.345, "3B_16x": 1.5}


def get_config(arg: str = "XL") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of par.py is none of {SIZES}")
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
    config.schedule = dict(name="distant_groups", grid=16, regions=REGIONS[arg])
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
        remat="block",
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
    if arg != "XL":
        config.mesh.update(data=1, fsdp=-1)
    return config
