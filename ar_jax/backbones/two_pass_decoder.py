"""ARPG's decoder (arXiv:2503.10568): content in a first pass, queries of positions in a second.

The first half of the layers goes over the content, the class and then the codes in any order of
the cells, each row seeing those before it. Its result gives one set of keys and values, which all
layers of the second half share. Their rows are queries, all one learned vector, which only the
rotary position of the cell that they ask for tells apart; query t sees the class and t codes, and
no other query. So any number of cells can be asked for at once.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cache, Cond
from ar_jax.backbones.conditions import ClassCondition
from ar_jax.backbones.ordered import OrderedDecoder
from ar_jax.backbones.step_rows import Segment, is_first, largest, rooms, step_codes
from ar_jax.nn.attention import write
from ar_jax.nn.positions import rotate

Array = jax.Array


class SharedMemory(nn.Module, kw_only=True):
    """Keys, turned to their positions, and values of content rows [B, n, D]: each [B, n, H, K]."""

    heads: int
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array, rope: Array) -> tuple[Array, Array]:
        def project(name: str) -> Array:
            return nn.DenseGeneral(
                (self.heads, x.shape[-1] // self.heads),
                use_bias=False,
                kernel_init=nn.initializers.normal(self.init_std),
                dtype=self.dtype,
                name=name,
            )(x)

        return rotate(project("key"), rope), project("value")


class TwoPassDecoder(OrderedDecoder, kw_only=True):
    """See above. Calls return (hidden float32 [B, n, D], cache).

    Attributes:
        depth: of both halves together, even.
        group_attention: what the codes of a group see of each other when they are fed to the cache:
            'bidirectional' (ARPG's sampler, unlike its training): all; 'causal': those before them,
            as in training. With one code a step there is no difference.
    """

    group_attention: str = "bidirectional"

    stack_names = ("stack", "query_stack")

    @property
    def conditioner(self) -> ClassCondition:
        """The condition module, also for its parameterless ``null`` and ``rows``."""
        return self.conditioner_from(self.vocab_size + 1)

    def init_cache(self, batch_size: int) -> Cache:
        """Of the first half's layers and, the last, of what the second half shares.

        There is room for all rows, and for what a padded step writes behind its own.
        """
        ends = [1 + first + before for first, _, before in rooms(self.schedule)]
        return self.empty_cache(batch_size, max(self.rows, *ends, 0), self.depth // 2 + 1)

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
        """Hidden states of the queries after the final norm.

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
        # The codes, the query, the classes, the null class and a row that nothing reads.
        embed = self.embedding(self.vocab_size + self.num_classes + 3)
        conditioner = self.conditioner.copy(parent=self, name="condition")
        x = conditioner(cond, embed)[0] if step is None or is_first(step) else None  # [B, 1, D]
        batch = len(cond["label"])
        rotations = self.rotations(order)  # [B or 1, L, K/2, 2]
        none = jnp.zeros_like(rotations[:, :1])
        if context is not None:
            x = embed(context) if x is None else jnp.concatenate([x, embed(context)], axis=1)
        assert x is not None
        x = nn.Dropout(self.token_dropout, deterministic=not train)(x).astype(self.dtype)
        first: Array | int = 0
        end, mask, seen = None, None, None
        if step is None:
            rope, asked = jnp.concatenate([none, rotations[:, :-1]], axis=1), rotations
        else:
            size, _ = largest(self.schedule, step, segment)
            start, _, before = step_codes(self.schedule, step, segment)
            asked = jnp.take(rotations, start + jnp.arange(size), axis=1, mode="clip")
            last: Array | int = 1
            if is_first(step):
                rope = none
            else:
                first, last = 1 + start - before, 1 + start
                held = first - 1 + jnp.arange(x.shape[1])
                rope = jnp.take(rotations, held, axis=1, mode="clip")
            end = last if isinstance(last, int) else None
            assert cache is not None
            keys = jnp.arange(cache.k[0].shape[2])[:end]
            seen = (keys < last)[None, None, None]  # [1, 1, 1, T]
            mask = seen
            if self.group_attention == "causal":
                mask = (keys[None] <= (first + jnp.arange(x.shape[1]))[:, None])[None, None]
        own = None if cache is None else tuple(zip(cache.k, cache.v, strict=True))
        x, caches = self.blocks("stack", self.row_steps)(
            x, None, rope, mask, None if own is None else own[:-1], first, end, train
        )
        normed = self.norm("memory_norm")(x).astype(self.dtype)
        shared = SharedMemory(
            heads=self.heads, init_std=self.init_std, dtype=self.dtype, name="attention"
        )
        memory = shared(normed, rope)
        if own is not None:
            assert caches is not None
            written = write(own[-1][0], memory[0], first), write(own[-1][1], memory[1], first)
            memory = written[0][:, :, :end], written[1][:, :, :end]
            caches = (*caches, written)
            cache = Cache(k=tuple(c[0] for c in caches), v=tuple(c[1] for c in caches))
        query = embed(jnp.full((batch, asked.shape[1]), self.vocab_size)).astype(self.dtype)
        query, _ = self.blocks("query_stack", self.row_steps if step is None else None)(
            query, None, asked, seen, None, 0, None, train, memory
        )
        return self.norm("final_norm")(query), cache
