"""Small fractal generators of few-valued pixels."""

from __future__ import annotations

from typing import Any

import jax

from ar_jax.build import build_objective
from ar_jax.objectives.nested import NestedLikelihood
from tests.toy_systems import CLASSES, loud_params


def fractal_config(
    sizes: tuple[int, ...] = (4, 2, 1),
    iterations: tuple[int, ...] = (0, 0),
    channels: int = 1,
    values: int = 2,
    **changes: Any,
) -> dict[str, Any]:
    """``changes`` are dictionaries that update the section they name."""
    count = len(sizes) - 1
    pixels = dict(channels=channels, values=values)
    config: dict[str, Any] = dict(
        dtype="float32",
        tokenizer=dict(name="pixels", image_size=sizes[0], image_channels=channels, values=values),
        schedule=dict(name="nested", sizes=sizes, iterations=iterations),
        backbone=dict(
            name="fractal",
            num_classes=CLASSES,
            **pixels,
            widths=(16, 8)[:count],
            depths=(2, 1)[:count],
            heads=(2, 2)[:count],
            mlp_hidden=(24, 16)[:count],
            conditions=5 if iterations[0] else 1,
        ),
        head=dict(name="pixels", **pixels, width=8, depth=1, heads=2),
        objective=dict(name="nested"),
    )
    for section, fields in changes.items():
        config[section] = {**config[section], **fields}
    return config


def fractal_objective(**options: Any) -> tuple[NestedLikelihood, dict[str, Any]]:
    """(objective, {'tokenizer', 'backbone', 'head'}), no gate, bias or scale at its quiet start."""
    objective: Any = build_objective(fractal_config(**options))

    def init(key: jax.Array) -> Any:
        return {"tokenizer": {}, **objective.init(key)}

    return objective, loud_params(init)
