"""Checks of a backbone's own fields; every error names a field of the config."""

from __future__ import annotations

from ar_jax.backbones.fractal import Fractal
from ar_jax.backbones.patch_levels import NEIGHBOURS


def check_levels(backbone: Fractal) -> None:
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
    if backbone.num_classes < 1:
        raise ValueError(f"backbone.num_classes is {backbone.num_classes}; it must be positive")
