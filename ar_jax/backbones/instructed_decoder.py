"""RandAR's decoder (arXiv:2412.01827): every code has an instruction before it, its cell.

Rows of the sequence: the class, then for every code its instruction and itself, in any order of the
cells. An instruction is one learned vector turned by the rotary position of the cell that it asks
for; the state of its row predicts the code. Rows see all rows before them.

A group of codes is drawn from instructions one behind the other. With the next group the codes are
written between their instructions, in the place of those, so that the cache always ends as in
training; within a group an instruction sees those before it, but not their codes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.api import Cache, Cond
from ar_jax.backbones.conditions import ClassCondition
from ar_jax.backbones.ordered import OrderedDecoder
from ar_jax.backbones.step_rows import Segment, is_first, largest, rooms, step_codes
from ar_jax.nn.positions import rotate

Array = jax.Array


class InstructedDecoder(OrderedDecoder, kw_only=True):
    """See above. Calls return (hidden float32 [B, n, D], cache)."""

    rows_a_code = 2  # an instruction and the code

    @property
    def conditioner(self) -> ClassCondition:
        """The condition module, also for its parameterless ``null`` and ``rows``."""
        return self.conditioner_from(None)

    def init_cache(self, batch_size: int) -> Cache:
        """Room for all rows, and for what a padded step writes behind its own."""
        ends = [
            2 * first + 2 + 2 * before - 1 + size for first, size, before in rooms(self.schedule)
        ]
        return self.empty_cache(batch_size, max(self.rows, *ends, 0), self.depth)

    def call_rows(self, step: Array | int, segment: Segment | None = None) -> tuple:
        """(first row, number of rows) of a step's call."""
        size, before = largest(self.schedule, step, segment)
        if is_first(step):
            return 0, 1 + size
        first, _, count = step_codes(self.schedule, step, segment)
        return 2 * (first - count) + 2, 2 * before - 1 + size

    @nn.compact
    def __call__(
        self,
        context: Array | None,
        cond: Cond,
        *,
        order: Array | None = None,
        step: Array | int | None = None,
        segment: Segment | None = None,
        cache: Cache | None = None,
        train: bool = False,
    ) -> tuple[Array, Cache | None]:
        """Hidden states of the instructions after the final norm.

        Args:
            context: without ``step`` all codes but the last, int32 [B, L - 1], in the order; with a
                step > 0 those of the step before, [B, n], with padding behind them.
            cond: ``{'label': int32 [B]}``.
            order: int32 [B, L], the cell of every code; None is the schedule's own order.
            step: None for all codes at once, each seeing those before it; else the codes of this
                step of the schedule only, reading and extending ``cache``.
            segment: of the schedule, that a traced step is of.
            train: dropout on; needs the rng 'dropout'.

        Returns:
            float32 [B, L, D] without step, [B, n, D] with, of the schedule's n codes of the step or
            the segment's largest; what is behind the step's own is padding.
        """
        label = self.conditioner.copy(parent=self, name="condition")(cond, None)[0]  # [B, 1, D]
        embed = self.embedding(self.vocab_size)
        vector = self.param(
            "instruction", nn.initializers.normal(self.init_std), (1, self.width), jnp.float32
        )
        rotations = self.rotations(order)  # [B or 1, L, K/2, 2]
        none = jnp.zeros_like(rotations[:, :1])
        tokens = None
        if context is not None:
            tokens = nn.Dropout(self.token_dropout, deterministic=not train)(embed(context))
        first, count, visible = 0, self.rows, None
        mask = None
        if step is None:
            asked = instructions(vector, rotations, self.heads, len(label))  # [B, L, D]
            assert tokens is not None
            pairs = jnp.stack([asked[:, :-1], tokens.astype(asked.dtype)], axis=2)
            pairs = pairs.reshape(len(label), -1, self.width)
            x = jnp.concatenate([label, pairs, asked[:, -1:]], axis=1)
            rope = jnp.concatenate([none, rotations.repeat(2, axis=1)[:, : count - 1]], axis=1)
        else:
            first, count = self.call_rows(step, segment)
            size, _ = largest(self.schedule, step, segment)
            offset: Array | int = 1
            if is_first(step):
                rope = rotations[:, :size]
                x = jnp.concatenate([label, instructions(vector, rope, self.heads, len(label))], 1)
                rope = jnp.concatenate([none, rope], axis=1)
            else:
                start, _, before = step_codes(self.schedule, step, segment)
                place = jnp.arange(count)
                offset = 2 * before - 1  # of the step's instructions, behind the codes before
                inside = place < offset
                index = jnp.where(inside, start - before + (place + 1) // 2, start + place - offset)
                rope = jnp.take(rotations, index, axis=1, mode="clip")
                asked = instructions(vector, rope, self.heads, len(label))
                assert tokens is not None
                held = jnp.take(tokens, place // 2, axis=1, mode="clip").astype(asked.dtype)
                x = jnp.where((inside & (place % 2 == 0))[None, :, None], held, asked)
            visible = first + count if isinstance(first, int) else None
            assert cache is not None
            keys = jnp.arange(cache.k[0].shape[2])[:visible]
            mask = (keys[None] <= (first + jnp.arange(count))[:, None])[None, None]
        x, caches = self.blocks("stack", self.row_steps)(
            x.astype(self.dtype),
            None,
            rope,
            mask,
            None if cache is None else tuple(zip(cache.k, cache.v, strict=True)),
            first,
            visible,
            train,
        )
        if caches is not None:
            cache = Cache(k=tuple(c[0] for c in caches), v=tuple(c[1] for c in caches))
        if step is None:
            x = x[:, 1::2]
        else:
            x = jax.lax.dynamic_slice_in_dim(x, offset, size, axis=1)
        return self.norm("final_norm")(x), cache


def instructions(vector: Array, rotations: Array, heads: int, batch: int) -> Array:
    """One vector [1, D] turned by rotations [B or 1, n, K/2, 2] of cells: float32 [B, n, D]."""
    count = rotations.shape[1]
    rows = jnp.broadcast_to(
        vector.reshape(1, 1, heads, -1), (batch, count, heads, vector.size // heads)
    )
    return rotate(rows, rotations).reshape(batch, count, -1)
