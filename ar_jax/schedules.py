"""Generation schedules: in which steps the codes of an image are predicted. numpy only.

A schedule cuts the L code positions of an image into S steps. All codes of a step are predicted in
parallel from the codes of earlier steps. One visibility rule serves training and sampling:
position j is visible to position i iff ``step_id[j] <= step_id[i]``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence

import numpy as np

from ar_jax.mask_rule import MaskRule

Grid = tuple[int, int]

MAX_SEGMENTS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Static and hashable description of the generation order.

    Attributes:
        name: what the config called it.
        grids: (rows, columns) of every scale; a single grid for one-grid tokenizers.
        sizes: number of codes n_s predicted in each step; they sum to L.
        random: training permutes the codes of every sample. Evaluation keeps to this schedule's
            own order unless it is given another, and so does sampling, unless it is
        shuffled: sampling draws a random order for every image, from the image's key.
        cells: the cell of every code in this schedule's own order, a permutation of 0 ... L - 1;
            None: the cells one after the other.
        anneal: (start, end) in training steps: the share of samples that are permuted is 1 until
            the start, falls linearly to 0 at the end and stays there (with both equal it is 0 from
            the next step on), the others having the schedule's own order; None: 1 for ever.
        window: (rows, columns) of the cells that a step of a raster draws together.
        mask: of masked sets, the rule that the sizes follow.
        levels: of nested steps, the schedule of the patches of each level; see `nested`.
    """

    name: str
    grids: tuple[Grid, ...]
    sizes: tuple[int, ...]
    random: bool = False
    shuffled: bool = False
    cells: tuple[int, ...] | None = None
    anneal: tuple[int, int] | None = None
    window: Grid = (1, 1)
    mask: MaskRule | None = None
    levels: tuple[Schedule, ...] = ()

    def __post_init__(self) -> None:
        if self.anneal is not None and not (
            len(self.anneal) == 2 and 0 <= self.anneal[0] <= self.anneal[1]
        ):
            raise ValueError(
                f"schedule.anneal is {self.anneal}; it must be two numbers of training steps, "
                "0 <= start <= end"
            )
        cells = sum(rows * columns for rows, columns in self.grids)
        if self.cells is not None and sorted(self.cells) != list(range(cells)):
            raise ValueError(f"schedule.cells must be a permutation of the {cells} cells")
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
    def fed(self) -> np.ndarray:
        """What each row after the first step's is fed where steps see codes, int32 [L - n_1].

        A code of the step before, by its place in the order; where a step is larger than the one
        before, -1, -2, ... stand for the rows that are fed none.
        """
        rows = [
            start + i if i < before else before - 1 - i
            for start, before, size in zip(self.starts, self.sizes, self.sizes[1:], strict=False)
            for i in range(size)
        ]
        return np.asarray(rows, np.int32)

    @functools.cached_property
    def coords(self) -> np.ndarray:
        """(scale, row, column) of every code in this schedule's own order, int32 [L, 3]."""
        cells = [
            np.stack(np.broadcast_arrays(scale, *np.indices(grid)), axis=-1).reshape(-1, 3)
            for scale, grid in enumerate(self.grids)
        ]
        coords = np.concatenate(cells).astype(np.int32)
        return coords if self.cells is None else coords[list(self.cells)]

    @functools.cached_property
    def segments(self) -> tuple[tuple[int, int], ...]:
        """Ranges (first, end) of steps that a sampler runs by one program each, in order.

        Steps that have the same number of codes as the one before are one segment, every other
        step is its own. If those are more than `MAX_SEGMENTS`, the steps after the first are cut
        into so many ranges, and each is padded to its largest step. What a scale adds to the next
        is a program of its own, even where two have equal sizes.
        """
        count = self.num_steps
        if len(self.grids) > 1:
            return tuple((step, step + 1) for step in range(count))
        pairs = list(zip((0, *self.sizes[:-1]), self.sizes, strict=True))
        edges = [step for step in range(count) if step == 0 or pairs[step] != pairs[step - 1]]
        if len(edges) > MAX_SEGMENTS:
            cuts = np.linspace(1, count, MAX_SEGMENTS).round()
            edges = [0, *(int(cut) for cut in cuts[:-1])]
        return tuple(itertools.pairwise((*edges, count)))


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


