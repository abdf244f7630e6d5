"""Infinity's transformers: ``infinity_2b_reg.pth``, a state_dict, and files of its trainer.

Options, beside the fields that the tensors say:

    image_size, downsample    256 and, of the tokenizer, 16: they say the scales of a square image
    scales            any others, of codes: of Infinity's patches a code has two by two cells
    reference_grid    of the rotary positions: (64, 64), the last of Infinity's square scales, or
                      with other scales than its own the last of these
    caption_length    rows of a caption that are read at most: as many as cfg_uncond has
    norm_epsilon, drop_path, label_dropout, bit_flips    1e-6, 0.1, 0.1, 0.3

Blocks lie in chunks, in as many as the official sizes have when ours are written and in one, which
has names of its own, for any other size.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.convert.part import Buffer, Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Places, Tensors, dense, fused, reshaped, same
from ar_jax.convert.var import block_places, modulation_places
from ar_jax.convert.vqgan import Shapes
from ar_jax.schedules import as_grids

SCALES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)  # of square images, up to 1024 pixels
SCALE_ROWS = 15  # of the official table
CONTAINERS = ("trainer.gpt_fsdp", "trainer.gpt_ema_fsdp")
# (depth, width) of the official sizes -> chunks of their blocks.
CHUNKS = {
    (12, 768): 4,
    (16, 1152): 4,
    (24, 1536): 4,
    (32, 2048): 8,
    (32, 2080): 4,
    (40, 2688): 4,
    (40, 3584): 8,
    (48, 3360): 4,
}
# Sampling of the official scripts.
SAMPLING = dict(temperature=0.5, top_k=900, top_p=0.97, guidance=dict(scale=4.0, kind="constant"))
LEFTOVERS = (
    *("lvl_1L", "attn_bias_for_masking", "Infinity_visible_kvlen", "Infinity_invisible_qlen"),
)


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's state_dict inside a file."""
    return find_state_dict(container, CONTAINERS, "cfg_uncond")


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    null_rows, features = shape_of(shapes, "cfg_uncond")
    keys = block_keys(shapes)
    pool_heads, pool_width = shape_of(shapes, "text_proj_for_sos.ca.mat_q")[1:]
    width, fed = shape_of(shapes, "word_embed.weight")
    cosine = f"{keys[0]}.sa.scale_mul_1H11" in shapes
    heads = shapes[f"{keys[0]}.sa.scale_mul_1H11"][1] if cosine else None
    if pool_heads * pool_width != width:
        raise ValueError(
            f"text_proj_for_sos.ca.mat_q has {pool_heads} heads of {pool_width}, which are not the "
            f"{width} numbers of word_embed.weight"
        )
    scales, reference = _scales(options)
    count, rows = len(scales), shape_of(shapes, "lvl_embed.weight")[0]
    if count > rows:
        raise ValueError(f"there are {count} scales, but lvl_embed.weight has {rows} rows")
    backbone = dict(
        name="cross_decoder",
        width=agree("width", width, options, "word_embed.weight"),
        depth=agree("depth", len(keys), options, "the number of blocks"),
        heads=agree("heads", heads, options, f"{keys[0]}.sa.scale_mul_1H11"),
        condition="text",
        caption_length=options.get("caption_length", null_rows),
        caption_features=agree("caption_features", features, options, "cfg_uncond"),
        caption_null_rows=null_rows,
        pool_heads=pool_heads,
        feature_width=fed,
        reference_grid=reference,
        spare_scales=rows - count,
        norm_epsilon=options.get("norm_epsilon", 1e-6),
        modulation="shared" if "shared_ada_lin.1.weight" in shapes else "own",
        qk_norm="cosine" if cosine else "none",
        cross_gate=f"{keys[0]}.ca_gamma" in shapes,
        activation="gelu_tanh",
        mlp_hidden=shape_of(shapes, f"{keys[0]}.ffn.fc1.weight")[0],
        drop_path=options.get("drop_path", 0.1),
    )
    bits = shape_of(shapes, "head.weight")[0] // 2
    section = dict(
        schedule=dict(name="next_scale", scales=scales),
        backbone=backbone,
        head=dict(name="bitwise", bits=bits, bias=True, init_std=0.02 * (3 * width) ** -0.5),
        objective=dict(
            name="likelihood",
            label_dropout=options.get("label_dropout", 0.1),
            bit_flips=options.get("bit_flips", 0.3),
            balance_scales=True,
        ),
        sampling=SAMPLING,
    )
    return _part(section, keys)


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone, head = config["backbone"], config["head"]
    for axis, section, wanted in (
        ("backbone", backbone, {"name": "cross_decoder", "condition": "text"}),
        ("head", head, {"name": "bitwise"}),
    ):
        for name, value in wanted.items():
            if section.get(name) != value:
                raise ValueError(
                    f"{axis}.{name} is {section.get(name)!r}; Infinity's transformers have "
                    f"{value!r}"
                )
    depth = backbone["depth"]
    chunks = CHUNKS.get((depth, backbone["width"]), 1)
    return _part(config, chunk_keys(depth, chunks))


