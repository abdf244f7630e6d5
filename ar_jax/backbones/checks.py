"""Checks of decoders' fields; every error names a field of the config."""

from __future__ import annotations

from typing import Any

from ar_jax.backbones.cross_decoder import CrossDecoder


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
