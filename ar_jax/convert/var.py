"""VAR's releases (arXiv:2404.02905, github.com/FoundationVision/VAR): tokenizer and transformers.

``vae_ch160v4096z32.pth`` and ``var_d16.pth`` ... are plain state_dicts. Files of the official
trainer, ``ar-ckpt-*.pth``, hold both under 'trainer' and are taken too.

Options, beside the fields that the tensors say:

    scales        (1, 2, 3, ...), those that the transformer's lvl_1L numbers; without it the
                  official ones of 256, 512 or 1024 pixels, if they fit the transformer's tables
    image_size    256 unless the scales say otherwise
    heads         where a transformer without cosine attention does not say and has no official size
    phi_ratio, l2_norm, groups     of the tokenizer: 0.5, False, 32
    norm_epsilon, drop_path, label_dropout     1e-6, 0.1 depth / 24, 0.1
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.convert.part import Buffer, Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Places, Tensors, convolution, dense, fused, reshaped, same
from ar_jax.convert.vqgan import LDM, Shapes, autoencoder_places, read_autoencoder
from ar_jax.schedules import as_grids

STYLE = dataclasses.replace(LDM, fused=True)
# Scales of the official command line for each image size.
SCALES = {
    256: (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
    512: (1, 2, 3, 4, 6, 9, 13, 18, 24, 32),
    1024: (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64),
}
OFFICIAL_DEPTHS = (16, 20, 24, 30, 36)  # all of width 64 depth, with as many heads as blocks
# Sampling behind the published FIDs; the guidance grows from 0 to 1.5 over the scales.
SAMPLING = dict(
    temperature=1.0,
    top_k=900,
    top_p=0.96,
    guidance=dict(scale=1.5, kind="linear_excess"),
)


def unwrap_tokenizer(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tokenizer's state_dict inside a file."""
    return find_state_dict(container, ("trainer.vae_local",), "quantize.embedding.weight")


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's state_dict inside a file."""
    return find_state_dict(container, ("trainer.var_wo_ddp",), "pos_1LC")


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """The multi-scale tokenizer that tensors of these shapes are; options: see above."""
    codebook = shape_of(shapes, "quantize.embedding.weight")
    size = 2 ** (read_levels(shapes) - 1)
    scales = options.get("scales") or SCALES.get(options.get("image_size", 256))
    if scales is None:
        raise ValueError(
            f"image_size {options['image_size']} has no scales of its own: give the option scales"
        )
    grid = as_grids(scales)[-1]
    side = grid[0] * size if grid[0] == grid[1] else (grid[0] * size, grid[1] * size)
    image_size = agree("image_size", side, options, f"the last scale {grid}")
    phis, ratio = _phis(shapes), options.get("phi_ratio", 0.5)
    if phis is None:  # the official code has no convolutions at a ratio of zero
        phis, ratio = options.get("phis", 4), agree("phi_ratio", 0.0, options, "the file")
    phis = agree("phis", phis, options, "the file")
    section = dict(
        name="multiscale_vq",
        scales=tuple(scales),
        codebook_size=agree("codebook_size", codebook[0], options, "the codebook"),
        phis=phis,
        phi_ratio=ratio,
        l2_norm=options.get("l2_norm", False),
        autoencoder=read_autoencoder(shapes, STYLE, {**options, "image_size": image_size}),
    )
    return tokenizer_part({"tokenizer": section})


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of name 'multiscale_vq'."""
    section = config["tokenizer"]
    if section["name"] != "multiscale_vq":
        raise ValueError(f"tokenizer.name is {section['name']!r}, which is no tokenizer of VAR's")
    places = autoencoder_places(section["autoencoder"], STYLE)
    places["quantize.embedding.weight"] = same("quantizer/codebook")
    phis, scales = section.get("phis", 4), len(section["scales"])
    for i in range((phis or scales) if section.get("phi_ratio", 0.5) else 0):
        name = {0: f"{i}", 1: "qresi"}.get(phis, f"qresi_ls.{i}")
        key, ours = f"quantize.quant_resi.{name}", f"quantizer/phi_{i}"
        places[f"{key}.weight"] = convolution(f"{ours}/kernel")
        places[f"{key}.bias"] = same(f"{ours}/bias")
    shape = (scales, section["codebook_size"])
    hits = Buffer(
        shape=shape,
        made_by=f"the scales {tuple(section['scales'])}",
        make=functools.partial(np.zeros, shape, np.float32),
    )
    return Part(
        section={"tokenizer": dict(section)},
        places=places,
        buffers={"quantize.ema_vocab_hit_SV": hits},
    )


def generator(shapes: Shapes, options: Mapping[str, Any], tensors: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above.

    Args:
        tensors: whose 'lvl_1L', if it is there and filled, says the scales.
    """
    _, length, width = shape_of(shapes, "pos_1LC")
    classes = shape_of(shapes, "class_emb.weight")[0] - 1
    depth = next(i for i in itertools.count() if f"blocks.{i}.ffn.fc1.weight" not in shapes)
    cosine = "blocks.0.attn.scale_mul_1H11" in shapes
    heads = shapes["blocks.0.attn.scale_mul_1H11"][1] if cosine else None
    if heads is None and "heads" not in options:
        if depth not in OFFICIAL_DEPTHS or width != 64 * depth:
            raise ValueError(
                f"{depth} blocks of width {width} are no official size, and without cosine "
                "attention the tensors do not say the number of heads: give it with --heads=N"
            )
        heads = depth
    heads = agree("heads", heads, options, "blocks.0.attn.scale_mul_1H11")
    count = shape_of(shapes, "lvl_embed.weight")[0]
    cells = _cells((tensors or {}).get("lvl_1L"), length, count)
    scales = _scales(length, count, cells, options)
    vocabulary = shape_of(shapes, "head.weight")[0]
    backbone = dict(
        name="decoder",
        width=agree("width", width, options, "pos_1LC"),
        depth=agree("depth", depth, options, "the number of blocks"),
        heads=heads,
        num_classes=agree("num_classes", classes, options, "class_emb.weight"),
        context="features",
        feature_width=shape_of(shapes, "word_embed.weight")[1],
        positions="learned",
        norm="layernorm",
        norm_epsilon=options.get("norm_epsilon", 1e-6),
        modulation="shared" if "shared_ada_lin.1.weight" in shapes else "own",
        qk_norm="cosine" if cosine else "none",
        logit_scale=0.25 * (width // heads) ** -0.5,  # without cosine attention
        attention_bias="qv",
        activation="gelu_tanh",
        mlp_bias=True,
        mlp_hidden=shape_of(shapes, "blocks.0.ffn.fc1.weight")[0],
        drop_path=options.get("drop_path", 0.1 * depth / 24),
        depth_scaled_init=True,
    )
    section = dict(
        schedule=dict(name="next_scale", scales=scales),
        backbone=backbone,
        head=dict(
            name="categorical",
            vocab_size=agree("codebook_size", vocabulary, options, "head.weight"),
            bias=True,
            init_std=0.02 * (3 * width) ** -0.5,
        ),
        objective=dict(name="likelihood", label_dropout=options.get("label_dropout", 0.1)),
        sampling=SAMPLING,
    )
    return generator_part(section)


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone = config["backbone"]
    wanted = dict(positions="learned", norm="layernorm", attention_bias="qv", mlp_bias=True)
    for name, value in wanted.items():
        if backbone.get(name) != value:
            raise ValueError(
                f"backbone.{name} is {backbone.get(name)!r}; VAR's transformers have {value!r}"
            )
    width = backbone["width"]
    shared = backbone["modulation"] == "shared"
    places: Places = {
        "pos_start": reshaped("backbone/position_start", (-1, width), (1, -1, width)),
        "pos_1LC": reshaped("backbone/position", (-1, width), (1, -1, width)),
        "word_embed.weight": dense("backbone/token_embed/kernel"),
        "word_embed.bias": same("backbone/token_embed/bias"),
        "class_emb.weight": same("backbone/condition/class_embed/embedding"),
        "lvl_embed.weight": same("backbone/scale_embed"),
    }
    if shared:
        places |= modulation_places("shared_ada_lin.1", "backbone/shared_modulation", 6, width)
    for i in range(backbone["depth"]):
        places |= block_places(backbone, f"blocks.{i}", i)
    places |= modulation_places("head_nm.ada_lin.1", "backbone/final_modulation", 2, width)
    places |= {"head.weight": dense("head/kernel"), "head.bias": same("head/bias")}
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        buffers=_buffers(config),
    )


