"""What backbones must be for heads of velocities."""

from __future__ import annotations

from ar_jax.backbones.decoder import Decoder


def check_scale_decoder(backbone: Decoder, code_width: int) -> None:
    """A decoder whose hidden states a flow head is told, fed coarser scales of continuous codes.

    Raises:
        ValueError: names the field of config.backbone, its value and what would be right.
    """
    wanted = {"context": "features", "feature_width": code_width, "positions": "learned"}
    wanted |= {"condition": "class"}
    for field, value in wanted.items():
        found = getattr(backbone, field)
        if found != value:
            raise ValueError(
                f"backbone.{field} is {found!r}; before a head 'flow', of codes of {code_width} "
                f"numbers, it must be {value!r}"
            )
    if len(backbone.schedule.grids) < 2:
        raise ValueError(
            f"schedule.name is {backbone.schedule.name!r}; a head 'flow' makes one scale after the "
            "other: use 'next_scale', and the same scales in config.tokenizer"
        )
