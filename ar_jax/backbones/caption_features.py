"""Conditions that a decoder attends to: features of a caption, given or learned for every class.

A condition gives features of ``length`` rows and which of them are there; `CaptionReader` makes of
them the vector that begins the sequence and the text that all blocks attend to (Infinity,
arXiv:2412.04431). ``null`` makes the unconditional one that classifier-free guidance needs: learned
features, as many of them as the caption has rows.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cond
from ar_jax.backbones.conditions import ClassOrNullCondition, TextCondition
from ar_jax.nn.cross_attention import CrossAttention, Text
from ar_jax.nn.layers import RMSNorm

Array = jax.Array


class ClassFeatures(nn.Module, kw_only=True):
    """Learned features of every class, in place of a caption's.

    Condition pytree: ``{'label': int32 [B]}``; the label ``num_classes`` stands for null.
    """

    num_classes: int
    length: int
    features: int

    fields = ("label",)
    empty = ClassOrNullCondition.empty
    null = ClassOrNullCondition.null

    @nn.compact
    def __call__(self, cond: Cond) -> Text:
        """(features [B, T, F], bool [B, T])."""
        init = nn.initializers.normal(self.features**-0.5)
        shape = (self.length, self.features)
        table = self.param("class_features", init, (self.num_classes, *shape), jnp.float32)
        null = self.param("null_caption", init, shape, jnp.float32)
        label = cond["label"][:, None, None]
        chosen = table[jnp.minimum(cond["label"], self.num_classes - 1)]
        features = jnp.where(label == self.num_classes, null[None], chosen)
        return features, jnp.ones(features.shape[:2], bool)


class CaptionFeatures(nn.Module, kw_only=True):
    """Given features of captions, padded on either side.

    Condition pytree: as of `TextCondition`.

    Attributes:
        null_rows: of the learned features, of which the n-th takes the place of a dropped caption's
            n-th real row; None: ``length``.
    """

    length: int
    features: int
    null_rows: int | None = None

    fields = TextCondition.fields
    empty = TextCondition.empty
    null = TextCondition.null

    @nn.compact
    def __call__(self, cond: Cond) -> Text:
        """(features [B, T, F], bool [B, T]); T is the captions' own."""
        rows = self.length if self.null_rows is None else self.null_rows
        init = nn.initializers.normal(self.features**-0.5)
        null = self.param("null_caption", init, (rows, self.features), jnp.float32)
        real = cond["caption_mask"].astype(bool)
        place = jnp.clip(jnp.cumsum(real, axis=1) - 1, 0, rows - 1)
        caption = jnp.where(cond["dropped"][:, None, None], null[place], cond["caption"])
        return caption, real


class CaptionReader(nn.Module, kw_only=True):
    """Features normalised, then pooled to one vector and projected to the text that blocks see."""

    width: int
    pool_heads: int
    norm_epsilon: float
    init_std: float
    dtype: DTypeLike

    @nn.compact
    def __call__(self, text: Text) -> tuple[Array, Text]:
        """(vector float32 [B, 1, D], (features [B, T, D], bool [B, T]))."""
        features, real = text
        features = RMSNorm(epsilon=self.norm_epsilon, name="norm")(features).astype(self.dtype)
        init = nn.initializers.normal(self.init_std)
        pool = CrossAttention(
            width=self.width,
            heads=self.pool_heads,
            kernel_init=init,
            out_init=init,
            dtype=self.dtype,
            name="pool_attention",
        )
        vector = pool(None, (features, real)).astype(jnp.float32)

        def dense(name: str) -> nn.Dense:
            return nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name=name)

        hidden = jax.nn.gelu(dense("caption_up")(features), approximate=True)
        return vector, (dense("caption_down")(hidden), real)
