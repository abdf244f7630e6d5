"""Multi-scale residual VQ tokenizer (VAR's) on Fashion-MNIST: 119 codes of 1,024 for an image.

    python experiments/train.py --config=configs/fashion_mnist/tokenizer_multiscale.py \
        --workdir=runs/tokenizer_multiscale

Arguments (``--config=...py:ARG``): none, about 16 minutes of one CPU core; ``demo``, about two and
a half of two; ``smoke``, seconds.
"""

import ml_collections

MODES = ("", "demo", "smoke")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of tokenizer_multiscale.py is none of {MODES}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "float32"
    config.precision = "default"
    config.data = dict(
        source="embedded", image_size=28, channels=1, num_classes=10, crop="none", flip=False
    )
    config.tokenizer = dict(
        name="multiscale_vq",
        scales=(1, 2, 4, 7, 7),  # the last grid twice: its second visit codes what the first left
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
    config.objective = dict(
        name="tokenizer",
        l2=1.0,
        codebook=1.0,
        commitment=0.25,
        restart_below=0.05,
        kmeans_vectors=0,
    )
    # Weights 0: `perceptual` takes the features of the shipped classifier of these images.
    config.objective.update(
        charbonnier=0.0,
        charbonnier_epsilon=1e-3,
        perceptual=0.0,
        perceptual_network="classifier",
        perceptual_weights="",
    )
    config.objective.adversarial = dict(
        weight=0.0,  # no discriminator
        start=1_500,
        warmup_steps=200,
        loss="hinge",
        generator_loss="hinge",
        adaptive=True,
        max_adaptive=100.0,
        lecam=0.0,
        lecam_decay=0.999,
        discriminator=dict(name="patchgan", channels=32, layers=2),
    )
    config.train = dict(
        steps=2_800,
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
        learning_rate=2e-3,
        schedule="cosine",
        warmup_steps=100,
        end_ratio=0.02,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.discriminator_optimizer = dict(
        name="adamw",
        learning_rate=5e-4,
        schedule="constant",
        warmup_steps=0,
        b1=0.5,
        b2=0.9,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.999)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg == "demo":
        config.tokenizer.update(scales=(1, 2, 4, 7), codebook_size=256)
        config.train.update(
            steps=1_000, batch_size=32, eval_every=500, preview_every=500, checkpoint_every=500
        )
        config.objective.adversarial.update(start=500, warmup_steps=100)
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.tokenizer.autoencoder.update(channels=16, encoder_blocks=1, decoder_blocks=1)
        config.tokenizer.update(scales=(1, 2, 4, 7), codebook_size=32)
        config.train.update(
            steps=4,
            batch_size=8,
            log_every=1,
            eval_every=4,
            eval_batches=2,
            preview_every=4,
            checkpoint_every=2,
        )
        config.objective.adversarial.update(start=2, warmup_steps=2)
        config.optimizer.warmup_steps = 1
    return config
