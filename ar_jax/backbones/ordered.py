"""What decoders of arbitrary orders share: fields, blocks and the rotations of an order's cells.

Their blocks are LlamaGen's: RMSNorm, SwiGLU, 2-D rotary positions, no biases. In training they go
code by code whatever the schedule; its groups are those of sampling.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.api import Cache
from ar_jax.backbones.caches import empty_cache
from ar_jax.backbones.conditions import ClassCondition
from ar_jax.nn.blocks import Stack
from ar_jax.nn.layers import RMSNorm
from ar_jax.nn.positions import rope_2d
from ar_jax.nn.unstack import unstack
from ar_jax.schedules import Schedule

Array = jax.Array


class OrderedDecoder(nn.Module, kw_only=True):
    """Fields and parts of `InstructedDecoder` and `TwoPassDecoder`.

    Attributes:
        schedule: one grid; its steps are those of sampling.
        null_class: whether there is one, see `ClassCondition`.
        vocab_size: of the codes.
        rope_base: of the rotary positions.
        token_dropout: on embedded codes.
        attention: how rows attend without a cache, see `ar_jax.nn.splash.attend_all`.
        scan: see `ar_jax.nn.blocks.Stack`.
    """

    schedule: Schedule
    width: int
    depth: int
    heads: int
    num_classes: int
    null_class: bool = True
    vocab_size: int
    mlp_hidden: int
    rope_base: float = 10_000.0
    norm_epsilon: float = 1e-5
    token_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_dropout: float = 0.0
    init_std: float = 0.02
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    attention_dropout = 0.0
    context = "codes"
    condition = "class"

    # Of each kind of decoder: rows of the sequence for a code, and its stacks of equal depth.
    rows_a_code: ClassVar[int] = 1
    stack_names: ClassVar[tuple[str, ...]] = ("stack",)

    @property
    def rows(self) -> int:
        """T, all rows of the sequence; the last code, which nothing would see, has none."""
        return self.rows_a_code * self.schedule.length

    @property
    def stacks(self) -> dict[str, int]:
        """Name of every stack of blocks -> its depth."""
        return dict.fromkeys(self.stack_names, self.depth // len(self.stack_names))

    @property
    def row_steps(self) -> tuple[int, ...]:
        """Of all rows: each sees those before it."""
        return tuple(range(self.rows))

    @nn.nowrap
    def for_sampling(self, params: dict) -> tuple[OrderedDecoder, dict]:
        """This decoder unrolled, with its parameters unstacked: what samplers run."""
        if not self.scan:
            return self, params
        return self.clone(scan=False), unstack(params, self.stacks, self.dtype)

    def conditioner_from(self, row: int | None) -> ClassCondition:
        """Of classes in a table of its own, or from a row of the codes' table on."""
        return ClassCondition(
            num_classes=self.num_classes,
            width=self.width,
            init_std=self.init_std,
            null_class=self.null_class,
            shared_from=row,
            parent=None,
            name="condition",
        )

    def empty_cache(self, batch_size: int, rows: int, layers: int) -> Cache:
        """An empty cache of some of the layers."""
        head_width = self.width // self.heads
        return empty_cache(batch_size, rows, layers, self.heads, head_width, self.dtype)

    def rotations(self, order: Array | None) -> Array:
        """Float32 [B or 1, L, K/2, 2], of the cells in their order, int32 [B, L]."""
        (grid,) = self.schedule.grids
        cells = np.indices(grid).reshape(2, -1).T
        table = rope_2d(cells, self.width // self.heads, self.rope_base)
        if order is None:
            own = self.schedule.cells
            return jnp.asarray(table if own is None else table[list(own)])[None]
        return jnp.asarray(table)[order]

    def blocks(self, name: str, row_steps: tuple[int, ...] | None) -> Stack:
        """A stack of blocks, of which ``row_steps`` say what sees what without a cache."""
        fields: dict[str, Any] = dict(
            heads=self.heads,
            kv_heads=self.heads,
            kernel=self.attention,
            row_steps=row_steps,
            mlp_hidden=self.mlp_hidden,
            norm="rmsnorm",
            norm_epsilon=self.norm_epsilon,
            modulation="none",
            qk_norm="none",
            logit_scale=(self.width // self.heads) ** -0.5,
            attention_bias="none",
            activation="silu",
            gated=True,
            mlp_bias=False,
            attention_dropout=0.0,
            residual_dropout=self.residual_dropout,
            mlp_hidden_dropout=0.0,
            mlp_dropout=self.mlp_dropout,
            init_std=self.init_std,
            out_init_std=self.init_std,
            gate_init=0.0,
            modulation_init=0.0,
            dtype=self.dtype,
        )
        return Stack(
            depth=self.stacks[name],
            block=tuple(fields.items()),
            scan=self.scan,
            remat=self.remat,
            drop_path=0.0,
            name=name,
        )

    def embedding(self, rows: int) -> nn.Embed:
        """The table of the codes, and of what else is in it."""
        init = nn.initializers.normal(self.init_std)
        return nn.Embed(rows, self.width, embedding_init=init, name="token_embed")

    def norm(self, name: str) -> RMSNorm:
        """Of the width."""
        return RMSNorm(epsilon=self.norm_epsilon, name=name)
