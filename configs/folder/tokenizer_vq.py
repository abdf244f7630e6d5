"""VQ tokenizer on a folder of your own photographs: 16 x 16 codes of 4,096 for an image.

    python experiments/train.py --config=configs/folder/tokenizer_vq.py:128 \
        --workdir=runs/mine --config.data.source=folder:PATH --config.data.num_classes=7

``PATH/train/<class>/`` and ``PATH/val/<class>/``, or ``PATH/<class>/``, of which a tenth is held
out; images of any size and mode, here of 7 classes. Arguments (``--config=...py:ARG``): none, sides
of 256; ``64`` and ``128``; ``demo``, 64 without a discriminator, for a CPU; ``smoke``, seconds.
With the weights of LPIPS (README, "Train a tokenizer on your own folder") add
``--config.objective.perceptual=1 --config.objective.perceptual_weights=lpips_vgg.npz``.
"""

import ml_collections

# Argument -> side of the images, and factors of the width: one for every halving after the patches.
SIZES = {
    "": (256, (1, 2, 4)),
    "128": (128, (1, 2)),
    "64": (64, (1,)),
    "demo": (64, (1,)),
    "smoke": (16, (1,)),
}


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of mode ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of tokenizer_vq.py is none of {tuple(SIZES)}")
    side, multipliers = SIZES[arg]
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.precision = "default"
    config.data = dict(
        source="folder:data/mine",
        image_size=side,
        channels=3,
        num_classes=10,
        crop="random",
        min_crop=0.8,
        max_crop=1.0,
        flip=True,
        on_error="raise",
        num_workers=8,
    )
    config.tokenizer = dict(
        name="vq",
        codebook_size=4096,
        l2_norm=True,
        autoencoder=dict(
            image_size=side,
            image_channels=3,
            latent=128,
            code_width=8,
            channels=128,
            multipliers=multipliers,
            encoder_blocks=2,
            decoder_blocks=3,
            attention=False,
            middle=False,
            patch=4,
            groups=8,
            projection=1,
        ),
    )
    # Of a trained or a converted tokenizer to go on from; `optimizer.freeze` holds parts of it.
    config.init_from = dict(workdir="")
    config.objective = dict(
        name="tokenizer",
        l1=0.2,
        l2=1.0,
        charbonnier=0.0,
        charbonnier_epsilon=1e-3,
        codebook=1.0,
        commitment=0.25,
        restart_below=0.05,
        kmeans_vectors=0,
    )
    config.objective.update(perceptual=0.0, perceptual_network="vgg", perceptual_weights="")
    config.objective.adversarial = dict(
        weight=0.5,
        start=20_000,
        warmup_steps=1_000,
        loss="hinge",
        generator_loss="hinge",
        adaptive=True,
        max_adaptive=10.0,
        lecam=0.01,
        lecam_decay=0.999,
        discriminator=dict(name="patchgan", channels=64, layers=3),
    )
    config.train = dict(
        steps=50_000,
        batch_size=64,
        log_every=100,
        eval_every=2_500,
        preview_every=2_500,
        checkpoint_every=2_500,
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
        warmup_steps=1_000,
        end_ratio=0.02,
        b1=0.9,
        b2=0.99,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        freeze=(),
    )
    config.discriminator_optimizer = dict(
        name="adamw",
        learning_rate=2e-4,
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
        config.dtype = "float32"
        config.data.num_workers = 0
        config.tokenizer.codebook_size = 512
        config.tokenizer.autoencoder.update(latent=64, channels=96)
        config.objective.adversarial.update(weight=0.0, start=500, warmup_steps=100)
        config.train.update(
            steps=1_000,
            batch_size=16,
            log_every=50,
            eval_every=500,
            preview_every=500,
            checkpoint_every=500,
        )
        config.optimizer.update(learning_rate=2e-3, warmup_steps=100)
        config.ema.decay = 0.99
    elif arg == "smoke":
        config.dtype = "float32"
        config.data.num_workers = 0
        config.tokenizer.codebook_size = 32
        config.tokenizer.autoencoder.update(
            latent=16, channels=16, encoder_blocks=1, decoder_blocks=1
        )
        config.objective.adversarial.update(start=2, warmup_steps=2)
        config.objective.adversarial.discriminator.update(channels=8, layers=1)
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
