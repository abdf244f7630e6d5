"""FlowAR, scales of continuous codes, each from noise by a flow (2412.15205), on Fashion-MNIST.

    python experiments/train.py --config=configs/fashion_mnist/flowar.py --workdir=runs/flowar \
        --config.tokenizer_checkpoint=runs/tokenizer_kl

Arguments (``--config=...py:ARG``): none, 10,000 steps, not yet run; ``demo``, 1,000 steps of a
smaller network; ``smoke``, seconds. Each needs the tokenizer of the same argument. With cached
codes (experiments/cache_codes.py) add ``--config.data.source=codes:DIR``.
"""

import ml_collections

MODES = ("", "demo", "smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of flowar.py is none of {MODES}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.precision = "default"
    config.attention = "auto"
    config.data = dict(
        source="embedded", image_size=28, channels=1, num_classes=10, crop="none", flip=False
    )
    config.tokenizer_checkpoint = ""
    config.tokenizer = dict(
        name="kl",
        scale=1.0,
        scales=(1, 2, 4, 7),
        autoencoder=dict(
            image_size=28,
            image_channels=1,
            latent=32,
            code_width=4,
            channels=96,
            multipliers=(1,),
            encoder_blocks=2,
            decoder_blocks=3,
            attention=False,
            middle=False,
            patch=4,
            groups=8,
            projection=1,
        ),
    )
    config.schedule = dict(name="next_scale", scales=(1, 2, 4, 7))
    config.backbone = dict(
        name="decoder",
        num_classes=10,
        context="features",
        feature_width=4,
        width=160,
        depth=6,
        heads=4,
        mlp_hidden=640,
        positions="learned",
        norm="layernorm",
        norm_epsilon=1e-6,
        modulation="own",
        attention_bias="qkv",
        activation="silu",
        mlp_bias=True,
        residual_dropout=0.05,
        mlp_dropout=0.05,
    )
    config.head = dict(
        name="flow",
        code_width=4,
        width=160,
        depth=2,
        heads=4,
        activation="silu",
        sampler="euler",
        sampling_steps=25,
    )
    config.objective = dict(name="flow_matching", label_dropout=0.1, by_step=False)
    config.sampling = dict(guidance=dict(scale=2.5, kind="constant"))
    config.train = dict(
        steps=10_000,
        batch_size=64,
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
        learning_rate=1e-3,
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
            width=96, depth=4, heads=4, mlp_hidden=256, residual_dropout=0.0, mlp_dropout=0.0
        )
        config.head.update(width=96, depth=2, heads=4, sampling_steps=20)
        config.optimizer.update(name="muon", learning_rate=2e-3)
        config.train.update(
            steps=1_000, batch_size=32, eval_every=500, preview_every=500, checkpoint_every=500
        )
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.tokenizer.autoencoder.update(channels=16, encoder_blocks=1, decoder_blocks=1)
        config.backbone.update(width=32, depth=2, heads=2, mlp_hidden=64)
        config.head.update(width=32, depth=1, heads=2, sampling_steps=4)
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
