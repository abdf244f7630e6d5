"""VAR (arXiv:2404.02905): class-conditional next-scale prediction on ImageNet at 256 px.

    python experiments/train.py --config=configs/imagenet256/var.py:d16 --workdir=runs/var_d16 \
        --config.tokenizer_checkpoint=runs/imagenet_multiscale \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
that of tokenizer_multiscale.py. Arguments (``--config=...py:ARG``), d16 if none:

    argument     parameters  published FID  batch  epochs
    d16         310,283,520           3.55    768     200
    d20         600,917,136           2.95    768     250
    d24       1,033,399,360           2.33    768     350
    d30       2,010,020,356           1.97   1024     350

Recipe: the launch lines and the trainer's defaults of github.com/FoundationVision/VAR (README.md,
utils/arg_util.py, utils/lr_control.py). Its FID: 50 images of each class drawn with the sampling
below, against ADM's reference batch. What differs here:

    - bfloat16 instead of float16 with a loss scaler;
    - blocks are rematerialised (``--config.backbone.remat=none`` where memory allows);
    - d24 and d30 split their parameters over all devices, of which their width allows up to 128
      (beyond: ``--config.mesh.data=-1 --config.mesh.fsdp=64``).
"""

import ml_collections

SIZES = ("d16", "d20", "d24", "d30")

EPOCHS = {"d16": 200, "d20": 250, "d24": 350, "d30": 350}
BATCH = {"d16": 768, "d20": 768, "d24": 768, "d30": 1024}
ITERATIONS = {768: 1669, 1024: 1252}  # of an epoch: 1,281,167 images, the last batch filled up
BASE_RATE = {"d16": 1e-4, "d20": 1e-4, "d24": 8e-5, "d30": 8e-5}  # for 256 images
END_RATIO = {"d16": 0.1, "d20": 0.1, "d24": 0.01, "d30": 0.01}
WEIGHT_DECAY_END = {"d16": 0.05, "d20": 0.05, "d24": 0.05, "d30": 0.08}
GATE_INIT = {"d16": 1e-3, "d20": 1e-3, "d24": 1e-4, "d30": 1e-5}


def get_config(arg: str = "d16") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of var.py is none of {SIZES}")
    depth = int(arg[1:])
    width = 64 * depth
    scales = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
    epochs, batch = EPOCHS[arg], BATCH[arg]
    iterations = ITERATIONS[batch]
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
        name="multiscale_vq",
        scales=scales,
        codebook_size=4096,
        phis=4,
        phi_ratio=0.5,
        autoencoder=dict(
            image_size=256,
            image_channels=3,
            latent=32,
            code_width=32,
            channels=160,
            multipliers=(1, 1, 2, 2, 4),
            encoder_blocks=2,
            decoder_blocks=3,
            attention=True,
            middle=True,
            groups=32,
            projection=3,
        ),
    )
    config.schedule = dict(name="next_scale", scales=scales)
    config.backbone = dict(
        name="decoder",
        width=width,
        depth=depth,
        heads=depth,
        num_classes=1000,
        context="features",
        feature_width=32,
        positions="learned",
        norm="layernorm",
        norm_epsilon=1e-6,
        modulation="own",
        qk_norm="cosine",
        attention_bias="qv",
        activation="gelu_tanh",
        mlp_bias=True,
        drop_path=0.1 * depth / 24,
        depth_scaled_init=True,
        gate_init=GATE_INIT[arg],
        modulation_init=0.5,
        remat="block",
    )
    config.head = dict(
        name="categorical", vocab_size=4096, bias=True, init_std=0.02 * (3 * width) ** -0.5
    )
    config.objective = dict(name="likelihood", label_dropout=0.1, label_smoothing=0.0)
    config.sampling = dict(
        temperature=1.0,
        top_k=900,
        top_p=0.96,
        min_p=0.0,
        guidance=dict(scale=1.5, kind="linear_excess"),
    )
    config.train = dict(
        steps=epochs * iterations,
        batch_size=batch,
        log_every=100,
        eval_every=10 * iterations,
        preview_every=5 * iterations,
        checkpoint_every=iterations,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adamw",
        learning_rate=BASE_RATE[arg] * batch / 256,
        schedule="linear",
        warmup_steps=epochs // 50 * iterations,
        warmup_start=0.005,
        hold=0.05,
        end_ratio=END_RATIO[arg],
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.05,
        weight_decay_end=WEIGHT_DECAY_END[arg],
        # Officially pos_start, pos_1LC, lvl_embed, scale_mul, ada_gss; and every bias.
        no_decay=(r"(^|/)(position_start|position|scale_embed|log_scale|modulation_table)$",),
        clip_norm=2.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if depth >= 24:
        config.mesh.update(data=1, fsdp=-1)
    return config
