"""xAR's releases (arXiv:2502.20388, github.com/OliverRensu/xAR): ``xAR-B.pth``, L and H.

A file is the state_dict itself; the trainer's hold 'model' and 'model_ema'. The tokenizer is MAR's
KL-16, ``kl16.ckpt``. Buffers beside the parameters are the mask among cells, which must be ours,
and tables of rotations, whose width says the heads.

Options, beside the fields that the tensors say and those of MAR's tokenizer:

    parts                    cells on a side of the grid, 2
    heads, decoder_heads     where the tables of rotations are missing and the size is none of the
                             releases'
    sampling_steps, guidance of the sampler: those of the release, else 50 and 1
    temperature              1
    attention_dropout, dropout, label_dropout    0.1 each
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.backbones.noisy_decoder import rotations
from ar_jax.convert import mar
from ar_jax.convert.part import Buffer, Part, agree, find_state_dict, shape_of
from ar_jax.convert.places import Places, Tensors, dense, fused, fused_bias, reshaped, same
from ar_jax.convert.vit import count_of, heads_of, linear
from ar_jax.convert.vqgan import Shapes
from ar_jax.entities import next_entity
from ar_jax.nn.splash import visible_rows

# (blocks of each half, width) of the releases -> heads, evaluations and guidance of their README.
SIZES = {(8, 768): (12, 40, 2.7), (16, 1024): (16, 50, 2.3), (20, 1280): (16, 50, 2.2)}
HALVES = {"encoder": ("depth", "heads"), "decoder": ("decoder_depth", "decoder_heads")}

unwrap_tokenizer = mar.unwrap_tokenizer
tokenizer, tokenizer_part = mar.tokenizer, mar.tokenizer_part


def unwrap_generator(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The transformer's state_dict inside a file, the averaged one of a trainer's."""
    return find_state_dict(container, ("model_ema", "model"), "z_proj_ln.weight")


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    length, width = shape_of(shapes, "encoder_pos_embed_learned")[1:]
    rows = shape_of(shapes, "class_emb.weight")[0]
    code_width = shape_of(shapes, "z_proj.weight")[1]
    side = math.isqrt(length)
    if side**2 != length:
        raise ValueError(f"'encoder_pos_embed_learned' has {length} positions, which is no square")
    if (second := shape_of(shapes, "decoder_embed.weight")) != (width, width):
        raise ValueError(
            f"'decoder_embed.weight' is {second}, but both halves have the width {width} of "
            "'encoder_pos_embed_learned': one condition serves both"
        )
    depths = [count_of(shapes, f"{half}_blocks.{{}}.attn.qkv.weight") for half in HALVES]
    steps, guidance = SIZES.get((depths[0], width), (0, 50, 1.0))[1:]
    hidden = shape_of(shapes, "encoder_blocks.0.mlp.fc2.weight")[1]
    backbone = dict(
        name="noisy_decoder",
        code_width=agree("code_width", code_width, options, "z_proj.weight"),
        num_classes=agree("num_classes", rows - 1, options, "class_emb.weight"),
        width=agree("width", width, options, "encoder_pos_embed_learned"),
    )
    for (half, names), depth in zip(HALVES.items(), depths, strict=True):
        backbone[names[0]] = agree(names[0], depth, options, "the file")
        backbone[names[1]] = _heads(shapes, half, (depth, width), options)
    backbone |= dict(
        mlp_hidden=agree("mlp_hidden", hidden, options, "encoder_blocks.0.mlp.fc2.weight"),
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=options.get("attention_dropout", 0.1),
        dropout=options.get("dropout", 0.1),
    )
    head = dict(
        name="velocity",
        code_width=code_width,
        sampler="euler_maruyama",
        sampling_steps=options.get("sampling_steps", steps),
        last=0.04,
    )
    sampling = dict(
        temperature=options.get("temperature", 1.0),
        guidance=dict(scale=options.get("guidance", guidance), kind="linear"),
    )
    return generator_part(
        dict(
            schedule=dict(
                name="next_entity", grid=side, entity="cell", parts=options.get("parts", 2)
            ),
            backbone=backbone,
            head=head,
            objective=dict(name="flow_matching", label_dropout=options.get("label_dropout", 0.1)),
            sampling=sampling,
        )
    )


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone, schedule = config["backbone"], config["schedule"]
    names = backbone["name"], schedule["name"], schedule.get("entity")
    if names != ("noisy_decoder", "next_entity", "cell"):
        raise ValueError(
            f"backbone.name is {names[0]!r}, schedule.name {names[1]!r} and its entity "
            f"{names[2]!r}; the released xAR has 'noisy_decoder', 'next_entity' and 'cell'"
        )
    width = backbone["width"]
    places: Places = {
        "encoder_pos_embed_learned": _table("encoder_position", width),
        "decoder_pos_embed_learned": _table("decoder_position", width),
        "class_emb.weight": same("backbone/condition/class_embed/embedding"),
        **linear("time_embed.mlp.0", "backbone/time/in_embed"),
        **linear("time_embed.mlp.2", "backbone/time/out_embed"),
        **linear("z_proj", "backbone/token_embed"),
        "z_proj_ln.weight": same("backbone/encoder_input_norm/scale"),
    }
    made = next_entity(**{name: schedule[name] for name in schedule if name != "name"})
    steps = tuple(map(int, made.step_id))

    def mask() -> np.ndarray:
        return np.where(visible_rows(steps), 0.0, -np.inf).astype(np.float32)[None, None]

    size = made.length
    shape = (1, 1, size, size)
    buffers = {"mask": Buffer(shape=shape, made_by="the cells", make=mask, computed=True)}
    for half, (depth, heads) in HALVES.items():
        for layer in range(backbone[depth]):
            key, head_width = f"{half}_blocks.{layer}", width // backbone[heads]
            places |= _block(key, f"backbone/{half}", width, backbone[heads], layer)
            buffers |= _rotations(f"{key}.attn.rope", made, head_width)
        places[f"{half}_norm.weight"] = same(f"backbone/{half}_norm/scale")
    places |= linear("decoder_embed", "backbone/decoder_embed")
    places |= linear("pred", "head/output")
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        buffers=buffers,
    )