def block_places(
    backbone: Mapping[str, Any], key: str, i: int, *, attention: str = "attn"
) -> Places:
    """Of block ``i``, whose names begin with ``key``; ``attention`` is that module's name."""
    width, heads = backbone["width"], backbone["heads"]
    head_width = width // heads
    root, held = "backbone/stack/blocks", f"{key}.{attention}"
    ours = f"{root}/attention"
    places: Places = {}
    if backbone["modulation"] == "shared":
        table = reshaped(f"{root}/modulation_table", (6, width), (1, 1, 6, width), i)
        places[f"{key}.ada_gss"] = table
    if backbone["qk_norm"] == "cosine":
        log_scale = reshaped(f"{ours}/log_scale", (heads,), (1, heads, 1, 1), i)
        places[f"{held}.scale_mul_1H11"] = log_scale
    for bias, name in (("q_bias", "query"), ("v_bias", "value")):
        place = reshaped(f"{ours}/{name}/bias", (heads, head_width), (-1,), i)
        places[f"{held}.{bias}"] = place
    places |= {
        f"{held}.mat_qkv.weight": fused(ours, (width, heads, head_width), i),
        f"{held}.proj.weight": dense(f"{ours}/out/kernel", (heads, head_width, width), 2, i),
        f"{held}.proj.bias": same(f"{ours}/out/bias", i),
        f"{key}.ffn.fc1.weight": dense(f"{root}/mlp/up/kernel", layer=i),
        f"{key}.ffn.fc1.bias": same(f"{root}/mlp/up/bias", i),
        f"{key}.ffn.fc2.weight": dense(f"{root}/mlp/down/kernel", layer=i),
        f"{key}.ffn.fc2.bias": same(f"{root}/mlp/down/bias", i),
    }
    if backbone["modulation"] == "own":
        places |= modulation_places(f"{key}.ada_lin.1", f"{root}/modulation", 6, width, i)
    return places


