"""RAR's releases (arXiv:2411.00776, github.com/bytedance/1d-tokenizer).

Generators ``rar_b.bin`` ... ``rar_xxl.bin`` and MaskGIT's tokenizer
``maskgit-vqgan-imagenet-f16-256.bin``: plain state_dicts.

The position tables of a release have 1022 rows, and its step table 99, that nothing reads. They are
parameters of ours too (``spare_positions``, ``spare_steps``), so that a file comes back as it was.

Options, beside the fields that the tensors say:

    grid          codes a side; the square root of the codes that the tables are made for
    image_size    256, of the tokenizer
    anneal        (125000, 187500), the training steps between which random orders become raster
    dropout, attention_dropout, label_dropout     0.1 each
    norm_epsilon, groups     1e-6; 32, of the tokenizer
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.convert.part import Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import (
    Place,
    Places,
    Shape,
    Tensors,
    convolution,
    dense,
    fused,
    fused_bias,
    reshaped,
    same,
)
from ar_jax.schedules import as_grids

Shapes = Mapping[str, Shape]

# Rows of the official tables beyond the codes.
POSITION_ROWS, STEP_ROWS = 1024, 100
PREFIX = 2  # the class token and the condition
ANNEAL = (125_000, 187_500)
# (depth, width) -> guidance scale, its power and temperature behind the published FID.
SIZES = {
    (24, 768): (16.0, 2.75, 1.0),  # B
    (24, 1024): (15.5, 2.5, 1.02),  # L
    (32, 1280): (6.9, 1.5, 1.02),  # XL
    (40, 1408): (8.0, 1.2, 1.02),  # XXL
}
OTHER_SIZE = (4.0, 0.0, 1.0)  # constant: the official example
# Ours: gates, scales, shifts, of attention and MLP each. Official: shift, scale, gate of attention,
# then of the MLP.
OURS = np.array([2, 5, 1, 4, 0, 3])
OFFICIAL = np.argsort(OURS)


def unwrap_tokenizer(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tokenizer's state_dict inside a file."""
    return find_state_dict(container, ("model", "state_dict"), "quantize.embedding.weight")


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's state_dict inside a file."""
    return find_state_dict(container, ("model", "state_dict"), "target_aware_pos_embed")


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """The MaskGIT tokenizer that tensors of these shapes are; options: see above."""
    codes, code_width = shape_of(shapes, "quantize.embedding.weight")
    channels, image_channels = shape_of(shapes, "encoder.conv_in.weight")[:2]
    levels = _count(shapes, "encoder.down.{}.block.0.conv1.weight")
    multipliers = []
    for level in range(levels):
        width = shape_of(shapes, f"encoder.down.{level}.block.0.conv1.weight")[0]
        if width % channels:
            raise ValueError(
                f"level {level} of the encoder is {width} wide, which is no multiple of the first "
                f"convolution's {channels}"
            )
        multipliers.append(width // channels)
    found = dict(
        image_channels=image_channels,
        code_width=code_width,
        channels=channels,
        multipliers=tuple(multipliers),
        blocks=_count(shapes, "encoder.mid.{}.conv1.weight"),
    )
    autoencoder = {name: agree(name, value, options, "the file") for name, value in found.items()}
    section = dict(
        name="vq",
        codebook_size=agree("codebook_size", codes, options, "the codebook"),
        autoencoder=dict(
            name="pooled",
            image_size=options.get("image_size", 256),
            groups=options.get("groups", 32),
            **autoencoder,
        ),
    )
    return tokenizer_part({"tokenizer": section})


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of name 'vq' with a 'pooled' autoencoder."""
    section = config["tokenizer"]
    form = (section["name"], section["autoencoder"].get("name"))
    if form != ("vq", "pooled") or section.get("l2_norm"):
        raise ValueError(
            f"tokenizer.name and tokenizer.autoencoder.name are {form}; RAR's tokenizer is "
            "('vq', 'pooled'), without l2_norm"
        )
    places = _autoencoder(section["autoencoder"])
    places["quantize.embedding.weight"] = same("quantizer/codebook")
    return Part(section={"tokenizer": dict(section)}, places=places)


def _autoencoder(fields: Mapping[str, Any]) -> Places:
    channels, blocks = fields["channels"], fields.get("blocks", 2)
    widths = [channels * factor for factor in fields["multipliers"]]
    places: Places = {}

    def conv(key: str, ours: str, *, bias: bool) -> None:
        places[f"{key}.weight"] = convolution(f"autoencoder/{ours}/kernel")
        if bias:
            places[f"{key}.bias"] = same(f"autoencoder/{ours}/bias")

    def norm(key: str, ours: str) -> None:
        places[f"{key}.weight"] = same(f"autoencoder/{ours}/scale")
        places[f"{key}.bias"] = same(f"autoencoder/{ours}/bias")

    def block(key: str, ours: str, *, changes: bool) -> None:
        for i in (1, 2):
            norm(f"{key}.norm{i}", f"{ours}/norm{i}")
            conv(f"{key}.conv{i}", f"{ours}/conv{i}", bias=False)
        if changes:
            conv(f"{key}.nin_shortcut", f"{ours}/shortcut", bias=False)

    for side, levels in (("encoder", "down"), ("decoder", "up")):
        encoder = side == "encoder"
        conv(f"{side}.conv_in", f"{side}/conv_in", bias=not encoder)
        before = channels if encoder else widths[-1]
        for level in range(len(widths)) if encoder else range(len(widths) - 1, -1, -1):
            key, ours = f"{side}.{levels}.{level}", f"{side}/level{level}"
            for i in range(blocks):
                changes = before != widths[level]
                block(f"{key}.block.{i}", f"{ours}_block{i}", changes=changes)
                before = widths[level]
            if not encoder and level:
                conv(f"{key}.upsample_conv", f"{ours}_up", bias=True)
        for i in range(blocks):
            block(f"{side}.mid.{i}", f"{side}/middle_block{i}", changes=False)
        norm(f"{side}.norm_out", f"{side}/norm_out")
        conv(f"{side}.conv_out", f"{side}/conv_out", bias=True)
    return places


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    rows, width = shape_of(shapes, "pos_embed")[1:]
    steps = shape_of(shapes, "timesteps_embeddings")[1]
    grid = _grid(rows, steps, options)
    length = grid[0] * grid[1]
    vocabulary = shape_of(shapes, "lm_head.weight")[0]
    embeddings = shape_of(shapes, "embeddings.weight")[0]
    depth = _count(shapes, "blocks.{}.mlp.fc1.weight")
    if not depth:
        raise ValueError("tensor 'blocks.0.mlp.fc1.weight' is missing")
    heads = width // shape_of(shapes, "blocks.0.attn.q_norm.weight")[0]
    classes = embeddings - vocabulary - 2
    dropout = options.get("dropout", 0.1)
    backbone = dict(
        name="decoder",
        width=agree("width", width, options, "pos_embed"),
        depth=agree("depth", depth, options, "the number of blocks"),
        heads=agree("heads", heads, options, "blocks.0.attn.q_norm.weight"),
        num_classes=agree("num_classes", classes, options, "embeddings.weight"),
        context="codes",
        vocab_size=vocabulary,
        shared_embedding=True,
        start_row=True,
        positions="target_aware",
        spare_positions=rows - PREFIX - length,
        step_embedding=True,
        spare_steps=steps - (PREFIX - 1) - length,
        norm="affine_layernorm",
        norm_epsilon=options.get("norm_epsilon", 1e-6),
        modulation="own",
        qk_norm="layernorm",
        attention_bias="qkv",
        activation="gelu",
        mlp_bias=True,
        mlp_hidden=agree(
            "mlp_hidden", shape_of(shapes, "blocks.0.mlp.fc1.weight")[0], options, "fc1.weight"
        ),
        attention_dropout=options.get("attention_dropout", 0.1),
        residual_dropout=dropout,
        mlp_hidden_dropout=dropout,
        mlp_dropout=dropout,
        init_std=0.02,
        gate_init=0.0,
        modulation_init=0.0,
    )
    scale, power, temperature = SIZES.get((depth, width), OTHER_SIZE)
    side = grid[0] if grid[0] == grid[1] else grid
    section = dict(
        schedule=dict(name="random", grid=side, anneal=tuple(options.get("anneal", ANNEAL))),
        backbone=backbone,
        head=dict(
            name="categorical",
            vocab_size=agree("codebook_size", vocabulary, options, "lm_head.weight"),
            bias=True,
            init_std=0.02,
        ),
        objective=dict(name="likelihood", label_dropout=options.get("label_dropout", 0.1)),
        sampling=dict(
            temperature=temperature,
            guidance=dict(kind="power_cosine", scale=scale, power=power),
        ),
    )
    return generator_part(section)


def _grid(rows: int, steps: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """(rows, columns) of codes that tables of this many rows are for."""
    length = rows - POSITION_ROWS
    if "grid" in options:
        grid = as_grids([options["grid"]])[0]
        if PREFIX + grid[0] * grid[1] > rows or PREFIX - 1 + grid[0] * grid[1] > steps:
            raise ValueError(
                f"grid is {options['grid']!r}, more codes than pos_embed's {rows} and "
                f"timesteps_embeddings' {steps} rows are for"
            )
        return grid
    side = math.isqrt(max(length, 0))
    if length < 1 or steps - STEP_ROWS != length or side**2 != length:
        raise ValueError(
            f"pos_embed has {rows} rows and timesteps_embeddings {steps}: they are not "
            f"{POSITION_ROWS} and {STEP_ROWS} more than a square number of codes; give the option "
            "grid"
        )
    return side, side


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone = config["backbone"]
    wanted = dict(
        positions="target_aware",
        shared_embedding=True,
        start_row=True,
        step_embedding=True,
        norm="affine_layernorm",
        modulation="own",
        qk_norm="layernorm",
        attention_bias="qkv",
        mlp_bias=True,
    )
    for name, value in wanted.items():
        if backbone.get(name) != value:
            raise ValueError(
                f"backbone.{name} is {backbone.get(name)!r}; RAR's transformers have {value!r}"
            )
    width = backbone["width"]

    def table(ours: str) -> Place:
        return reshaped(f"backbone/{ours}", (-1, width), (1, -1, width))

    places: Places = {
        "cls_token": reshaped("backbone/start_row", (1, width), (1, 1, width)),
        "pos_embed": table("cell_positions/held"),
        "target_aware_pos_embed": table("cell_positions/predicted"),
        "timesteps_embeddings": table("step_embed"),
    }
    for i in range(backbone["depth"]):
        places |= _block(backbone, i)
    final = "backbone/final_modulation"
    places |= {
        "embeddings.weight": same("backbone/token_embed/embedding"),
        "adaln_before_head.adaLN_modulation.1.weight": dense(
            f"{final}/kernel", (width, 2, width), 1
        ),
        "adaln_before_head.adaLN_modulation.1.bias": reshaped(f"{final}/bias", (2, width), (-1,)),
        "lm_head.weight": dense("head/kernel"),
        "lm_head.bias": same("head/bias"),
    }
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(section={name: config[name] for name in sections if name in config}, places=places)


def _block(backbone: Mapping[str, Any], i: int) -> Places:
    width, heads = backbone["width"], backbone["heads"]
    head_width = width // heads
    key, root = f"blocks.{i}", "backbone/stack/blocks"
    attention = f"{root}/attention"
    places: Places = {}

    def affine(official: str, ours: str) -> None:
        places[f"{key}.{official}.weight"] = same(f"{ours}/scale", i)
        places[f"{key}.{official}.bias"] = same(f"{ours}/bias", i)

    affine("norm1", f"{root}/attention_norm")
    places |= {
        f"{key}.attn.qkv.weight": fused(attention, (width, heads, head_width), i),
        f"{key}.attn.qkv.bias": fused_bias(attention, (heads, head_width), i),
    }
    affine("attn.q_norm", f"{attention}/query_norm")
    affine("attn.k_norm", f"{attention}/key_norm")
    out = f"{attention}/out"
    places |= {
        f"{key}.attn.proj.weight": dense(f"{out}/kernel", (heads, head_width, width), 2, i),
        f"{key}.attn.proj.bias": same(f"{out}/bias", i),
    }
    affine("norm2", f"{root}/mlp_norm")
    places |= {
        f"{key}.mlp.fc1.weight": dense(f"{root}/mlp/up/kernel", layer=i),
        f"{key}.mlp.fc1.bias": same(f"{root}/mlp/up/bias", i),
        f"{key}.mlp.fc2.weight": dense(f"{root}/mlp/down/kernel", layer=i),
        f"{key}.mlp.fc2.bias": same(f"{root}/mlp/down/bias", i),
        f"{key}.adaLN_modulation.1.weight": Place(
            (f"{root}/modulation/kernel",),
            lambda a: a.T.reshape(-1, 6, width)[:, OURS],
            lambda a: a[:, OFFICIAL].reshape(-1, 6 * width).T,
            i,
        ),
        f"{key}.adaLN_modulation.1.bias": Place(
            (f"{root}/modulation/bias",),
            lambda a: a.reshape(6, width)[OURS],
            lambda a: a[OFFICIAL].reshape(-1),
            i,
        ),
    }
    return places


def _count(shapes: Shapes, key: str) -> int:
    """How many of the keys with 0, 1, ... in them there are."""
    return next(i for i in itertools.count() if key.format(i) not in shapes)
