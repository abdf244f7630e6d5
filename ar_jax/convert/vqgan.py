"""Convolutional autoencoders of the VQGAN family: their keys, and the sizes the shapes tell.

VAR, LlamaGen and MAR keep the same network (`ar_jax.nn.conv`) under different names; a `Style` is
such a set of names.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from typing import Any

from ar_jax.convert.part import agree, shape_of
from ar_jax.convert.places import Places, Shape, convolution, same, split

Shapes = Mapping[str, Shape]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Style:
    """Names of modules in a state_dict.

    Attributes:
        encoder, decoder: of a level; ``{level}`` counts from the finest, ``{depth}`` from the
            coarsest.
        block: of a residual block inside a level; attention blocks are 'attn.{index}'.
        middle: the three modules between encoder and decoder levels.
        fused: queries, keys and values are one convolution 'qkv'.
        projected: there are convolutions around the quantiser.
    """

    encoder: str
    decoder: str
    block: str
    middle: tuple[str, str, str]
    fused: bool
    projected: bool = True

    def level(self, side: str, level: int, levels: int) -> str:
        """Name of a level of the 'encoder' or the 'decoder'."""
        pattern = self.encoder if side == "encoder" else self.decoder
        return pattern.format(level=level, depth=levels - 1 - level)


LDM = Style(
    encoder="encoder.down.{level}",
    decoder="decoder.up.{level}",
    block="block.{index}",
    middle=("mid.block_1", "mid.attn_1", "mid.block_2"),
    fused=False,
)
RESAMPLE = {"encoder": "downsample.conv", "decoder": "upsample.conv"}


def read_autoencoder(shapes: Shapes, style: Style, options: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our section 'tokenizer.autoencoder'.

    Args:
        shapes: of the state_dict.
        options: 'image_size' (needed), 'groups' (32 if absent), and any of the fields, which must
            then agree.

    Raises:
        ValueError: names the key that is missing or the field that does not agree.
    """
    stem = shape_of(shapes, "encoder.conv_in.weight")
    channels = stem[0]
    levels = _count(shapes, lambda i: f"{style.encoder.format(level=i)}.{_first(style)}")
    if not levels:
        raise ValueError(f"no tensor {style.encoder.format(level=0)}.{_first(style)!r}: no encoder")

    def multipliers(side: str) -> tuple[int, ...]:
        factors = []
        for level in range(levels):
            width = shape_of(shapes, f"{style.level(side, level, levels)}.{_first(style)}")[0]
            if width % channels:
                raise ValueError(
                    f"level {level} of the {side} is {width} wide, which is no multiple of the "
                    f"first convolution's {channels}"
                )
            factors.append(width // channels)
        return tuple(factors)

    coarsest = {side: style.level(side, levels - 1, levels) for side in RESAMPLE}

    def blocks(side: str) -> int:
        return _count(
            shapes, lambda i: f"{coarsest[side]}.{style.block.format(index=i)}.conv1.weight"
        )

    def attending(side: str) -> tuple[int, ...]:
        """Levels with attention."""
        names = [f"{style.level(side, i, levels)}.attn.0.norm.weight" for i in range(levels)]
        return tuple(i for i, name in enumerate(names) if name in shapes)

    def in_the_middle(side: str) -> bool:
        return f"{side}.{style.middle[1]}.norm.weight" in shapes

    found = {
        "image_channels": stem[1],
        **_projections(shapes, style),
        "channels": channels,
        "multipliers": multipliers("encoder"),
        "encoder_blocks": blocks("encoder"),
        "decoder_blocks": blocks("decoder"),
        "attention": bool(in_the_middle("encoder") or attending("encoder")),
        "middle": f"encoder.{style.middle[0]}.conv1.weight" in shapes,
    }
    factors = agree("decoder_multipliers", multipliers("decoder"), options, "the file")
    if factors != found["multipliers"]:
        found["decoder_multipliers"] = factors
    for side in RESAMPLE:
        if found["attention"] and attending(side) != (levels - 1,):
            found[f"{side}_attention"] = attending(side)
    fields = {name: agree(name, value, options, "the file") for name, value in found.items()}
    fields["image_size"] = agree("image_size", None, options, "")
    fields["groups"] = options.get("groups", 32)
    return fields


def autoencoder_places(fields: Mapping[str, Any], style: Style) -> Places:
    """Places of the autoencoder of a section 'tokenizer.autoencoder', under 'autoencoder'."""
    multipliers = {"encoder": tuple(fields["multipliers"])}
    multipliers["decoder"] = tuple(fields.get("decoder_multipliers") or multipliers["encoder"])
    levels, channels = len(multipliers["encoder"]), fields["channels"]
    attention, middle = fields.get("attention", True), fields.get("middle", True)
    said = {side: fields.get(f"{side}_attention") for side in RESAMPLE}
    attending = {side: (levels - 1,) if at is None else tuple(at) for side, at in said.items()}
    places: Places = {}

    def conv(key: str, ours: str) -> None:
        places[f"{key}.weight"] = convolution(f"autoencoder/{ours}/kernel")
        places[f"{key}.bias"] = same(f"autoencoder/{ours}/bias")

    def norm(key: str, ours: str) -> None:
        places[f"{key}.weight"] = same(f"autoencoder/{ours}/scale")
        places[f"{key}.bias"] = same(f"autoencoder/{ours}/bias")

    def block(key: str, ours: str, *, widens: bool) -> None:
        for i in (1, 2):
            norm(f"{key}.norm{i}", f"{ours}/norm{i}")
            conv(f"{key}.conv{i}", f"{ours}/conv{i}")
        if widens:
            conv(f"{key}.nin_shortcut", f"{ours}/shortcut")

    def attend(key: str, ours: str) -> None:
        norm(f"{key}.norm", f"{ours}/norm")
        names = ("query", "key", "value")
        if style.fused:
            roots = [f"autoencoder/{ours}/{name}" for name in names]
            places[f"{key}.qkv.weight"] = convolution(*[f"{root}/kernel" for root in roots])
            places[f"{key}.qkv.bias"] = split(*[f"{root}/bias" for root in roots])
        else:
            for name in names:
                conv(f"{key}.{name[0]}", f"{ours}/{name}")
        conv(f"{key}.proj_out", f"{ours}/out")

    for side in RESAMPLE:
        conv(f"{side}.conv_in", f"{side}/conv_in")
        widths = [channels * factor for factor in multipliers[side]]
        before = channels if side == "encoder" else widths[-1]
        order = range(levels) if side == "encoder" else range(levels - 1, -1, -1)
        for level in order:
            key, ours = style.level(side, level, levels), f"{side}/level{level}"
            for i in range(fields[f"{side}_blocks"]):
                official = f"{key}.{style.block.format(index=i)}"
                block(official, f"{ours}_block{i}", widens=before != widths[level])
                before = widths[level]
                if attention and level in attending[side]:
                    attend(f"{key}.attn.{i}", f"{ours}_attention{i}")
            if level < levels - 1 if side == "encoder" else level > 0:
                resampled = f"{ours}_down" if side == "encoder" else f"{ours}_up"
                conv(f"{key}.{RESAMPLE[side]}", resampled)
        if middle:
            first, between, second = (f"{side}.{name}" for name in style.middle)
            block(first, f"{side}/middle_block0", widens=False)
            if attention:
                attend(between, f"{side}/middle_attention")
            block(second, f"{side}/middle_block1", widens=False)
        norm(f"{side}.norm_out", f"{side}/norm_out")
        conv(f"{side}.conv_out", f"{side}/conv_out")
    if style.projected:
        conv("quant_conv", "to_code")
        conv("post_quant_conv", "from_code")
    return places


def _projections(shapes: Shapes, style: Style) -> dict[str, int]:
    """Fields on the way from the encoder to the quantiser."""
    if not style.projected:
        width = shape_of(shapes, "encoder.conv_out.weight")[0]
        return {"latent": width, "code_width": width, "projection": 0}
    latent, code_width = shape_of(shapes, "post_quant_conv.weight")[:2]
    side = shape_of(shapes, "quant_conv.weight")[2]
    return {"latent": latent, "code_width": code_width, "projection": side}


def _first(style: Style) -> str:
    return f"{style.block.format(index=0)}.conv1.weight"


def _count(shapes: Shapes, key: Any) -> int:
    """How many of key(0), key(1), ... there are."""
    return next(i for i in itertools.count() if key(i) not in shapes)
