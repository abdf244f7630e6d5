"""RAR (arXiv:2411.00776): next-token prediction trained in random orders, ImageNet, 256 px.

    python experiments/train.py --config=configs/imagenet256/rar.py:b \
        --workdir=runs/rar_b --config.tokenizer_checkpoint=runs/imagenet_maskgit \
        --config.data.source=folder:data/imagenet

The folder holds train/<class>/ and val/<class>/ with the images of ILSVRC2012; the tokenizer is
that of tokenizer_maskgit.py. Arguments (``--config=...py:ARG``), b if none:

    argument     parameters  published FID  guidance: scale, power  temperature
    b           260,923,648           1.95              16.0, 2.75         1.0
    l           461,668,352           1.70              15.5, 2.5          1.02
    xl          955,425,024           1.50               6.9, 1.5          1.02
    xxl       1,498,520,704           1.48               8.0, 1.2          1.02

Recipe: configs/training/generator/rar.yaml of github.com/bytedance/1d-tokenizer, 250,000 steps of
2048 images (400 epochs), every sample in a random order until step 125,000, none from step 187,500
on; no averaging of the weights. The counts hold 1022 rows of each position table and 99 of the step
table that nothing reads, as the released files do. What differs here:

    - The official run reads codes made beforehand of centre crops, plain and mirrored. Here each
      visit mirrors the centre crop half of the time and tokenises it. For cached codes
      (experiments/cache_codes.py --copies=2) add
      ``--config.data.source=codes:DIR --config.data.crop=none --config.data.flip=False``.
    - Blocks of xl and xxl are rematerialised (``--config.backbone.remat=none`` where memory
      allows); xxl splits its parameters over all devices.
"""

import ml_collections

SIZES = ("b", "l", "xl", "xxl")

WIDTH = {"b": 768, "l": 1024, "xl": 1280, "xxl": 1408}
DEPTH = {"b": 24, "l": 24, "xl": 32, "xxl": 40}
MLP_HIDDEN = {"b": 3072, "l": 4096, "xl": 5120, "xxl": 6144}
GUIDANCE = {"b": (16.0, 2.75), "l": (15.5, 2.5), "xl": (6.9, 1.5), "xxl": (8.0, 1.2)}
TEMPERATURE = {"b": 1.0, "l": 1.02, "xl": 1.02, "xxl": 1.02}


def get_config(arg: str = "b") -> ml_collections.ConfigDict:
    """The configuration of size ``arg``."""
    if arg not in SIZES:
        raise ValueError(f"argument {arg!r} of rar.py is none of {SIZES}")
    config = ml_collections.ConfigDict()
    config.seed = 42
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
        name="vq",
        codebook_size=1024,
        l2_norm=False,
        autoencoder=dict(
            name="pooled",
            image_size=256,
            image_channels=3,
            code_width=256,
            channels=128,
            multipliers=(1, 1, 2, 2, 4),
            blocks=2,
            groups=32,
        ),
    )
    config.schedule = dict(name="random", grid=16, anneal=(125_000, 187_500))
    config.backbone = dict(
        name="decoder",
        width=WIDTH[arg],
        depth=DEPTH[arg],
        heads=16,
        num_classes=1000,
        context="codes",
        vocab_size=1024,
        shared_embedding=True,
        start_row=True,
        positions="target_aware",
        spare_positions=1022,
        step_embedding=True,
        spare_steps=99,
        norm="affine_layernorm",
        norm_epsilon=1e-6,
        modulation="own",
        qk_norm="layernorm",
        attention_bias="qkv",
        activation="gelu",
        mlp_bias=True,
        mlp_hidden=MLP_HIDDEN[arg],
        attention_dropout=0.1,
        residual_dropout=0.1,
        mlp_hidden_dropout=0.1,
        mlp_dropout=0.1,
        init_std=0.02,
        gate_init=0.0,
        modulation_init=0.0,
        remat="none" if arg in ("b", "l") else "block",
    )
    config.head = dict(name="categorical", vocab_size=1024, bias=True, init_std=0.02)
    config.objective = dict(name="likelihood", label_dropout=0.1)
    scale, power = GUIDANCE[arg]
    config.sampling = dict(
        temperature=TEMPERATURE[arg],
        top_k=0,
        top_p=0.0,
        min_p=0.0,
        guidance=dict(scale=scale, kind="power_cosine", power=power),
    )
    config.train = dict(
        steps=250_000,
        batch_size=2048,
        log_every=100,
        eval_every=5_000,
        preview_every=5_000,
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
        warmup_steps=62_500,
        end_ratio=1e-5 / 4e-4,
        b1=0.9,
        b2=0.96,
        eps=1e-8,
        weight_decay=0.03,
        # All tables and the last adaptive norm: what the official rule of names spares.
        no_decay=("_embed/", "step_embed", "cell_positions", "final_modulation"),
        clip_norm=1.0,
    )
    config.ema = dict(decay=0.0)
    config.mesh = dict(data=-1, fsdp=1, tensor=1, slices=1)
    if arg == "xxl":
        config.mesh.update(data=1, fsdp=-1)
    return config
