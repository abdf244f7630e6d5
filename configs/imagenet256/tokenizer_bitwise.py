"""Infinity's multi-scale bitwise tokenizers (arXiv:2412.04431) for images of 256 px.

    python experiments/train.py --config=configs/imagenet256/tokenizer_bitwise.py:d32 \
        --workdir=runs/imagenet_bitwise_d32 --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012. Arguments
(``--config=...py:ARG``), d16 if none, of so many bits a cell of 16 x 16 pixels (d14_f8: of 8 x 8,
whose codes are of 2 x 2 cells, 56 bits):

    argument     parameters  published rFID and PSNR at 256 px
    d16         109,970,579  1.22, 20.9 dB
    d24         110,044,315  0.75, 22.0 dB
    d32         110,118,051  0.61, 22.7 dB
    d64         110,412,995  0.33, 24.9 dB
    d14_f8       81,624,209

Architecture: the builder and the quantiser of github.com/FoundationVision/Infinity. A recipe is not
published there. Data, optimiser and batch here are those of LlamaGen's tokenizer (tokenizer_vq.py),
and so are the losses but for the codebook's, which there is none of: mean squared error, LPIPS
(weight 1), commitment 0.25, PatchGAN from step 20,000 on; and an entropy term of 0.1, each bit sure
of an image and even over all.

Perceptual term: LPIPS with VGG16, whose trained weights are not part of this project. Without the
file the run is refused with the two addresses and the command that makes it (experiments/convert.py
--family=lpips --out=weights/lpips_vgg.npz); --config.objective.perceptual=0 trains without
(then better without --config.objective.adversarial.weight too: 0 is no discriminator).
"""

import ml_collections

SIZES = ("d16", "d24", "d32", "d64", "d14_f8")


def get_config(arg: str = "d16") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of tokenizer_bitwise.py is none of {SIZES}")
    bits, fine = int(arg[1:3]), arg == "d14_f8"
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
        name="multiscale_bitwise",
        scales=(1, 2, 4, 6, 8, 12, 16),
        patch=2 if fine else 1,
        entropy=True,
        entropy_group=1,
        autoencoder=dict(
            image_size=256,
            image_channels=3,
            latent=bits,
            code_width=bits,
            channels=128,
            multipliers=(1, 2, 4, 4) if fine else (1, 2, 4, 4, 4),
            encoder_blocks=2,
            decoder_blocks=3,
            attention=False,
            middle=True,
            groups=32,
            projection=0,
        ),
    )
    # Of a trained or a converted tokenizer to go on from; `optimizer.freeze` holds parts of it.
    config.init_from = dict(workdir="")
    config.objective = dict(name="tokenizer", l2=1.0, commitment=0.25, entropy=0.1)
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
    return config
