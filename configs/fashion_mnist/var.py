"""VAR, class-conditional next-scale prediction (arXiv:2404.02905), on Fashion-MNIST.

    python experiments/train.py --config=configs/fashion_mnist/var.py --workdir=runs/var \
        --config.tokenizer_checkpoint=runs/tokenizer_multiscale

Arguments (``--config=...py:ARG``): none, about 46 minutes of one CPU core; ``demo``, about three
and a half of two; ``smoke``, seconds. Each needs the tokenizer of the same argument. With cached
codes (experiments/cache_codes.py) add ``--config.data.source=codes:DIR``.
"""

import ml_collections

MODES = ("", "demo", "smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of var.py is none of {MODES}")
    scales = (1, 2, 4, 7) if arg else (1, 2, 4, 7, 7)
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
        name="multiscale_vq",
        scales=scales,
        codebook_size=1024,
        phis=4,
        autoencoder=dict(
            image_size=28,
            image_channels=1,
            latent=64,
            code_width=8,
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
    config.schedule = dict(name="next_scale", scales=scales)
    config.backbone = dict(
        name="decoder",
        width=128,
        depth=4,
        heads=4,
        num_classes=10,
        context="features",
        feature_width=8,
        positions="learned",
        norm="layernorm",
        norm_epsilon=1e-6,
        modulation="shared",
        qk_norm="cosine",
        attention_bias="qv",
        activation="relu",  # a tanh-GELU costs a CPU more than the products around it
        mlp_bias=True,
        depth_scaled_init=True,
        gate_init=0.1,
    )
    config.head = dict(name="categorical", vocab_size=1024, bias=True, init_std=0.01)
    config.objective = dict(name="likelihood", label_dropout=0.1)
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=0.0,
        min_p=0.0,
        guidance=dict(scale=2.5, kind="linear"),
        # Codes of one scale are drawn independently: those of the first 7 x 7 agree when cold, and
        # what variety that costs the coarse ones give back.
        step_temperatures=(1.3, 1.2, 1.1, 0.3, 0.8),
    )
    config.train = dict(
        steps=4_000,
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
        name="muon",
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
    if arg:  # of four scales
        config.sampling.update(step_temperatures=())
        config.sampling.guidance.scale = 3.0
        config.optimizer.update(name="adamw", clip_norm=2.0)
    if arg == "demo":
        config.tokenizer.codebook_size = config.head.vocab_size = 256
        config.train.update(steps=1_000, eval_every=500, preview_every=500, checkpoint_every=500)
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.tokenizer.autoencoder.update(channels=16, encoder_blocks=1, decoder_blocks=1)
        config.tokenizer.codebook_size = config.head.vocab_size = 32
        config.backbone.update(width=32, depth=2, heads=2)
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
