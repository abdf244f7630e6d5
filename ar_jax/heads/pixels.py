"""A softmax over the values of each channel of a pixel, one channel after the other."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from ar_jax.heads.categorical import CategoricalHead
from ar_jax.nn.pixels import PixelNetwork

Array = jax.Array


class PixelHead(PixelNetwork, kw_only=True):
    """p(pixel | hidden), the product over its channels of p(channel | hidden, channels before it).

    Attributes:
        filter_threshold: guidance raises the unconditional logits of values that are less probable
            than this under the condition, so that it does not make rare values likely; 0: never.
    """

    filter_threshold: float = 1e-4

    log_prob = staticmethod(CategoricalHead.log_prob)
    loss = staticmethod(CategoricalHead.loss)
    draw = staticmethod(CategoricalHead.draw)

    def guide(self, cond: Array, null: Array, scale: Array) -> Array:
        """null' + scale (cond - null'), logits [..., V]; see ``filter_threshold`` for null'."""
        least = cond - cond.max(-1, keepdims=True) + null.max(-1, keepdims=True)
        rare = jax.nn.softmax(cond, axis=-1) < self.filter_threshold
        return CategoricalHead.guide(cond, jnp.where(rare, jnp.maximum(null, least), null), scale)
