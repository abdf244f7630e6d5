"""LlamaGen's releases (arXiv:2406.06525, github.com/FoundationVision/LlamaGen).

Tokenizers ``vq_ds16_c2i.pt`` and ``vq_ds8_c2i.pt``, class-conditional ``c2i_B_256.pt`` to
``c2i_3B_384.pt``, text-conditional ``t2i_XL_stage1_256.pt``. The state_dict lies under 'model', or
at the top (XXL and 3B).

Options, beside the fields that the tensors say:

    image_size    256; 384 for class-conditional XL, XXL and 3B, which were released at 384 only
    downsample    image pixels a code spans: 16 (8 for VQ-8)
    grid          codes a side, in place of image_size / downsample
    heads         where the size is none of the releases'
    norm_epsilon, rope_base, label_dropout     1e-5, 10000, 0.1
    null_class    whether the class table ends with the null class: True, unless num_classes is
                  the number of its rows or label_dropout is 0
    caption_length     rows of the prefix of a text model: those of uncond_embedding
    l2_norm, entropy, groups                   of the tokenizer: True, False, 32
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.convert.part import Buffer, Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Places, Tensors, dense, fused, same
from ar_jax.convert.vqgan import (
    Shapes,
    Style,
    autoencoder_places,
    read_autoencoder,
)

STYLE = Style(
    encoder="encoder.conv_blocks.{level}",
    decoder="decoder.conv_blocks.{depth}",
    block="res.{index}",
    middle=("mid.0", "mid.1", "mid.2"),
    fused=False,
)
CONTAINERS = ("model", "module", "state_dict")
USAGE_ENTRIES = 65_536  # of the official code's usage statistic

# (depth, width) of the official sizes -> heads, image size of the class-conditional release and
# the guidance behind its FID.
SIZES = {
    (12, 768): (12, 256, 2.0),  # B
    (24, 1024): (16, 256, 2.0),  # L
    (36, 1280): (20, 384, 1.75),  # XL
    (48, 1536): (24, 384, 1.75),  # XXL
    (24, 3200): (32, 384, 1.65),  # 3B
    (22, 2048): (32, 384, 1.75),  # 1B, XXXL and 7B: official sizes without a release
    (48, 2560): (40, 384, 1.75),
    (32, 4096): (32, 384, 1.75),
}
PLAIN = ((48, 1536), (24, 3200))  # XXL and 3B, whose files are state_dicts without a container
TEXT_GUIDANCE, TEXT_TOP_K = 7.5, 1000  # of the official demo


def unwrap_tokenizer(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tokenizer's state_dict inside a file."""
    return find_state_dict(container, CONTAINERS, "quantize.embedding.weight")


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's state_dict inside a file."""
    return find_state_dict(container, CONTAINERS, "tok_embeddings.weight")


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """The tokenizer that tensors of these shapes are; options: see above."""
    codes = shape_of(shapes, "quantize.embedding.weight")[0]
    autoencoder = read_autoencoder(shapes, STYLE, {"image_size": 256, **options})
    agree("downsample", 2 ** (len(autoencoder["multipliers"]) - 1), options, "the file")
    section = dict(
        name="vq",
        codebook_size=agree("codebook_size", codes, options, "the codebook"),
        l2_norm=options.get("l2_norm", True),
        entropy=options.get("entropy", False),
        autoencoder=autoencoder,
    )
    return tokenizer_part({"tokenizer": section})


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of name 'vq'."""
    section = config["tokenizer"]
    if section["name"] != "vq":
        raise ValueError(f"tokenizer.name is {section['name']!r}, which is none of LlamaGen's")
    places = autoencoder_places(section["autoencoder"], STYLE)
    places["quantize.embedding.weight"] = same("quantizer/codebook")
    usage = Buffer(
        shape=(USAGE_ENTRIES,), make=functools.partial(np.zeros, USAGE_ENTRIES, np.float32)
    )
    return Part(
        section={"tokenizer": dict(section)},
        places=places,
        buffers={"quantize.codebook_used": usage},
        container=("model",),
    )


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    vocabulary, width = shape_of(shapes, "tok_embeddings.weight")
    depth = next(i for i in itertools.count() if f"layers.{i}.attention.wo.weight" not in shapes)
    if not depth:
        raise ValueError("tensor 'layers.0.attention.wo.weight' is missing")
    heads, image_size, guidance = SIZES.get((depth, width), (None, 256, 2.0))
    if heads is None and "heads" not in options:
        raise ValueError(
            f"{depth} layers of width {width} are no official size, and the tensors do not say "
            "the number of heads: give the option heads (--heads=N)"
        )
    heads = options.get("heads", heads)
    if width % heads:
        raise ValueError(f"heads is {heads}, which does not divide the width {width}")
    backbone = dict(
        name="decoder",
        width=agree("width", width, options, "tok_embeddings.weight"),
        depth=agree("depth", depth, options, "the number of layers"),
        heads=heads,
        context="codes",
        vocab_size=agree("codebook_size", vocabulary, options, "tok_embeddings.weight"),
        positions="rope",
        rope_base=float(options.get("rope_base", 10_000)),
        norm="rmsnorm",
        norm_epsilon=options.get("norm_epsilon", 1e-5),
        activation="silu",
        gated=True,
        mlp_hidden=shape_of(shapes, "layers.0.feed_forward.w1.weight")[0],
        token_dropout=0.1,
        residual_dropout=0.1,
        mlp_dropout=0.1,
        init_std=0.02,
    )
    backbone |= _condition(shapes, options)
    rows = shape_of(shapes, "layers.0.attention.wqkv.weight")[0]
    kv_heads = (rows - width) // 2 // (width // heads)
    if kv_heads != heads:
        backbone["kv_heads"] = agree("kv_heads", kv_heads, options, "wqkv.weight")
    label_dropout = options.get("label_dropout", 0.1)
    if not backbone.get("null_class", True):
        guidance = 1.0  # there is nothing to guide with
        label_dropout = agree("label_dropout", 0, options, "a table without a null class")
    sampling: dict[str, Any] = dict(temperature=1.0, top_k=0, guidance=dict(scale=guidance))
    if backbone["condition"] == "text":
        image_size = 256
        sampling |= dict(top_k=TEXT_TOP_K, guidance=dict(scale=TEXT_GUIDANCE))
    grid = options.get("grid")
    if grid is None:
        grid = options.get("image_size", image_size) // options.get("downsample", 16)
    return generator_part(
        dict(
            schedule=dict(name="raster", grid=grid),
            backbone=backbone,
            head=dict(name="categorical", vocab_size=vocabulary, bias=False, init_std=0.0),
            objective=dict(name="likelihood", label_dropout=label_dropout),
            sampling=sampling,
        )
    )


def _condition(shapes: Shapes, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the class table or of the caption projection."""
    table = "cls_embedding.embedding_table.weight"
    if table in shapes:
        rows = shapes[table][0]
        null = _has_null_row(rows, options)
        source = f"{table} less a null row" if null else f"{table} without a null row"
        classes = agree("num_classes", rows - null, options, source)
        fields: dict[str, Any] = dict(condition="class", num_classes=classes)
        return fields if null and "null_class" not in options else fields | {"null_class": null}
    rows, features = shape_of(shapes, "cls_embedding.uncond_embedding")
    length = options.get("caption_length", rows)
    fields = dict(
        condition="text",
        caption_length=length,
        caption_features=agree("caption_features", features, options, "uncond_embedding"),
    )
    return fields if length == rows else fields | dict(caption_null_rows=rows)


