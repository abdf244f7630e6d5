"""Rows that attend to a text: features of each sample, of which a mask says which are there."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ar_jax.nn.attention import attend

Array = jax.Array
Text = tuple[Array, Array]  # features [B, T, F], bool [B, T]


class CrossAttention(nn.Module, kw_only=True):
    """Multi-head attention of rows [B, Q, D] to a text, with biases but of the keys.

    Without rows one learned query asks, whoever the sample is: attentive pooling to [B, 1, D].
    """

    width: int
    heads: int
    kernel_init: Initializer
    out_init: Initializer
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array | None, text: Text) -> Array:
        features, real = text
        shape = (self.heads, self.width // self.heads)

        def project(name: str, bias: bool) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                shape, use_bias=bias, kernel_init=self.kernel_init, dtype=self.dtype, name=name
            )

        if x is None:
            learned = self.param("learned_query", self.kernel_init, shape, jnp.float32)
            q = jnp.broadcast_to(learned.astype(self.dtype), (len(features), 1, *shape))
        else:
            q = project("query", True)(x)
        k, v = project("key", False)(features), project("value", True)(features)
        out = attend(q, k, v, mask=real[:, None, None], scale=shape[1] ** -0.5)
        return nn.DenseGeneral(
            self.width, axis=(-2, -1), kernel_init=self.out_init, dtype=self.dtype, name="out"
        )(out)