def raster(*, grid: int | Sequence[int], window: int | Sequence[int] = 1) -> Schedule:
    """One code a step, row by row (LlamaGen, arXiv:2406.06525), or one window of codes.

    Args:
        window: its side, or (rows, columns); the codes of a window are drawn in parallel
            (Token-Shuffle, arXiv:2504.17789), and the windows follow row by row.

    Raises:
        ValueError: the window does not divide the grid.
    """
    grids, (sides,) = as_grids([grid]), as_grids([window])
    if any(length % side for length, side in zip(grids[0], sides, strict=True)):
        raise ValueError(
            f"schedule.window is {window}; its sides must divide those of the grid {grids[0]}"
        )
    count, size = grids[0][0] * grids[0][1], sides[0] * sides[1]
    return Schedule(
        name="raster",
        grids=grids,
        sizes=(size,) * (count // size),
        cells=None if size == 1 else tuple(window_order(grids[0], sides).reshape(-1).tolist()),
        window=sides,
    )


def window_order(grid: Grid, window: Grid) -> np.ndarray:
    """The cells of every window, int32 [windows, cells of one], both row by row."""
    (rows, columns), (high, wide) = grid, window
    cells = np.arange(rows * columns, dtype=np.int32).reshape(
        rows // high, high, columns // wide, wide
    )
    return cells.transpose(0, 2, 1, 3).reshape(-1, high * wide)


def random(*, grid: int | Sequence[int], anneal: tuple[int, int] | None = None) -> Schedule:
    """One code a step, trained in random orders that may give way to `raster` (RAR, 2411.00776)."""
    return dataclasses.replace(raster(grid=grid), name="random", random=True, anneal=anneal)


def next_scale(*, scales: Sequence[int | Sequence[int]]) -> Schedule:
    """One whole scale a step, coarse to fine (VAR, arXiv:2404.02905)."""
    grids = as_grids(scales)
    return Schedule(name="next_scale", grids=grids, sizes=tuple(r * c for r, c in grids))


def masked(
    *, grid: int | Sequence[int], iterations: int, method: str = "cosine", slack: float = 0.0
) -> Schedule:
    """Sets of codes in a random order, few at first (MaskGIT, 2202.04200; MAR, 2406.11838).

    After iteration i (from 0) of S, as many codes are still unknown as `MaskRule` says, at least
    one fewer than before and at least one; the last iteration predicts all that are left.

    Args:
        method, slack: see `MaskRule`. MAR's code has no slack.

    Raises:
        ValueError: more iterations than codes, or no such rule.
    """
    grids = as_grids([grid])
    rule = MaskRule(method=method, slack=slack)
    sizes = _mask_sizes(rule, grids[0], iterations, "iterations")
    return Schedule(name="masked", grids=grids, sizes=sizes, mask=rule)


CURVES = ("cosine", "arccos", "cosine_ahead")


def random_groups(
    *,
    grid: int | Sequence[int],
    steps: int,
    curve: str,
    anneal: tuple[int, int] | None = None,
) -> Schedule:
    """Groups of codes in random orders, few at first (RandAR, 2412.01827; ARPG, 2503.10568).

    Training is code by code; the groups are those of sampling, where every image has its own order.

    Args:
        curve: how many codes are drawn after step s (from 0) of S. 'cosine' and 'arccos' (ARPG)
            leave floor(L cos(pi r / 2)) and floor(L arccos(r) 2 / pi) of them, r = (s + 1) / S, see
            `masked`. 'cosine_ahead' (RandAR) begins with one code and goes on to
            floor((1 - cos(pi r / 2)) L + 1), r = (s + 1) / S, at least one more: the steps may be
            over before S.
        anneal: training gives way to raster order as `random` does, and sampling keeps to it.

    Raises:
        ValueError: more steps than codes, or an unknown curve.
    """
    grids = as_grids([grid])
    if curve not in CURVES:
        raise ValueError(f"schedule.curve is {curve!r}; it must be one of {CURVES}")
    if curve == "cosine_ahead":
        length = grids[0][0] * grids[0][1]
        _check_count("steps", steps, length, grids[0])
        sizes, known = [1], 1
        while known < length:
            share = 1 - math.cos(math.pi / 2 * (len(sizes) + 1) / steps)
            sizes.append(max(min(int(share * length + 1), length) - known, 1))
            known += sizes[-1]
    else:
        sizes = list(_mask_sizes(MaskRule(method=curve), grids[0], steps, "steps"))
    return Schedule(
        name="random_groups",
        grids=grids,
        sizes=tuple(sizes),
        random=True,
        shuffled=anneal is None,
        anneal=anneal,
    )


def distant_groups(
    *, grid: int | Sequence[int], regions: int, anneal: tuple[int, int] | None = None
) -> Schedule:
    """One code of every region a step, after as many single ones (PAR, arXiv:2412.15119).

    The grid is cut into ``regions`` equal ones, a square number of them. The order goes through the
    cells of a region row by row, and at each through the regions row by row. The codes of the first
    cell are drawn one by one, those of any other together.

    Args:
        anneal: training begins with groups of random cells and gives way to this order, as `random`
            does to raster order; None: this order from the start, as PAR is published.

    Raises:
        ValueError: the regions are no square number, or do not divide the grid's sides.
    """
    grids = as_grids([grid])
    rows, columns = grids[0]
    side = math.isqrt(regions) if regions > 0 else 0
    if side < 1 or side**2 != regions or rows % side or columns % side:
        raise ValueError(
            f"schedule.regions is {regions}; it must be a square number whose root divides both "
            f"sides of the grid {grids[0]}"
        )
    cells = np.arange(rows * columns).reshape(side, rows // side, side, columns // side)
    order = cells.transpose(1, 3, 0, 2).reshape(-1)
    return Schedule(
        name="distant_groups",
        grids=grids,
        sizes=(1,) * regions + (regions,) * (len(order) // regions - 1),
        cells=tuple(order.tolist()),
        random=anneal is not None,
        anneal=anneal,
    )


def nested(*, sizes: Sequence[int], iterations: Sequence[int]) -> Schedule:
    """Patches of patches (fractal generative models, arXiv:2502.17437): a step's, by their steps.

    Args:
        sizes: of images, their patches, the patches of these, ... in pixels, down to 1.
        iterations: of each level: so many sets of its patches in a random order, see `masked`, or
            0: one patch a step, row by row.
    """
    sides = [a // b for a, b in itertools.pairwise(sizes) if 0 < b < a and a % b == 0]
    if not sides or len(sides) != len(sizes) - 1 or sizes[-1] != 1:
        raise ValueError(
            f"schedule.sizes is {tuple(sizes)}; each must be a smaller divisor of the one before, "
            "and the last one 1"
        )
    if len(iterations) != len(sides):
        raise ValueError(
            f"schedule.iterations is {tuple(iterations)}; it must be a number for each of the "
            f"{len(sides)} levels of schedule.sizes"
        )
    cells, levels = np.arange(sizes[0] ** 2), []
    for side, size, count in zip(sides, sizes[1:], iterations, strict=True):
        cells = cells.reshape(-1, side, size, side, size).transpose(0, 1, 3, 2, 4)
        levels.append(masked(grid=side, iterations=count) if count else raster(grid=side))
    return Schedule(
        name="nested",
        grids=as_grids([sizes[0]]),
        sizes=tuple(count * sizes[1] ** 2 for count in levels[0].sizes),
        cells=tuple(cells.reshape(-1).tolist()),
        levels=tuple(levels),
    )


def _mask_sizes(rule: MaskRule, grid: Grid, steps: int, field: str) -> tuple[int, ...]:
    """Codes of every step, by how many a rule leaves after it; the last takes all that are left."""
    if not 0 <= rule.slack < 1:
        raise ValueError(f"schedule.slack is {rule.slack}; it must lie in [0, 1)")
    length = grid[0] * grid[1]
    _check_count(field, steps, length, grid)
    left = [length, *map(int, rule.lengths(length, steps)[:-1]), 0]
    return tuple(more - fewer for more, fewer in itertools.pairwise(left))


def _check_count(field: str, steps: int, length: int, grid: Grid) -> None:
    if not 1 <= steps <= length:
        raise ValueError(
            f"schedule.{field} is {steps}; it must be between 1 and the {length} codes of "
            f"the grid {grid}"
        )
