"""Learned positions of rows that hold one cell of the grid and predict another (RAR)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.schedules import Schedule

Array = jax.Array


class TargetAwarePositions(nn.Module, kw_only=True):
    """Two tables: one of the cell whose code a row is fed, one of the cell that it predicts.

    Without the second a row of a random order could not know which code is asked for
    (arXiv:2411.00776, section 3.3). Both tables have a row for every prefix row, then one for every
    cell; the prefix rows of the second are never read.

    Attributes:
        schedule: its L cells, and which code each later row is fed; a row that is fed none (PAR)
            holds no cell.
        prefix_rows: rows before the first that is fed a code; the last of them predicts the first
            code, the others nothing.
        spare: further rows of both tables that nothing reads (the releases hold 1022).
    """

    schedule: Schedule
    width: int
    prefix_rows: int
    spare: int
    init_std: float

    @nn.compact
    def __call__(self, order: Array | None, first: Array | int, count: int) -> Array:
        """What is added to the rows ``first`` ... ``first + count - 1``.

        Args:
            order: int32 [B, L], the cell of every code of the sequence; None: the schedule's own.

        Returns:
            float32 [B or 1, count, D].
        """
        fed, own = self.schedule.fed, self.schedule.cells
        if order is None:
            order = jnp.asarray(range(self.schedule.length) if own is None else own)[None]
        cells = self.prefix_rows + order  # [B, L]
        ahead = jnp.broadcast_to(jnp.arange(self.prefix_rows)[None], (len(order), self.prefix_rows))
        held = jnp.concatenate([ahead, cells[:, fed.clip(0)]], axis=1)  # [B, rows]
        predicted = jnp.concatenate([ahead[:, :-1], cells], axis=1)
        held, predicted = (
            jax.lax.dynamic_slice_in_dim(rows, first, count, axis=1) for rows in (held, predicted)
        )
        rows = first + jnp.arange(count)
        positions = self._table("held")[held]
        if (fed < 0).any():
            holds = jnp.asarray(np.pad(fed >= 0, (self.prefix_rows, 0), constant_values=True))
            positions = jnp.where(holds[rows][None, :, None], positions, 0.0)
        return positions + jnp.where(
            (rows >= self.prefix_rows - 1)[None, :, None], self._table("predicted")[predicted], 0.0
        )

    def _table(self, name: str) -> Array:
        rows = self.prefix_rows + self.schedule.length + self.spare
        init = nn.initializers.normal(self.init_std)
        return self.param(name, init, (rows, self.width), jnp.float32)
