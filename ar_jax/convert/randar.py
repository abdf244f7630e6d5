"""RandAR's releases (arXiv:2412.01827, github.com/ziqipang/RandAR).

Generators ``randar_0.3b_llamagen_...safetensors``, ``randar_0.3b_maskgit_...`` and
``randar_0.7b_llamagen_...``: plain state_dicts with LlamaGen's keys and one more, over LlamaGen's
tokenizer VQ-16 or MaskGIT's.

Options are those of `ar_jax.convert.llamagen` (``image_size`` is 256), of MaskGIT's tokenizer those
of `ar_jax.convert.rar`, and

    steps      88, of sampling; at most the number of codes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ar_jax.convert import llamagen, rar
from ar_jax.convert.part import Part, shape_of
from ar_jax.convert.places import Tensors, same
from ar_jax.convert.vqgan import Shapes
from ar_jax.schedules import as_grids

INSTRUCTION = "pos_instruct_embeddings"
STEPS = 88
# (width, codes) of the releases -> guidance scale behind the published FID.
GUIDANCE = {(1024, 16_384): 3.4, (1024, 1024): 4.0, (1280, 16_384): 4.0}
OTHER_GUIDANCE = 4.0
# What LlamaGen's decoder and ours have both; the rest is fixed here.
SHARED = (
    *("width", "depth", "heads", "num_classes", "null_class", "vocab_size", "mlp_hidden"),
    *("rope_base", "norm_epsilon", "token_dropout", "residual_dropout", "mlp_dropout", "init_std"),
)
LLAMAGEN = dict(name="decoder", positions="rope", norm="rmsnorm", gated=True)

unwrap_tokenizer = llamagen.unwrap_tokenizer
unwrap_generator = llamagen.unwrap_generator


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """LlamaGen's or MaskGIT's tokenizer, whichever has tensors of these shapes."""
    maskgit = "encoder.down.0.block.0.conv1.weight" in shapes
    return (rar if maskgit else llamagen).tokenizer(shapes, options)


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of LlamaGen's or MaskGIT's."""
    pooled = config["tokenizer"]["autoencoder"].get("name") == "pooled"
    return (rar if pooled else llamagen).tokenizer_part(config)


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    shape_of(shapes, INSTRUCTION)
    rest = {key: shape for key, shape in shapes.items() if key != INSTRUCTION}
    section = llamagen.generator(rest, {"image_size": 256, **options}).section
    found = section["backbone"]
    if "kv_heads" in found:
        raise ValueError(
            f"the tensors have {found['kv_heads']} heads of keys for {found['heads']} of queries; "
            "RandAR's transformers have as many"
        )
    rows, columns = as_grids([section["schedule"]["grid"]])[0]
    steps = options.get("steps", min(STEPS, rows * columns))
    scale = GUIDANCE.get((found["width"], found["vocab_size"]), OTHER_GUIDANCE)
    guided = found.get("null_class", True)
    return generator_part(
        section
        | dict(
            schedule=dict(
                name="random_groups",
                grid=section["schedule"]["grid"],
                steps=steps,
                curve="cosine_ahead",
            ),
            backbone=dict(name="instructed_decoder")
            | {name: found[name] for name in SHARED if name in found},
            sampling=dict(
                temperature=1.0,
                top_k=0,
                guidance=dict(kind="linear_before", scale=scale if guided else 1.0),
            ),
        )
    )


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone = config["backbone"]
    if backbone.get("name") != "instructed_decoder":
        raise ValueError(
            f"backbone.name is {backbone.get('name')!r}; RandAR's is 'instructed_decoder'"
        )
    places = llamagen.generator_part({**config, "backbone": {**backbone, **LLAMAGEN}}).places
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places={INSTRUCTION: same("backbone/instruction"), **places},
    )
