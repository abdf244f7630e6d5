"""Generation schedules: in which steps the codes of an image are predicted. numpy only.

A schedule cuts the L code positions of an image into S steps. All codes of a step are predicted in
parallel from the codes of earlier steps. One visibility rule serves training and sampling:
position j is visible to position i iff ``step_id[j] <= step_id[i]``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Static and hashable description of the generation order.

    Attributes:
        name: what the config called it.
        grids: (rows, columns) of every scale; a single grid for one-grid tokenizers.
        sizes: number of codes n_s predicted in each step; they sum to L.
        random: training permutes the codes of every sample. Sampling and evaluation keep to this
            schedule's own order unless they are given another.
        anneal: (start, end) in training steps: the share of samples that are permuted is 1 until
            the start, falls linearly to 0 at the end and stays there (with both equal it is 0 from
            the next step on); None: 1 for ever.
    """

    name: str
    grids: tuple[Grid, ...]
    sizes: tuple[int, ...]
    random: bool = False
    anneal: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.anneal is not None and not (
            len(self.anneal) == 2 and 0 <= self.anneal[0] <= self.anneal[1]
        ):
            raise ValueError(
                f"schedule.anneal is {self.anneal}; it must be two numbers of training steps, "
                "0 <= start <= end"
            )
        cells = sum(rows * columns for rows, columns in self.grids)
        if sum(self.sizes) != cells:
            raise ValueError(
                f"schedule.sizes {self.sizes} sum to {sum(self.sizes)}, but the grids {self.grids} "
                f"hold {cells} codes"
            )

    @property
    def length(self) -> int:
        """L, the number of codes of one image."""
        return sum(self.sizes)

    @property
    def num_steps(self) -> int:
        """S, the number of prediction steps."""
        return len(self.sizes)

    @property
    def stored_sizes(self) -> tuple[int, ...]:
        """Parts in which codes are kept, whatever the order: scales, or the codes of one grid."""
        cells = tuple(rows * columns for rows, columns in self.grids)
        return cells if len(cells) > 1 else (1,) * cells[0]

    @property
    def equal_steps(self) -> bool:
        """True if one traced step can stand for all: one size, and one grid.

        What a scale adds to the next is a program of its own, even where two have equal sizes.
        """
        return len(set(self.sizes)) == 1 and len(self.grids) == 1

    @functools.cached_property
    def starts(self) -> tuple[int, ...]:
        """Index of the first code of every step."""
        return tuple(int(n) for n in np.cumsum((0, *self.sizes[:-1])))

    @functools.cached_property
    def known(self) -> np.ndarray:
        """Share of the codes that are known after every step, float64 [S].

        One code counts as unknown to the end, as in MAR's guidance schedule.
        """
        return np.minimum(np.cumsum(self.sizes), self.length - 1) / self.length

    @functools.cached_property
    def step_id(self) -> np.ndarray:
        """Step of every code position, int32 [L]."""
        return np.repeat(np.arange(self.num_steps, dtype=np.int32), self.sizes)

    @functools.cached_property
    def coords(self) -> np.ndarray:
        """(scale, row, column) of every code position, int32 [L, 3]."""
        cells = [
            np.stack(np.broadcast_arrays(scale, *np.indices(grid)), axis=-1).reshape(-1, 3)
            for scale, grid in enumerate(self.grids)
        ]
        return np.concatenate(cells).astype(np.int32)


def as_grids(scales: Sequence[int | Sequence[int]]) -> tuple[Grid, ...]:
    """Normalises a scale list: ``3`` means a 3x3 grid, ``(2, 3)`` two rows of three columns."""
    if not isinstance(scales, list | tuple):
        raise ValueError(f"the scales are {scales!r}; they must be a list of sides, coarse to fine")
    grids: list[Grid] = []
    for scale in scales:
        sides = tuple(scale) if isinstance(scale, list | tuple) else (scale, scale)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise ValueError(
                f"the scales hold {scale!r}; each must be a positive integer or a pair of them, "
                "(rows, columns)"
            )
        grids.append(sides)
    if not grids:
        raise ValueError("scales is empty; it needs at least the latent grid itself")
    return tuple(grids)


def raster(*, grid: int | Sequence[int]) -> Schedule:
    """One code a step, row by row (LlamaGen, arXiv:2406.06525)."""
    grids = as_grids([grid])
    return Schedule(name="raster", grids=grids, sizes=(1,) * (grids[0][0] * grids[0][1]))


def random(*, grid: int | Sequence[int], anneal: tuple[int, int] | None = None) -> Schedule:
    """One code a step, trained in random orders that may give way to `raster` (RAR, 2411.00776)."""
    return dataclasses.replace(raster(grid=grid), name="random", random=True, anneal=anneal)


def next_scale(*, scales: Sequence[int | Sequence[int]]) -> Schedule:
    """One whole scale a step, coarse to fine (VAR, arXiv:2404.02905)."""
    grids = as_grids(scales)
    return Schedule(name="next_scale", grids=grids, sizes=tuple(r * c for r, c in grids))


def masked(*, grid: int | Sequence[int], iterations: int) -> Schedule:
    """Sets of codes in a random order, few at first (MaskGIT, 2202.04200; MAR, 2406.11838).

    After iteration i (from 0) of S, floor(L cos(pi (i + 1) / 2 S)) codes are still unknown, at
    least one fewer than before and at least one; the last iteration predicts all that are left.

    Raises:
        ValueError: more iterations than codes.
    """
    grids = as_grids([grid])
    left = length = grids[0][0] * grids[0][1]
    if not 1 <= iterations <= length:
        raise ValueError(
            f"schedule.iterations is {iterations}; it must be between 1 and the {length} codes of "
            f"the grid {grids[0]}"
        )
    sizes = []
    for i in range(iterations):
        # numpy's cosine, as in the official code: the floor depends on its rounding.
        unknown = int(np.floor(length * np.cos(np.pi / 2.0 * (i + 1) / iterations)))
        unknown = max(1, min(left - 1, unknown)) if i + 1 < iterations else 0
        sizes.append(left - unknown)
        left = unknown
    return Schedule(name="masked", grids=grids, sizes=tuple(sizes))
