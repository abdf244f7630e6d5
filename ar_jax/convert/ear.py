"""EAR's checkpoints (arXiv:2505.07812, github.com/shaochenze/EAR): EAR-B, L and H on MAR's KL-16.

No trained transformer was released; ``checkpoint-last.pth`` of the official trainer keeps 'model'
and, what evaluation uses, 'model_ema'. The autoencoder is MAR's ``kl16.ckpt``.

Options, beside the fields that the tensors say, are those of `ar_jax.convert.mar` but for ``heads``
and ``sampling_steps``, which are of parts that are not here, and

    buffer                      rows of class embeddings in front, where they are not 64
    repeats                     2
    alpha, train_temperature    of the loss: 1, 1
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ar_jax.convert import mar
from ar_jax.convert.part import Part, agree, shape_of
from ar_jax.convert.places import Places, Tensors, reshaped, same
from ar_jax.convert.vit import (
    Shapes,
    adaptive_mlp,
    block,
    count_of,
    heads_of,
    linear,
    mlp_ratio,
    norm,
)

# (depth, width) of the official transformers -> heads, which the tensors do not say.
SIZES = {(24, 768): 12, (32, 1024): 16, (40, 1280): 16}

unwrap_tokenizer, unwrap_generator = mar.unwrap_tokenizer, mar.unwrap_generator
tokenizer, tokenizer_part = mar.tokenizer, mar.tokenizer_part


def generator(shapes: Shapes, options: Mapping[str, Any], _: Tensors | None = None) -> Part:
    """The transformer that tensors of these shapes are; options: see above."""
    rows = shape_of(shapes, "decoder_pos_embed_learned")[1]
    classes, width = shape_of(shapes, "class_emb.weight")
    code_width = agree("code_width", shape_of(shapes, "z_proj.weight")[1], options, "z_proj.weight")
    width = agree("width", width, options, "class_emb.weight")
    buffer, side = _split(rows, options)
    blocks = count_of(shapes, "decoder_blocks.{}.norm1.weight")
    depth = agree("decoder_depth", blocks, options, "the file")
    backbone = dict(
        name="encoder_decoder",
        code_width=code_width,
        num_classes=agree("num_classes", classes, options, "class_emb.weight"),
        width=width,
        depth=0,
        decoder_width=width,
        decoder_depth=depth,
        decoder_heads=heads_of("decoder_heads", (depth, width), SIZES, options),
        buffer=buffer,
        mlp_ratio=mlp_ratio(shapes, {"decoder_blocks.0.mlp.fc1.weight": width}, options),
        norm_epsilon=1e-6,
        activation="gelu",
        attention_dropout=options.get("attention_dropout", 0.1),
        dropout=options.get("dropout", 0.1),
    )
    head_width, noise_width = shape_of(shapes, "scoreloss.net.noise_embed.weight")
    head = dict(
        name="energy",
        code_width=code_width,
        width=head_width,
        depth=count_of(shapes, "scoreloss.net.res_blocks.{}.in_ln.weight"),
        noise_width=agree("noise_width", noise_width, options, "scoreloss.net.noise_embed.weight"),
        alpha=options.get("alpha", 1.0),
        train_temperature=options.get("train_temperature", 1.0),
    )
    objective = dict(
        name="masked",
        label_dropout=options.get("label_dropout", 0.1),
        rate_min=options.get("rate_min", 0.7),
        repeats=options.get("repeats", 2),
    )
    sampling = dict(
        temperature=options.get("temperature", 1.0),
        guidance=dict(scale=options.get("guidance", 1.0), kind="linear_known"),
    )
    iterations = options.get("iterations", min(64, side**2))
    return generator_part(
        dict(
            schedule=dict(name="masked", grid=side, iterations=iterations),
            backbone=backbone,
            head=head,
            objective=objective,
            sampling=sampling,
        )
    )


def generator_part(config: Mapping[str, Any]) -> Part:
    """The part of our sections 'schedule', 'backbone' and 'head'."""
    backbone, head = config["backbone"], config["head"]
    names = backbone["name"], backbone.get("depth"), head["name"]
    if names != ("encoder_decoder", 0, "energy"):
        raise ValueError(
            f"backbone.name is {names[0]!r}, backbone.depth {names[1]} and head.name {names[2]!r}; "
            "EAR's are 'encoder_decoder', 0 and 'energy'"
        )
    width, heads = backbone["decoder_width"], backbone["decoder_heads"]
    places: Places = {
        "fake_latent": same("backbone/condition/null_embed"),
        "mask_token": reshaped("backbone/mask_token", (-1, width), (1, -1, width)),
        "decoder_pos_embed_learned": reshaped(
            "backbone/decoder_position", (-1, width), (1, -1, width)
        ),
        "class_emb.weight": same("backbone/condition/class_embed/embedding"),
        **linear("z_proj", "backbone/token_embed"),
    }
    for i in range(backbone["decoder_depth"]):
        places |= block(f"decoder_blocks.{i}", "backbone/decoder", width, heads, i)
    places |= norm("decoder_norm", "backbone/decoder_norm")
    root = "scoreloss.net"
    places |= linear(f"{root}.noise_embed", "head/noise_embed")
    places |= linear(f"{root}.input_proj", "head/condition_embed")
    places |= adaptive_mlp(root, head["depth"], head["width"])
    sections = ("schedule", "backbone", "head", "objective", "sampling")
    return Part(
        section={name: config[name] for name in sections if name in config},
        places=places,
        container=mar.CONTAINER,
    )


def _split(rows: int, options: Mapping[str, Any]) -> tuple[int, int]:
    """(rows of the buffer, side of the grid) of a table of so many positions."""
    buffer = options.get("buffer")
    if buffer is None:
        buffer = 64 if rows > 64 and math.isqrt(rows - 64) ** 2 == rows - 64 else None
    if buffer is None:
        raise ValueError(
            f"'decoder_pos_embed_learned' has {rows} rows, and the tensors do not say how many are "
            "the buffer's: give them with --option=buffer=N"
        )
    side = math.isqrt(max(rows - buffer, 0))
    if side < 1 or side**2 != rows - buffer:
        raise ValueError(
            f"buffer is {buffer}, which leaves {rows - buffer} of the {rows} rows of "
            "'decoder_pos_embed_learned': no square"
        )
    return buffer, side
