"""FlowAR (2412.15205): scales of continuous codes, each from noise by a flow, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/flowar.py:S \
        --workdir=runs/flowar_s --config.tokenizer_checkpoint=runs/imagenet_kl \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
KL-16 of tokenizer_kl.py, whose latents are averaged to 1, 2, 4 and 8 cells a side. Arguments
(``--config=...py:ARG``), S if none:

    argument  parameters     published
    S        174,868,240         170 M
    B        310,227,984         300 M
    L        602,164,496         589 M
    H      1,950,443,536         1.9 B

No code and no weights were released: sizes, rates and steps below are ours, such that the numbers
of parameters come near those that were published. The paper's own are the doubling scales of one
latent, the class and the enlarged scale before as what a scale is fed, visibility scale by scale,
the linear path, the velocity of all codes of a scale together, and modulation position by position.
Chosen here: a decoder as VAR's with adaptive norms of the class; area means for coarser scales and
bicubic enlargement; times as xAR draws them; every scale counts the same in the loss; 25 steps of
Euler; guidance 2.5 at every scale; the optimiser and schedule of VAR. Blocks of L and H are
rematerialised (``--config.backbone.remat=none`` where memory allows).
"""

import ml_collections

SIZES = ("S", "B", "L", "H")

WIDTH = {"S": 768, "B": 1024, "L": 1280, "H": 1920}
DEPTH = {"S": (12, 4), "B": (12, 4), "L": (15, 5), "H": (22, 7)}  # of the decoder, and of the head
SCALES = (1, 2, 4, 8, 16)


def get_config(arg: str = "S") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of flowar.py is none of {SIZES}")
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
        scales=SCALES,
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
    config.schedule = dict(name="next_scale", scales=SCALES)
    width, (depth, head_depth) = WIDTH[arg], DEPTH[arg]
    config.backbone = dict(
        name="decoder",
        num_classes=1000,
        context="features",
        feature_width=16,
        width=width,
        depth=depth,
        heads=width // 64,
        positions="learned",
        norm="layernorm",
        norm_epsilon=1e-6,
        modulation="own",
        attention_bias="qkv",
        activation="gelu_tanh",
        mlp_bias=True,
        init_std=0.02,
        remat="block" if arg in ("L", "H") else "none",
    )
    config.head = dict(
        name="flow",
        code_width=16,
        width=width,
        depth=head_depth,
        heads=width // 64,
        activation="gelu_tanh",
        sampler="euler",
        sampling_steps=25,
    )
    config.objective = dict(name="flow_matching", label_dropout=0.1, by_step=True)
    config.sampling = dict(guidance=dict(scale=2.5, kind="constant"))
    iterations = 1251  # of an epoch: 1,281,167 images, batches of 1024, the last one left out
    config.train = dict(
        steps=400 * iterations,
        batch_size=1024,
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
        warmup_steps=8 * iterations,
        end_ratio=0.025,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.9999, warmup=False)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    return config
