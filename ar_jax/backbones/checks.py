"""Checks of a backbone's own fields; every error names a field of the config."""

from __future__ import annotations

from typing import Any

from ar_jax.backbones.cross_decoder import CrossDecoder
from ar_jax.backbones.encoder_decoder import EncoderDecoder
from ar_jax.backbones.fractal import Fractal
from ar_jax.backbones.patch_levels import NEIGHBOURS


def check_heads(backbone: Any, width: str, heads: str) -> None:
    """Heads of equal widths."""
    if getattr(backbone, width) % getattr(backbone, heads):
        raise ValueError(
            f"backbone.{width} {getattr(backbone, width)} is not a multiple of "
            f"backbone.{heads} {getattr(backbone, heads)}"
        )


def check_positive(backbone: Any, field: str) -> None:
    """A count of config.backbone."""
    if getattr(backbone, field) < 1:
        raise ValueError(f"backbone.{field} is {getattr(backbone, field)}; it must be at least 1")


def check_feature_width(backbone: Any, tokenizer: Any) -> None:
    """config.backbone.feature_width is the width of what the tokenizer's steps see."""
    fed = tokenizer.bits or tokenizer.autoencoder.code_width
    if backbone.feature_width != fed:
        field = "patch^2 autoencoder.code_width" if tokenizer.bits else "autoencoder.code_width"
        raise ValueError(
            f"backbone.feature_width is {backbone.feature_width}, but the tokenizer's {field} is "
            f"{fed}: make them equal"
        )


def check_cross_decoder(backbone: CrossDecoder, tokenizer: Any) -> None:
    """config.backbone of name 'cross_decoder', fed by a tokenizer of scales."""
    check_heads(backbone, "width", "heads")
    check_heads(backbone, "width", "pool_heads")
    if backbone.width // backbone.heads % 4:
        raise ValueError(
            f"backbone.width {backbone.width} over backbone.heads {backbone.heads} gives heads of "
            f"width {backbone.width // backbone.heads}; rotary positions need a multiple of 4"
        )
    for field in ("caption_length", "caption_features"):
        check_positive(backbone, field)
    if backbone.condition == "class":
        check_positive(backbone, "num_classes")
    if backbone.caption_null_rows is not None and (
        backbone.condition == "class" or backbone.caption_null_rows < backbone.caption_length
    ):
        raise ValueError(
            f"backbone.caption_null_rows is {backbone.caption_null_rows}; it is of condition='text'"
            f" alone, and at least caption_length {backbone.caption_length}"
        )
    if backbone.schedule.name != "next_scale" or tokenizer.quantizer.context != "features":
        raise ValueError(
            f"schedule.name is {backbone.schedule.name!r}; the backbone 'cross_decoder' is fed "
            "sums of coarser scales: use 'next_scale' and a tokenizer of scales"
        )
    check_feature_width(backbone, tokenizer)


def check_encoder_decoder(backbone: EncoderDecoder) -> None:
    """config.backbone of name 'encoder_decoder'."""
    if backbone.depth:
        if backbone.heads is None:
            raise ValueError(f"backbone.heads is missing; the encoder has depth {backbone.depth}")
        check_heads(backbone, "width", "heads")
    elif backbone.width != backbone.decoder_width:
        raise ValueError(
            f"backbone.width is {backbone.width} and backbone.decoder_width "
            f"{backbone.decoder_width}; without an encoder (depth 0) they must be equal"
        )
    check_heads(backbone, "decoder_width", "decoder_heads")
    check_masked(backbone, "encoder_decoder")
    check_positive(backbone, "buffer")


def check_masked(backbone: Any, name: str) -> None:
    """config.schedule of a backbone that is given codes of which some are hidden."""
    if backbone.schedule.name != "masked":
        raise ValueError(
            f"schedule.name is {backbone.schedule.name!r}; the backbone {name!r} predicts sets of "
            "codes in random order: use 'masked'"
        )


def check_patch_levels(backbone: Fractal) -> None:
    """config.backbone of name 'fractal' and the levels of its schedule.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    schedule = backbone.schedule
    if not schedule.levels:
        raise ValueError(
            f"schedule.name is {schedule.name!r}; the backbone 'fractal' draws patches of patches: "
            "use 'nested'"
        )
    count = len(schedule.levels)
    for field in ("widths", "depths", "heads", "mlp_hidden"):
        found = getattr(backbone, field)
        if found is not None and (len(found) != count or min(found) < 1):
            raise ValueError(
                f"backbone.{field} is {found}; it must be a positive number for each of the "
                f"{count} levels of config.schedule"
            )
    for index, (width, heads) in enumerate(zip(backbone.widths, backbone.heads, strict=True)):
        multiple = 4 * heads if backbone.causal(index) else heads
        if width % multiple:
            raise ValueError(
                f"backbone.widths[{index}] is {width}; with {heads} heads it must be a multiple of "
                f"{multiple}"
            )
    above = 1 if backbone.causal(0) else NEIGHBOURS
    if not 1 <= backbone.conditions <= NEIGHBOURS:
        raise ValueError(
            f"backbone.conditions is {backbone.conditions}; it must be between 1 and {NEIGHBOURS}"
        )
    for index in range(1, count):
        if not backbone.causal(index) and backbone.conditions > above:
            raise ValueError(
                f"backbone.conditions is {backbone.conditions}, but level {index - 1}, which takes "
                f"its patches one by one, gives level {index} one condition: use 1"
            )
        above = 1 if backbone.causal(index) else NEIGHBOURS
    for field in ("mean", "std"):
        found = getattr(backbone, field)
        if len(found) not in (1, backbone.channels) or (field == "std" and min(found) <= 0):
            raise ValueError(
                f"backbone.{field} is {found}; it must be one number, or one for each of the "
                f"{backbone.channels} channels{', positive' if field == 'std' else ''}"
            )
    check_positive(backbone, "num_classes")
