"""What the rows of a decoder's steps hold and where they lie: by the schedule alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.positions import rope_2d
from ar_jax.schedules import Schedule

Array = jax.Array
Segment = tuple[int, int]  # of a schedule, see `Schedule.segments`


def is_first(step: Array | int | None) -> bool:
    """True for the static step 0, whose rows are the condition's prefix."""
    return isinstance(step, int) and step == 0


def step_codes(
    schedule: Schedule, step: Array | int, segment: Segment | None
) -> tuple[Array | int, Array | int, Array | int]:
    """(first code, number of codes, codes of the step before), traced if the step is."""
    if isinstance(step, int):
        return schedule.starts[step], schedule.sizes[step], schedule.sizes[step - 1] if step else 0
    if segment is None:
        raise ValueError("a traced step needs the segment of the schedule that it is of")
    starts, sizes = jnp.asarray(schedule.starts), jnp.asarray(schedule.sizes)
    return starts[step], sizes[step], sizes[step - 1]


def largest(schedule: Schedule, step: Array | int, segment: Segment | None) -> tuple[int, int]:
    """(codes of a step, codes of the one before) that its program has room for."""
    first, end = (step, step + 1) if isinstance(step, int) else segment or (0, 0)
    return max(schedule.sizes[first:end]), max((0, *schedule.sizes)[first:end])


def rooms(schedule: Schedule) -> list[tuple[int, int, int]]:
    """(first code of the step before, `largest` of its program) of all steps but the first."""
    found = []
    for first, end in schedule.segments:
        room = max(schedule.sizes[first:end]), max((0, *schedule.sizes)[first:end])
        found += [(schedule.starts[step - 1], *room) for step in range(max(first, 1), end)]
    return found


def held_cells(
    schedule: Schedule, prefix_rows: int, context: str, head_width: int, base: float
) -> np.ndarray:
    """Rotations float32 [T, K/2, 2] of all rows of a decoder of rotary positions.

    Rows fed a code turn by that code's cell, rows fed features by their own; the others are zeros.
    """
    cells = rope_2d(schedule.coords[:, 1:], head_width, base)
    if context == "codes":
        fed = schedule.fed
        cells = np.where((fed >= 0)[:, None, None], cells[fed], np.float32(0))
    else:
        cells = cells[schedule.sizes[0] :]
    return np.concatenate([np.zeros((prefix_rows, *cells.shape[1:]), np.float32), cells])


def unfed_rows(schedule: Schedule) -> int:
    """How many rows of a step are fed no code at most, where steps see codes."""
    return -int(schedule.fed.min(initial=0))


def fed_tokens(tokens: Array, table: Array, schedule: Schedule, step: Array | int | None) -> Array:
    """Rows [B, n, D] of embedded codes, and of a table where a step is larger than the one before.

    Args:
        tokens: [B, L - 1, D] without a step, else those of the step before.
        table: [`unfed_rows`, D].
        step: a traced one is as large as the one before.
    """
    if step is not None and not isinstance(step, int):
        return tokens
    fed = schedule.fed
    if step is not None:
        first = schedule.starts[step] - schedule.sizes[0]
        fed = fed[first : first + schedule.sizes[step]]
        fed = np.where(fed < 0, fed, fed - schedule.starts[step - 1])
    # Behind the codes and in reverse, where negative indices find them.
    spare = jnp.broadcast_to(table[None, ::-1], (len(tokens), *table.shape)).astype(tokens.dtype)
    return jnp.concatenate([tokens, spare], axis=1)[:, fed]
