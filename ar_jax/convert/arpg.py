"""ARPG's releases (arXiv:2503.10568, github.com/hp-l33/ARPG).

Generators ``arpg_300m.pt``, ``arpg_700m.pt`` and ``arpg_1b.pt`` over LlamaGen's tokenizer VQ-16.
The state_dict lies under 'model', 'module' or 'state_dict'.

One table holds the codes, the query, the classes, the null class and a row that nothing reads,
which is a parameter of ours too, so that a file comes back as it was.

Options, beside the fields that the tensors say:

    image_size, downsample, grid     256; 16; codes a side, in place of image_size / downsample
    heads         where the size is none of the releases'
    norm_epsilon, rope_base, label_dropout     1e-5, 10000, 0.1
    steps, curve  64 (at most the number of codes) and 'arccos', of sampling
    group_attention     'bidirectional', of sampling
    l2_norm, entropy, groups         of the tokenizer: True, False, 32
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ar_jax.convert import llamagen
from ar_jax.convert.part import Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Places, Tensors, dense, same
from ar_jax.convert.vqgan import Shapes
from ar_jax.schedules import as_grids

# (depth, width) of the releases -> heads and the guidance scale behind the published FID.
SIZES = {(24, 1024): (16, 5.0), (36, 1280): (20, 6.0), (48, 1536): (24, 7.5)}
OTHER_GUIDANCE = 4.0
STEPS = 64
BESIDE = 3  # rows of the table that are no code and no class

unwrap_tokenizer = llamagen.unwrap_tokenizer
tokenizer = llamagen.tokenizer
tokenizer_part = llamagen.tokenizer_part


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's state_dict inside a file."""
    return find_state_dict(container, llamagen.CONTAINERS, "embeddings.weight")


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    vocabulary, width = shape_of(shapes, "head.weight")
    halves = [
        next(i for i in itertools.count() if f"layers.{name}.{i}.attn.to_q.weight" not in shapes)
        for name in ("self_dec", "cross_dec")
    ]
    if halves[0] != halves[1] or not halves[0]:
        raise ValueError(f"there are {halves[0]} layers of self_dec and {halves[1]} of cross_dec")
    depth = 2 * halves[0]
    heads, scale = SIZES.get((depth, width), (options.get("heads"), OTHER_GUIDANCE))
    heads = options.get("heads", heads)
    if heads is None or width % heads:
        raise ValueError(
            f"heads is {heads}, and {depth} layers of width {width} are no official size: give "
            "the option heads (--heads=N), which divides the width"
        )
    classes = shape_of(shapes, "embeddings.weight")[0] - vocabulary - BESIDE
    backbone = dict(
        name="two_pass_decoder",
        width=agree("width", width, options, "head.weight"),
        depth=agree("depth", depth, options, "the number of layers"),
        heads=heads,
        num_classes=agree("num_classes", classes, options, "embeddings.weight"),
        vocab_size=agree("codebook_size", vocabulary, options, "head.weight"),
        mlp_hidden=shape_of(shapes, "layers.self_dec.0.ffn.w1.weight")[0],
        group_attention=options.get("group_attention", "bidirectional"),
        rope_base=float(options.get("rope_base", 10_000)),
        norm_epsilon=options.get("norm_epsilon", 1e-5),
        token_dropout=0.1,
        residual_dropout=0.1,
        mlp_dropout=0.1,
        init_std=0.02,
    )
    grid = options.get("grid")
    if grid is None:
        grid = options.get("image_size", 256) // options.get("downsample", 16)
    rows, columns = as_grids([grid])[0]
    return generator_part(
        dict(
            schedule=dict(
                name="random_groups",
                grid=grid,
                steps=options.get("steps", min(STEPS, rows * columns)),
                curve=options.get("curve", "arccos"),
            ),
            backbone=backbone,
            head=dict(name="categorical", vocab_size=vocabulary, bias=False, init_std=0.0),
            objective=dict(name="likelihood", label_dropout=options.get("label_dropout", 0.1)),
            sampling=dict(
                temperature=1.0, top_k=0, guidance=dict(kind="linear_after", scale=scale)
            ),
        )
    )


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone = config["backbone"]
    if backbone.get("name") != "two_pass_decoder":
        raise ValueError(f"backbone.name is {backbone.get('name')!r}; ARPG's is 'two_pass_decoder'")
    width, heads = backbone["width"], backbone["heads"]
    kernel = (width, heads, width // heads)
    places: Places = {"embeddings.weight": same("backbone/token_embed/embedding")}
    for i in range(backbone["depth"] // 2):
        for official, ours in (("self_dec", "stack"), ("cross_dec", "query_stack")):
            places |= _layer(f"layers.{official}.{i}", f"backbone/{ours}/blocks", kernel, i)
            if official == "cross_dec":
                for name in ("to_k", "to_v"):
                    del places[f"layers.cross_dec.{i}.attn.{name}.weight"]
    places |= {
        "layers.norm.weight": same("backbone/memory_norm/scale"),
        "layers.to_k.weight": dense("backbone/attention/key/kernel", kernel),
        "layers.to_v.weight": dense("backbone/attention/value/kernel", kernel),
        "norm.weight": same("backbone/final_norm/scale"),
        "head.weight": dense("head/kernel"),
    }
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        container=("model",),
    )


def _layer(key: str, root: str, kernel: tuple[int, int, int], i: int) -> Places:
    width, heads, head_width = kernel
    attention, mlp = f"{root}/attention", f"{root}/mlp"
    projections = {
        f"{key}.attn.{official}.weight": dense(f"{attention}/{ours}/kernel", kernel, layer=i)
        for official, ours in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"))
    }
    return projections | {
        f"{key}.attn.proj.weight": dense(
            f"{attention}/out/kernel", (heads, head_width, width), 2, i
        ),
        f"{key}.ffn.w1.weight": dense(f"{mlp}/gate/kernel", layer=i),
        f"{key}.ffn.w3.weight": dense(f"{mlp}/up/kernel", layer=i),
        f"{key}.ffn.w2.weight": dense(f"{mlp}/down/kernel", layer=i),
        f"{key}.attn_norm.weight": same(f"{root}/attention_norm/scale", i),
        f"{key}.ffn_norm.weight": same(f"{root}/mlp_norm/scale", i),
    }
