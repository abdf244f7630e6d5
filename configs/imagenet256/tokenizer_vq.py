"""LlamaGen's tokenizers VQ-16 and VQ-8 (arXiv:2406.06525): unit-norm codes of 16384 for 256 px.

    python experiments/train.py --config=configs/imagenet256/tokenizer_vq.py \
        --workdir=runs/imagenet_vq --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012. Arguments
(``--config=...py:ARG``):

    argument  tokenizer  codes    parameters  published rFID
    none      VQ-16      16 x 16  71,883,403            2.19
    vq8       VQ-8       32 x 32  70,109,835            0.59

Recipe: tokenizer/tokenizer_image/vq_train.py of github.com/FoundationVision/LlamaGen: mean squared
error, LPIPS (weight 1), codebook, commitment 0.25, and from step 20,000 on an adversarial loss of
weight 0.5 (PatchGAN, hinge; its Adam is that of the tokenizer, and here starts with it).

Perceptual term: LPIPS with VGG16, whose trained weights are not part of this project. Without the
file the run is refused with the two addresses and the command that makes it (experiments/convert.py
--family=lpips --out=weights/lpips_vgg.npz); --config.objective.perceptual=0 trains without
(then better without --config.objective.adversarial.weight too: 0 is no discriminator).
"""

import ml_collections

MODES = ("", "vq8")


def get_config(arg: str = "") -> ml_collections.ConfigDict:
    """The configuration of VQ-16, or of VQ-8 for 'vq8'."""
    if arg not in MODES:
        raise ValueError(f"argument {arg!r} of tokenizer_vq.py is none of {MODES}")
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.dtype = "bfloat16"
    config.precision = "default"
    config.data = dict(
        source="folder:data/imagenet",
        image_size=256,
        channels=3,
        num_classes=1000,
        crop="random",
        min_crop=0.8,
        max_crop=1.0,
        flip=True,
        num_workers=8,
    )
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
    # Of a trained or a converted tokenizer to go on from; `optimizer.freeze` holds parts of it.
    config.init_from = dict(workdir="")
    config.objective = dict(name="tokenizer", l2=1.0, codebook=1.0, commitment=0.25)
    config.objective.update(
        charbonnier=0.0,
        charbonnier_epsilon=1e-3,
        perceptual=1.0,
        perceptual_network="vgg",
        perceptual_weights="weights/lpips_vgg.npz",
    )
    config.objective.adversarial = dict(
        weight=0.5,
        start=20_000,
        warmup_steps=0,
        loss="hinge",
        generator_loss="hinge",
        adaptive=False,
        max_adaptive=1e4,
        lecam=0.0,
        lecam_decay=0.999,
        discriminator=dict(name="patchgan", channels=64, layers=3),
    )
    iterations = 10_009  # of an epoch: 1,281,167 images, batches of 128
    config.train = dict(
        steps=40 * iterations,
        batch_size=128,
        log_every=100,
        eval_every=iterations,
        eval_batches=40,
        preview_every=iterations,
        checkpoint_every=5_000,
        skip_damaged_checkpoints=False,
        best_metric="",
        best_mode="min",
        stuck_after_seconds=1800,
        accumulation=1,
    )
    config.optimizer = dict(
        name="adam",
        learning_rate=1e-4,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
        freeze=(),
    )
    config.discriminator_optimizer = dict(
        name="adam",
        learning_rate=1e-4,
        schedule="constant",
        warmup_steps=0,
        b1=0.9,
        b2=0.95,
        eps=1e-8,
        weight_decay=0.0,
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg == "vq8":
        config.tokenizer.autoencoder.multipliers = (1, 2, 2, 4)
    return config
