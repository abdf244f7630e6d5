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
        null_class: whether the table has that row; without it there is no unconditional model, so
            neither guidance nor label dropout.
        shared_from: the classes are the rows from this one on of a table given by the caller;
            None: the table is the condition's own.
    """

    num_classes: int
    width: int
    init_std: float
    null_class: bool = True
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
        rows = self.num_classes + self.null_class
        own = nn.Embed(rows, self.width, embedding_init=init, name="class_embed")
        return own(cond["label"])[:, None], None

    def null(self, cond: Cond, drop: Array | None = None) -> Cond:
        """The condition with the labels of ``drop`` [B] (all if None) made null.

        Raises:
            ValueError: there is no null class.
        """
        if not self.null_class:
            raise ValueError(
                f"backbone.null_class is False: the table has the {self.num_classes} classes and "
                "no null one, which guidance and label dropout need; use a guidance scale of 1 and "
                "objective.label_dropout=0"
            )
        return _null_labels(cond, drop, self.num_classes)


class ClassOrNullCondition(nn.Module, kw_only=True):
    """A table of class embeddings and, beside it, the null one: MAR's fake latent.

    Condition pytree: ``{'label': int32 [B]}``; the label ``num_classes`` stands for null.
    """

    num_classes: int
    width: int
    init_std: float

    fields = ("label",)
    empty = ClassCondition.empty

    def null(self, cond: Cond, drop: Array | None = None) -> Cond:
        """The condition with the labels of ``drop`` [B] (all if None) made null."""
        return _null_labels(cond, drop, self.num_classes)

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
    Of the T rows of a caption and those of the learned features the first ``length`` are read.

    Attributes:
        null_rows: of the learned features; None: ``length``.
    """

    length: int
    features: int
    width: int
    init_std: float
    dtype: DTypeLike
    null_rows: int | None = None

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
        """(prefix [B, length, D], mask of real prefix rows); ``table`` is not used."""
        null = self.param(
            "null_caption",
            nn.initializers.normal(self.features**-0.5),
            (self.length if self.null_rows is None else self.null_rows, self.features),
            jnp.float32,
        )
        # Rows are projected one by one, so those that the prefix has no room for can go first.
        caption, mask = (cond[name][:, : self.length] for name in ("caption", "caption_mask"))
        if len(null) >= self.length:
            dropped = cond["dropped"][:, None, None]
            caption = jnp.where(dropped, null[None, : self.length], caption)
        init = nn.initializers.normal(self.init_std)

        def dense(name: str) -> nn.Dense:
            return nn.Dense(
                self.width, use_bias=False, kernel_init=init, dtype=self.dtype, name=name
            )

        hidden = jax.nn.gelu(dense("caption_up")(caption), approximate=True)
        return dense("caption_down")(hidden), mask.astype(bool)

    def null(self, cond: Cond, drop: Array | None = None) -> Cond:
        """The condition with the captions of ``drop`` [B] (all if None) dropped.

        Raises:
            ValueError: the learned features are fewer rows than the prefix.
        """
        if self.null_rows is not None and self.null_rows < self.length:
            raise ValueError(
                f"backbone.caption_null_rows is {self.null_rows}, fewer than caption_length "
                f"{self.length}: such a model has no unconditional caption; use a guidance scale "
                "of 1 and objective.label_dropout=0"
            )
        drop = jnp.ones_like(cond["dropped"]) if drop is None else drop | cond["dropped"]
        return cond | {"dropped": drop}


def _null_labels(cond: Cond, drop: Array | None, null_class: int) -> Cond:
    null = jnp.full_like(cond["label"], null_class)
    return {"label": null if drop is None else jnp.where(drop, null, cond["label"])}
