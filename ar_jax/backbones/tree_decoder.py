"""The decoder over a tree of drafts: one call for many continuations of one sequence.

The rows of a call are the nodes of a `DraftTree`. They are written to the cache one after the
other, behind the codes that are settled, yet each has the position of its depth and sees, of the
tree, only itself and the nodes that it stands behind (tree attention, arXiv:2305.09781). When a
path is chosen its rows move to where a sequence of its codes would have left them.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from ar_jax.api import Cache
from ar_jax.backbones.caches import empty_cache
from ar_jax.backbones.decoder import Decoder
from ar_jax.backbones.step_rows import Segment
from ar_jax.nn.draft_tree import DraftTree

Array = jax.Array
ROWS = 2  # the axis of a cache's rows


class TreeDecoder(Decoder, kw_only=True):
    """A `Decoder` of one code a step, and of its parameters, whose steps may be trees of drafts.

    Attributes:
        tree: the drafts behind the code that a step begins with.
        nodes: (first, end), the nodes that a call is fed, as its context [B, end - first]; the
            step is that of node 0, traced. None: calls are those of `Decoder`.
    """

    tree: DraftTree
    nodes: tuple[int, int] | None = None

    @classmethod
    def of(cls, backbone: Decoder, tree: DraftTree) -> TreeDecoder:
        """Of the fields of a decoder."""
        names = {field.name for field in dataclasses.fields(backbone)} - {"parent", "name"}
        return cls(**{name: getattr(backbone, name) for name in names}, tree=tree)

    @nn.nowrap
    def at(self, first: int, end: int) -> TreeDecoder:
        """The decoder whose calls are fed these nodes."""
        return self.clone(nodes=(first, end))

    def init_cache(self, batch_size: int) -> Cache:
        """An empty cache, with room for the tree behind the last code."""
        heads, head_width = self.kv_heads or self.heads, self.width // self.heads
        rows = self.rows + self.tree.size
        return empty_cache(batch_size, rows, self.depth, heads, head_width, self.dtype)

    @nn.nowrap
    def keep_path(self, cache: Cache, step: Array, path: Array) -> Cache:
        """The cache in which one node of each level follows the code that the tree began with.

        Args:
            step: that of node 0.
            path: int32 [n], nodes of the levels 1 to n.
        """
        if self.tree.chain or not len(path):  # it is there already
            return cache
        base = self.lead + step

        def moved(rows: Array) -> Array:
            kept = jnp.take(rows, base + path, axis=ROWS, mode="clip")
            return jax.lax.dynamic_update_slice_in_dim(rows, kept, base + 1, axis=ROWS)

        return jax.tree.map(moved, cache)

    def _row_range(
        self, step: Array | int | None, segment: Segment | None, context: Array | None
    ) -> tuple[Array | int, int]:
        first, count = super()._row_range(step, segment, context)
        return (first, count) if self.nodes is None else (first + self.nodes[0], count)

    def _base(self, first: Array | int) -> Array | int:
        """Cache row of node 0."""
        assert self.nodes is not None
        return first - self.nodes[0]

    def _at_depths(self, table: Array, first: Array | int, axis: int) -> Array:
        """What a table of all rows has for the nodes' positions."""
        assert self.nodes is not None
        depths = self.tree.depths[slice(*self.nodes)]
        return jnp.take(table, self._base(first) + depths, axis=axis, mode="clip")

    def _step_embed(self, first: Array | int, count: int) -> Array:
        if self.nodes is None:
            return super()._step_embed(first, count)
        return self._at_depths(super()._step_embed(0, self.rows), first, 1)

    def _target_positions(self, order: Array | None, first: Array | int, count: int) -> Array:
        if self.nodes is None:
            return super()._target_positions(order, first, count)
        return self._at_depths(super()._target_positions(order, 0, self.rows), first, 1)

    def _add_positions(self, x: Array, first: Array | int, count: int, *, starts: bool) -> Array:
        if self.nodes is None or self.positions != "learned":
            return super()._add_positions(x, first, count, starts=starts)
        nothing = jnp.zeros((1, self.rows, self.width), x.dtype)
        return x + self._at_depths(
            super()._add_positions(nothing, 0, self.rows, starts=False), first, 1
        )

    def _rope(self, first: Array | int, count: int) -> Array | None:
        if self.nodes is None or self.positions != "rope":
            return super()._rope(first, count)
        table = super()._rope(0, self.rows)
        assert table is not None
        return self._at_depths(table, first, 0)

    def _mask(
        self,
        step: Array | int | None,
        first: Array | int,
        count: int,
        prefix_mask: Array | None,
        *,
        cached: bool,
    ) -> Array | None:
        if not cached:
            return super()._mask(step, first, count, prefix_mask, cached=False)
        spare = self.tree.size
        if self.nodes is None:
            mask = super()._mask(step, first, count, prefix_mask, cached=True)
            # Of a traced step the keys are all rows of the cache, here more than of the sequence.
            if mask is None or isinstance(first, int):
                return mask
            return jnp.pad(mask, (*((0, 0),) * 3, (0, spare)))
        behind = jnp.arange(self.rows + spare) - self._base(first)  # [T], from node 0 on
        seen = jnp.asarray(self.tree.sees[slice(*self.nodes)])  # [count, N + 1]
        seen = jnp.take(seen, jnp.clip(behind, 0, spare), axis=1)
        mask = ((behind <= 0)[None] | ((behind <= spare)[None] & seen))[None, None]
        if prefix_mask is None:
            return mask
        room = ((0, 0), (0, self.rows + spare - self.prefix_rows))
        return mask & jnp.pad(prefix_mask, room, constant_values=True)[:, None, None]
