"""PAR, groups of distant codes in parallel (arXiv:2412.15119), on Fashion-MNIST.

    python experiments/train.py --config=configs/fashion_mnist/par.py --workdir=runs/par \
        --config.tokenizer_checkpoint=runs/tokenizer_vq_fine

Arguments (``--config=...py:ARG``): none, the default; ``demo``, for minutes; ``smoke``, seconds.
Each needs the tokenizer of the same argument. With cached codes (experiments/cache_codes.py) add
``--config.data.source=codes:DIR``.

The tokenizer is that of tokenizer_vq_fine.py: its 14 x 14 codes have four regions of 49. The first
four codes are drawn one by one, the others in groups of four, in 52 steps in place of 196.
"""

import ml_collections

MODES = ("", "demo", "smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of par.py is none of {MODES}")
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
        name="vq",
        codebook_size=1024,
        l2_norm=True,
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
            patch=2,
            groups=8,
            projection=1,
        ),
    )
    config.schedule = dict(name="distant_groups", grid=14, regions=4)
    config.backbone = dict(
        name="decoder",
        width=160,
        depth=5,
        heads=4,
        num_classes=10,
        context="codes",
        vocab_size=1024,
        positions="rope",
        norm="rmsnorm",
        norm_epsilon=1e-5,
        activation="silu",
        gated=True,
        mlp_hidden=424,
        init_std=0.02,
    )
    config.head = dict(name="categorical", vocab_size=1024, bias=False, init_std=0.0)
    config.objective = dict(name="likelihood", label_dropout=0.1)
    config.sampling = dict(
        temperature=1.0,
        top_k=0,
        top_p=0.0,
        min_p=0.0,
        guidance=dict(scale=4.0, kind="linear"),
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
    if arg == "demo":
        config.tokenizer.codebook_size = config.head.vocab_size = config.backbone.vocab_size = 256
        config.backbone.update(width=128, depth=4, heads=4, mlp_hidden=344)
        config.sampling.update(top_p=0.95)
        config.sampling.guidance.update(scale=4.0, kind="constant")
        config.train.update(steps=500, eval_every=250, preview_every=250, checkpoint_every=250)
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.tokenizer.autoencoder.update(channels=16, encoder_blocks=1, decoder_blocks=1)
        config.tokenizer.codebook_size = config.head.vocab_size = 32
        config.backbone.update(width=32, depth=2, heads=2, mlp_hidden=64, vocab_size=32)
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
