"""The channels of a pixel one after the other: a small causal transformer (arXiv:2502.17437).

Rows of its sequence: the hidden state, then the values of the channels but the last. The state of a
row predicts the next channel, by products with the table that also embeds that channel's values.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.layers import LayerNorm
from ar_jax.nn.plain_stack import plain_stack

Array = jax.Array


class PixelNetwork(nn.Module, kw_only=True):
    """Logits of a pixel's channels, each given a hidden state and the channels before it.

    Attributes:
        channels: C.
        values: V, of a channel.
        width, depth, heads: of the transformer.
        init_std: of the tables and linear layers.
    """

    channels: int
    values: int
    width: int
    depth: int
    heads: int
    init_std: float = 0.02
    remat: str = "none"
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, hidden: Array, codes: Array) -> Array:
        """Logits float32 [N, C, V] of all channels: teacher forcing.

        Args:
            hidden: [N, D].
            codes: int32 [N, C]; a channel's logits depend on those before it alone.
        """
        init = nn.initializers.normal(self.init_std)
        shape = (self.channels, self.values)
        table = self.param("codebook", init, (*shape, self.width), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        linear = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="condition_embed")
        rows = [linear(hidden)] + [table[c][codes[:, c]] for c in range(self.channels - 1)]
        x = LayerNorm(epsilon=1e-6, name="embed_norm")(jnp.stack(rows, axis=1))  # [N, C, D]
        stack = plain_stack(
            name="stack",
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_hidden=4 * self.width,
            norm_epsilon=1e-6,
            activation="gelu",
            attention_dropout=0.0,
            dropout=0.0,
            hidden_dropout=0.0,
            init_std=self.init_std,
            attention="xla",  # of at most a few rows, far below a kernel's block
            remat=self.remat,
            scan=True,
            dtype=self.dtype,
            row_steps=tuple(range(self.channels)),
        )
        x, _ = stack(x.astype(self.dtype), None, None, None, None, 0, None, False)
        x = LayerNorm(epsilon=1e-6, name="final_norm")(x)
        logits = jnp.einsum(
            "ncd,cvd->ncv",
            x.astype(self.dtype),
            table.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return logits + bias[None]