def block_keys(shapes: Shapes) -> list[str]:
    """What the names of every block's tensors begin with, in the order of the blocks."""
    found = set()
    for key in shapes:
        if match := re.match(r"(block_chunks\.(\d+)\.module|blocks)\.(\d+)\.sa\.", key):
            found.add((int(match[2] or 0), int(match[3]), f"{match[1]}.{match[3]}"))
    if not found:
        raise ValueError("there are no blocks: no tensor 'blocks.0.sa...' or 'block_chunks.0...'")
    return [key for *_, key in sorted(found)]


def chunk_keys(depth: int, chunks: int) -> list[str]:
    """As `block_keys`, of blocks in chunks of one size."""
    if chunks == 1:
        return [f"blocks.{i}" for i in range(depth)]
    size = depth // chunks
    return [f"block_chunks.{i // size}.module.{i % size}" for i in range(depth)]


def _scales(options: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[int, int] | None]:
    """(scales, reference grid)."""
    said, reference = options.get("scales"), options.get("reference_grid")
    size, cell = as_grids([options.get("image_size", 256)])[0], options.get("downsample", 16)
    if said is None:
        side = size[0] // cell
        if size[0] != size[1] or side not in SCALES:
            raise ValueError(
                f"image_size is {size}, which are {size[0] // cell}x{size[1] // cell} codes, not "
                "the last of Infinity's square scales: give the option scales"
            )
        said = SCALES[: SCALES.index(side) + 1]
    if reference is None and as_grids(said) == as_grids(SCALES[: len(said)]):
        reference = (SCALES[-1], SCALES[-1])
    return tuple(said), None if reference is None else tuple(reference)


def _part(config: Mapping[str, Any], keys: list[str]) -> Part:
    """``keys``: see `block_keys`."""
    backbone = config["backbone"]
    width, features, pool = (backbone[k] for k in ("width", "caption_features", "pool_heads"))
    reader, attention = "backbone/reader", "backbone/reader/pool_attention"
    heads = (pool, width // pool)
    places: Places = {
        "cfg_uncond": same("backbone/condition/null_caption"),
        "pos_start": reshaped("backbone/position_start", (-1, width), (1, -1, width)),
        "text_norm.weight": same(f"{reader}/norm/scale"),
        "text_proj_for_sos.ca.mat_q": reshaped(f"{attention}/learned_query", heads, (1, *heads)),
        "text_proj_for_sos.ca.v_bias": reshaped(f"{attention}/value/bias", heads, (-1,)),
        "text_proj_for_sos.ca.mat_kv.weight": fused(
            attention, (features, *heads), names=("key", "value")
        ),
        "text_proj_for_sos.ca.proj.weight": dense(f"{attention}/out/kernel", (*heads, width), 2),
        "text_proj_for_sos.ca.proj.bias": same(f"{attention}/out/bias"),
        "text_proj_for_ca.0.weight": dense(f"{reader}/caption_up/kernel"),
        "text_proj_for_ca.0.bias": same(f"{reader}/caption_up/bias"),
        "text_proj_for_ca.2.weight": dense(f"{reader}/caption_down/kernel"),
        "text_proj_for_ca.2.bias": same(f"{reader}/caption_down/bias"),
        "lvl_embed.weight": same("backbone/scale_embed"),
        "word_embed.weight": dense("backbone/token_embed/kernel"),
        "word_embed.bias": same("backbone/token_embed/bias"),
    }
    if backbone.get("modulation", "shared") == "shared":
        places |= modulation_places("shared_ada_lin.1", "backbone/shared_modulation", 6, width)
    places |= modulation_places("head_nm.ada_lin.1", "backbone/final_modulation", 2, width)
    places |= {
        "head.weight": dense("head/bit/kernel"),
        "head.bias": same("head/bit/bias"),
    }
    for i, key in enumerate(keys):
        places |= block_places(backbone, key, i, attention="sa") | _cross(backbone, key, i)
    zeros = functools.partial(np.zeros, width, np.float32)
    bias = Buffer(shape=(width,), make=zeros, computed=True)
    holders = ["text_proj_for_sos.ca", *(f"{key}.{part}" for key in keys for part in ("sa", "ca"))]
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        buffers={f"{holder}.zero_k_bias": bias for holder in holders},
        leftovers=LEFTOVERS,
    )


def _cross(backbone: Mapping[str, Any], key: str, i: int) -> Places:
    """The attention of a block to the text."""
    width, root = backbone["width"], "backbone/stack/blocks"
    heads = (backbone["heads"], width // backbone["heads"])
    ours = f"{root}/cross_attention"
    places = {
        f"{key}.ca.mat_q.weight": dense(f"{ours}/query/kernel", (width, *heads), 1, i),
        f"{key}.ca.mat_q.bias": reshaped(f"{ours}/query/bias", heads, (-1,), i),
        f"{key}.ca.mat_kv.weight": fused(ours, (width, *heads), i, names=("key", "value")),
        f"{key}.ca.v_bias": reshaped(f"{ours}/value/bias", heads, (-1,), i),
        f"{key}.ca.proj.weight": dense(f"{ours}/out/kernel", (*heads, width), 2, i),
        f"{key}.ca.proj.bias": same(f"{ours}/out/bias", i),
        f"{key}.ca_norm.weight": same(f"{root}/cross_norm/scale", i),
        f"{key}.ca_norm.bias": same(f"{root}/cross_norm/bias", i),
    }
    if backbone.get("cross_gate"):
        places[f"{key}.ca_gamma"] = same(f"{root}/cross_gate", i)
    return places