def modulation_places(
    key: str, ours: str, vectors: int, width: int, layer: int | None = None
) -> Places:
    """Of the linear layer that makes ``vectors`` of a condition."""
    return {
        f"{key}.weight": dense(f"{ours}/kernel", (width, vectors, width), 1, layer),
        f"{key}.bias": reshaped(f"{ours}/bias", (vectors, width), (-1,), layer),
    }


def _buffers(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the official code computes itself and keeps in the file all the same."""
    grids = as_grids(config["schedule"]["scales"])
    step_id = np.repeat(np.arange(len(grids)), [rows * columns for rows, columns in grids])

    def mask() -> np.ndarray:
        visible = step_id[:, None] >= step_id[None]
        return np.where(visible, np.float32(0), -np.float32(np.inf))[None, None]

    length, width = len(step_id), config["backbone"]["width"]
    by_scales = functools.partial(
        Buffer, made_by=f"the scales {tuple(config['schedule']['scales'])}", computed=True
    )
    buffers = {
        "lvl_1L": by_scales(shape=(1, length), make=lambda: step_id[None].astype(np.int64)),
        "attn_bias_for_masking": by_scales(shape=(1, 1, length, length), make=mask),
    }
    zeros = functools.partial(np.zeros, width, np.float32)
    for i in range(config["backbone"]["depth"]):
        bias = Buffer(shape=(width,), make=zeros, computed=True)
        buffers[f"blocks.{i}.attn.zero_k_bias"] = bias
    return buffers


def _cells(level: np.ndarray | None, length: int, count: int) -> list[int] | None:
    """Positions on every scale, as the buffer 'lvl_1L' numbers them; None where it does not say.

    Zeros alone for more than one scale are no numbering: a buffer that was never filled.
    """
    if level is None or (count > 1 and not np.any(level)):
        return None
    numbers = np.asarray(level).reshape(-1).astype(np.int64)
    steps = np.diff(numbers, prepend=0)
    if len(numbers) != length or not np.isin(steps, (0, 1)).all() or numbers[-1] != count - 1:
        raise ValueError(
            f"'lvl_1L' does not number the {length} positions of pos_1LC by the {count} scales of "
            "lvl_embed.weight, one after the other"
        )
    return np.bincount(numbers).tolist()


def _scales(
    length: int, count: int, cells: list[int] | None, options: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The scales of a transformer with ``length`` positions on ``count`` scales; see `_cells`."""
    said = options.get("scales")
    known = {size: scales for size, scales in SCALES.items() if _fits(scales, length, count)}
    if said is None and cells is not None:
        sides = tuple(math.isqrt(n) for n in cells)
        if [side**2 for side in sides] != cells:
            raise ValueError(
                f"'lvl_1L' numbers {cells} positions on the scales, which are no squares: give the "
                "option scales, as --option=scales=((1,2),(2,4))"
            )
        return sides
    if said is None:
        if "image_size" in options:
            known = {s: scales for s, scales in known.items() if s == options["image_size"]}
        if not known:
            raise ValueError(
                f"the file has {length} positions on {count} scales, which are not the official "
                f"ones of image_size {options.get('image_size', '256, 512 or 1024')}: give the "
                "option scales"
            )
        return next(iter(known.values()))
    if not _fits(said, length, count):
        raise ValueError(
            f"scales is {tuple(said)}, but pos_1LC has {length} positions and lvl_embed.weight "
            f"{count} scales"
        )
    found = [rows * columns for rows, columns in as_grids(said)]
    if cells is not None and found != cells:
        raise ValueError(
            f"scales is {tuple(said)}, which have {found} positions, but 'lvl_1L' numbers {cells}"
        )
    return tuple(said)


def _fits(scales: Any, length: int, count: int) -> bool:
    grids = as_grids(scales)
    return len(grids) == count and sum(rows * columns for rows, columns in grids) == length


def _phis(shapes: Shapes) -> int | None:
    """Our field 'phis': 1 one for all scales, 0 one for each, else their number; None: no phi."""
    root = "quantize.quant_resi"
    if f"{root}.qresi.weight" in shapes:
        return 1
    if f"{root}.0.weight" in shapes:
        return 0
    count = next(i for i in itertools.count() if f"{root}.qresi_ls.{i}.weight" not in shapes)
    return count or None


def read_levels(shapes: Shapes) -> int:
    """Resolutions of the autoencoder."""
    return next(
        i for i in itertools.count() if f"encoder.down.{i}.block.0.conv1.weight" not in shapes
    )
