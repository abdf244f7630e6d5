"""xAR, noisy cells of continuous codes one after the other (2502.20388), on Fashion-MNIST.

    python experiments/train.py --config=configs/fashion_mnist/xar.py --workdir=runs/xar \
        --config.tokenizer_checkpoint=runs/tokenizer_kl

Arguments (``--config=...py:ARG``): none, 10,000 steps, not yet run; ``demo``, 1,000 steps of a
smaller network; ``smoke``, seconds. Each needs the tokenizer of the same argument. With cached
codes (experiments/cache_codes.py) add ``--config.data.source=codes:DIR``. Other entities than
cells: ``--config.schedule.entity=subsample``, ``token`` or ``image``, the latter two with
``--config.schedule.parts=1``.
"""

import ml_collections

MODES = ("", "demo", "smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of xar.py is none of {MODES}")
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
    # Of seven rows and columns a cell has four or three.
    config.schedule = dict(name="next_entity", grid=7, entity="cell", parts=2)
    config.backbone = dict(
        name="noisy_decoder",
        code_width=4,
        num_classes=10,
        width=160,
        depth=4,
        heads=4,
        decoder_depth=4,
        decoder_heads=4,
        mlp_hidden=448,
        activation="silu",
        dropout=0.05,
    )
    config.head = dict(
        name="velocity", code_width=4, sampler="euler_maruyama", sampling_steps=40, last=0.04
    )
    config.objective = dict(name="flow_matching", label_dropout=0.1)
    config.sampling = dict(temperature=1.0, guidance=dict(scale=3.0, kind="linear"))
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
            width=96, depth=3, heads=4, decoder_depth=3, mlp_hidden=256, dropout=0.0
        )
        config.head.sampling_steps = 20
        config.sampling.temperature = 0.8
        config.sampling.guidance.scale = 4.0
        config.optimizer.update(name="muon", learning_rate=2e-3)
        config.train.update(
            steps=1_000, batch_size=32, eval_every=500, preview_every=500, checkpoint_every=500
        )
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.tokenizer.autoencoder.update(channels=16, encoder_blocks=1, decoder_blocks=1)
        config.backbone.update(
            width=32, depth=2, heads=2, decoder_depth=1, decoder_heads=2, mlp_hidden=64
        )
        config.head.sampling_steps = 4
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