def _has_null_row(rows: int, options: Mapping[str, Any]) -> bool:
    """Whether the class table ends with a null class: officially if labels were dropped."""
    if "null_class" in options:
        return options["null_class"]
    if "num_classes" in options:
        return options["num_classes"] != rows
    return options.get("label_dropout", 0.1) > 0


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'backbone' and 'head'."""
    backbone = config["backbone"]
    for name, value in dict(positions="rope", norm="rmsnorm", gated=True).items():
        if backbone.get(name) != value:
            raise ValueError(
                f"backbone.{name} is {backbone.get(name)!r}; LlamaGen's transformers have {value!r}"
            )
    if backbone.get("condition", "class") == "class":
        embedding = same("backbone/condition/class_embed/embedding")
        places: Places = {"cls_embedding.embedding_table.weight": embedding}
    else:
        places = {
            "cls_embedding.uncond_embedding": same("backbone/condition/null_caption"),
            "cls_embedding.cap_proj.fc1.weight": dense("backbone/condition/caption_up/kernel"),
            "cls_embedding.cap_proj.fc2.weight": dense("backbone/condition/caption_down/kernel"),
        }
    places["tok_embeddings.weight"] = same("backbone/token_embed/embedding")
    for i in range(backbone["depth"]):
        places |= layer(backbone, i)
    places["norm.weight"] = same("backbone/final_norm/scale")
    places["output.weight"] = dense("head/kernel")
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        buffers={"freqs_cis": Buffer()},  # rope tables, in some old files
        container=() if (backbone["depth"], backbone["width"]) in PLAIN else ("model",),
    )


def layer(
    backbone: Mapping[str, Any], i: int, key: str = "", root: str = "backbone/stack/blocks"
) -> Places:
    """The i-th block, at ``key`` and in our stack at the path ``root``."""
    width, heads = backbone["width"], backbone["heads"]
    head_width = width // heads
    shared = (backbone.get("kv_heads") or heads) * head_width
    key = key or f"layers.{i}"
    attention, mlp = f"{root}/attention", f"{root}/mlp"
    qkv = fused(attention, (width, -1, head_width), i, sizes=(width, shared, shared))
    return {
        f"{key}.attention.wqkv.weight": qkv,
        f"{key}.attention.wo.weight": dense(
            f"{attention}/out/kernel", (heads, head_width, width), 2, i
        ),
        f"{key}.feed_forward.w1.weight": dense(f"{mlp}/gate/kernel", layer=i),
        f"{key}.feed_forward.w3.weight": dense(f"{mlp}/up/kernel", layer=i),
        f"{key}.feed_forward.w2.weight": dense(f"{mlp}/down/kernel", layer=i),
        f"{key}.attention_norm.weight": same(f"{root}/attention_norm/scale", i),
        f"{key}.ffn_norm.weight": same(f"{root}/mlp_norm/scale", i),
    }
