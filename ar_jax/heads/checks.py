"""Checks of heads of continuous codes; every error names a field of the config."""

from __future__ import annotations

from typing import TypeAlias

from ar_jax.heads.diffusion import DiffusionHead
from ar_jax.heads.energy import EnergyHead
from ar_jax.heads.mixture import MixtureHead
from ar_jax.nn.diffusion import respace

MaskedHead: TypeAlias = DiffusionHead | EnergyHead | MixtureHead


def check_masked_head(head: MaskedHead) -> None:
    """config.head of a backbone of masked sets of continuous codes.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    if isinstance(head, EnergyHead):
        if not 0 < head.alpha < 2:
            raise ValueError(
                f"head.alpha is {head.alpha}; it must lie between 0 and 2, or the score is least "
                "for other laws than that of the codes, too"
            )
    elif isinstance(head, MixtureHead):
        for field in ("components", "candidates"):
            if getattr(head, field) < 1:
                raise ValueError(f"head.{field} is {getattr(head, field)}; it must be at least 1")
    else:
        try:
            respace(head.steps, head.sampling_steps)
        except ValueError as error:
            raise ValueError(f"head.sampling_steps is {head.sampling_steps!r}: {error}") from error


def check_repeats(repeats: int, head: MaskedHead) -> None:
    """config.objective.repeats are of a loss that chance has a part in."""
    if repeats > 1 and isinstance(head, MixtureHead):
        raise ValueError(
            f"objective.repeats is {repeats}, but nothing in the loss of the head 'mixture' is "
            "drawn, so that each would be the same: set it to 1"
        )
