"""Schedules of entities: what a step predicts is a setting (xAR, 2502.20388). numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ar_jax.schedules import Grid, Schedule, as_grids

ENTITIES = ("token", "cell", "subsample", "scale", "image")


def next_entity(*, grid: int | Sequence[int], entity: str, parts: int = 1) -> Schedule:
    """One entity a step, whatever that is.

    Args:
        entity: 'token': one code, row by row; 'cell': the codes of one of ``parts`` x ``parts``
            rectangles, row by row; 'subsample': codes that are ``parts`` apart in both directions,
            first those that begin in the upper left corner; 'scale': all codes of one of the
            scales of `doubling_scales`; 'image': all codes. Rectangles differ by a row or column
            where ``parts`` does not divide the grid, and subsamples likewise.
        parts: of cells and subsamples.

    Raises:
        ValueError: no such entity, or parts that it does not have.
    """
    grids = as_grids([grid])
    rows, columns = grids[0]
    if entity not in ENTITIES:
        raise ValueError(f"schedule.entity is {entity!r}; it must be one of {ENTITIES}")
    split = entity in ("cell", "subsample")
    if not 1 <= parts <= (min(rows, columns) if split else 1):
        raise ValueError(
            f"schedule.parts is {parts}; of entities {entity!r} on the grid {grids[0]} it must be "
            f"{f'1 to {min(rows, columns)}' if split else '1'}"
        )
    if entity == "token":
        return Schedule(name="next_entity", grids=grids, sizes=(1,) * (rows * columns))
    if entity == "scale":
        grids = doubling_scales(grids[0])
        return Schedule(name="next_entity", grids=grids, sizes=tuple(r * c for r, c in grids))
    cells = np.arange(rows * columns).reshape(rows, columns)
    if entity == "subsample":
        groups = [cells[i::parts, j::parts] for i in range(parts) for j in range(parts)]
    else:
        bands = np.array_split(cells, parts, axis=0)
        groups = [cell for band in bands for cell in np.array_split(band, parts, axis=1)]
    order = np.concatenate([group.reshape(-1) for group in groups])
    return Schedule(
        name="next_entity",
        grids=grids,
        sizes=tuple(group.size for group in groups),
        cells=tuple(order.tolist()),
    )


def doubling_scales(grid: Grid) -> tuple[Grid, ...]:
    """Grids from one cell on that double up to ``grid`` (FlowAR); halves are rounded up."""
    grids = [grid]
    while max(grids[0]) > 1:
        rows, columns = grids[0]
        grids.insert(0, ((rows + 1) // 2, (columns + 1) // 2))
    return tuple(grids)
