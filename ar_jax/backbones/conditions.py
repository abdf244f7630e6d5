"""Conditions of a generator: a class label, or the features of a caption.

A condition gives the sequence its first rows (the prefix) and, for adaptive norms, one vector an
image. ``null`` makes it the unconditional one that classifier-free guidance needs.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cond

Array = jax.Array


class ClassCondition(nn.Module, kw_only=True):
    """A table of class embeddings whose last row, ``num_classes``, is the null class.

    Condition pytree: ``{'label': int32 [B]}``.

    Attributes:
        shared_from: the classes are the rows from this one on of a table given by the caller;
            None: the table is the condition's own.
    """

    num_classes: int
    width: int
    init_std: float
    shared_from: int | None = None

    fields = ("label",)

    @property
    def rows(self) -> int:
        """Number of prefix rows."""
        return 1

    def empty(self, batch_size: int) -> Cond:
        """A condition of the right shapes."""
        return {"label": jnp.zeros((batch_size,), jnp.int32)}

    @nn.compact
    def __call__(self, cond: Cond, table: nn.Embed | None) -> tuple[Array, Array | None]:
        """(prefix [B, 1, D], mask of real prefix rows: None, all are)."""
        if self.shared_from is not None:
            assert table is not None
            return table(self.shared_from + cond["label"])[:, None], None
        init = nn.initializers.normal(self.init_std)
        own = nn.Embed(self.num_classes + 1, self.width, embedding_init=init, name="class_embed")
        return own(cond["label"])[:, None], None

    def null(self, cond: Cond, drop: Array | None = None) -> Cond:
        """The condition with the labels of ``drop`` [B] (all if None) made null."""
        null = jnp.full_like(cond["label"], self.num_classes)
        return {"label": null if drop is None else jnp.where(drop, null, cond["label"])}


class ClassOrNullCondition(nn.Module, kw_only=True):
    """A table of class embeddings and, beside it, the null one: MAR's fake latent.

    Condition pytree: ``{'label': int32 [B]}``; the label ``num_classes`` stands for null.
    """

    num_classes: int
    width: int
    init_std: float

    fields = ("label",)
    null = ClassCondition.null
    empty = ClassCondition.empty

    @nn.compact
    def __call__(self, cond: Cond) -> Array:
        """[B, D]."""
        init = nn.initializers.normal(self.init_std)
        table = nn.Embed(self.num_classes, self.width, embedding_init=init, name="class_embed")
        null = self.param("null_embed", init, (1, self.width), jnp.float32)
        label = cond["label"]
        chosen = table(jnp.minimum(label, self.num_classes - 1))
        return jnp.where((label == self.num_classes)[:, None], null, chosen)


class TextCondition(nn.Module, kw_only=True):
    """Caption features through a two-layer projection, left-padded (LlamaGen's text models).

    Condition pytree: ``{'caption': float [B, T, F], 'caption_mask': bool [B, T],
    'dropped': bool [B]}``; dropped captions are replaced by learned features, their mask stays.
    """

    length: int
    features: int
    width: int
    init_std: float
    dtype: DTypeLike

    fields = ("caption", "caption_mask", "dropped")

    @property
    def rows(self) -> int:
        """Number of prefix rows."""
        return self.length

    def empty(self, batch_size: int) -> Cond:
        """A condition of the right shapes."""
        return {
            "caption": jnp.zeros((batch_size, self.length, self.features), jnp.float32),
            "caption_mask": jnp.ones((batch_size, self.length), bool),
            "dropped": jnp.zeros((batch_size,), bool),
        }

    @nn.compact
    def __call__(self, cond: Cond, table: nn.Embed | None) -> tuple[Array, Array]:
        """(prefix [B, T, D], mask of real prefix rows [B, T]); ``table`` is not used."""
        null = self.param(
            "null_caption",
            nn.initializers.normal(self.features**-0.5),
            (self.length, self.features),
            jnp.float32,
        )
        caption = jnp.where(cond["dropped"][:, None, None], null[None], cond["caption"])
        init = nn.initializers.normal(self.init_std)

        def dense(name: str) -> nn.Dense:
            return nn.Dense(
                self.width, use_bias=False, kernel_init=init, dtype=self.dtype, name=name
            )

        hidden = jax.nn.gelu(dense("caption_up")(caption), approximate=True)
        return dense("caption_down")(hidden), cond["caption_mask"].astype(bool)

    def null(self, cond: Cond, drop: Array | None = None) -> Cond:
        """The condition with the captions of ``drop`` [B] (all if None) dropped."""
        drop = jnp.ones_like(cond["dropped"]) if drop is None else drop | cond["dropped"]
        return cond | {"dropped": drop}