def _block(key: str, stack: str, width: int, heads: int, layer: int) -> Places:
    head_width = width // heads
    root = f"{stack}/blocks"
    attention, modulation = f"{root}/attention", f"{root}/modulation"
    out = (heads, head_width, width)
    return {
        f"{key}.attn.qkv.weight": fused(attention, (width, heads, head_width), layer),
        f"{key}.attn.qkv.bias": fused_bias(attention, (heads, head_width), layer),
        f"{key}.attn.proj.weight": dense(f"{attention}/out/kernel", out, 2, layer),
        f"{key}.attn.proj.bias": same(f"{attention}/out/bias", layer),
        **linear(f"{key}.mlp.fc1_g", f"{root}/mlp/gate", layer),
        **linear(f"{key}.mlp.fc1_x", f"{root}/mlp/up", layer),
        **linear(f"{key}.mlp.fc2", f"{root}/mlp/down", layer),
        f"{key}.ada_lin.1.weight": dense(f"{modulation}/kernel", (width, 6, width), layer=layer),
        f"{key}.ada_lin.1.bias": reshaped(f"{modulation}/bias", (6, width), (-1,), layer),
    }


def _rotations(key: str, schedule: Any, head_width: int) -> dict[str, Buffer]:
    """The tables that the official attention keeps; each angle stands for a pair of numbers."""
    length = schedule.length

    def table(part: int) -> np.ndarray:
        return np.repeat(rotations(schedule, head_width)[..., part], 2, axis=1)

    def frequencies() -> np.ndarray:
        half = head_width // 2
        exponents = np.arange(0, half, 2, dtype=np.float32) / half
        return (1.0 / 10_000.0**exponents).astype(np.float32)

    def rows(part: int) -> Buffer:
        shape = (length, head_width)
        return Buffer(shape=shape, made_by="the heads", make=lambda: table(part))

    return {
        f"{key}.freqs": Buffer(shape=(head_width // 4,), made_by="the heads", make=frequencies),
        f"{key}.freqs_cos": rows(0),
        f"{key}.freqs_sin": rows(1),
    }


def _table(name: str, width: int) -> Any:
    return reshaped(f"backbone/{name}", (-1, width), (1, -1, width))


def _heads(shapes: Shapes, half: str, size: tuple[int, int], options: Mapping[str, Any]) -> int:
    """What the width of the rotations says, or an official size, or the option."""
    key, (_, name) = f"{half}_blocks.0.attn.rope.freqs_cos", HALVES[half]
    if key in shapes:
        return agree(name, size[1] // shapes[key][1], options, key)
    return heads_of(name, size, {known: heads for known, (heads, *_) in SIZES.items()}, options)
