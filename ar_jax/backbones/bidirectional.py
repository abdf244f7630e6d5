"""The bidirectional transformer of codes that are partly hidden (MaskGIT, arXiv:2202.04200).

Rows of the sequence: the class, then one for every code, fed the code itself or, where it is
hidden, a mask. All rows see each other. The hidden state of a row predicts its code.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cond
from ar_jax.backbones.conditions import ClassCondition
from ar_jax.nn.layers import LayerNorm, activate
from ar_jax.nn.plain_stack import plain_stack
from ar_jax.schedules import Schedule

Array = jax.Array


class Bidirectional(nn.Module, kw_only=True):
    """Hidden states of all codes from those that are known.

    Attributes:
        schedule: of the codes; its steps matter to samplers only.
        vocab_size: V; the table of codes has one row more, the mask.
        num_classes: the condition, with a null class.
        mlp_hidden: None: 4 D.
        post_norm: norms after the sums of every block, and one of the embeddings (BERT, MaskGIT),
            in place of norms before the blocks' layers and one of the last sum.
        norm_epsilon, activation, remat, scan: see `ar_jax.nn.blocks`.
        output_layer: a last linear layer with activation and norm (BERT's, MaskGIT).
        attention_dropout, dropout: on attention weights; on the embeddings, after attention and
            after the feed-forward layers.
        init_std: of embeddings, positions and linear layers.
        attention: 'auto', 'xla' or 'splash', see `ar_jax.nn.splash.attend_all`.
    """

    schedule: Schedule
    vocab_size: int
    num_classes: int
    width: int
    depth: int
    heads: int
    mlp_hidden: int | None = None
    post_norm: bool = False
    norm_epsilon: float = 1e-6
    activation: str = "gelu"
    output_layer: bool = False
    attention_dropout: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    @property
    def conditioner(self) -> ClassCondition:
        """The condition module, also for its parameterless ``null`` and ``fields``."""
        return ClassCondition(
            num_classes=self.num_classes,
            width=self.width,
            init_std=self.init_std,
            parent=None,
            name="condition",
        )

    @nn.compact
    def __call__(self, codes: Array, cond: Cond, known: Array, *, train: bool = False) -> Array:
        """Hidden states float32 [B, L, D].

        Args:
            codes: int32 [B, L].
            cond: ``{'label': int32 [B]}``.
            known: bool [B, L]; the other codes have no influence.
            train: dropout on; needs the rng 'dropout'.
        """
        init = nn.initializers.normal(self.init_std)
        embed = nn.Embed(
            self.vocab_size + 1, self.width, embedding_init=init, name="token_embed"
        )  # the last row is the mask
        prefix, _ = self.conditioner.copy(parent=self, name="condition")(cond, None)
        tokens = embed(jnp.where(known, codes, self.vocab_size))
        rows = 1 + self.schedule.length
        position = self.param("position", init, (rows, self.width), jnp.float32)
        x = jnp.concatenate([prefix, tokens], axis=1) + position[None]
        if self.post_norm:
            x = self._norm("embed_norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x).astype(self.dtype)
        stack = plain_stack(
            name="stack",
            width=self.width,
            depth=self.depth,
            heads=self.heads,
            mlp_hidden=self.mlp_hidden or 4 * self.width,
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            hidden_dropout=0.0,
            init_std=self.init_std,
            attention=self.attention,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
            post_norm=self.post_norm,
        )
        x, _ = stack(x, None, None, None, None, 0, None, train)
        x = x[:, 1:].astype(jnp.float32)
        if not self.post_norm:
            x = self._norm("final_norm")(x)
        if self.output_layer:
            x = nn.Dense(self.width, kernel_init=init, dtype=self.dtype, name="output_embed")(x)
            x = self._norm("output_norm")(activate(x, self.activation))
        return x

    def _norm(self, name: str) -> LayerNorm:
        return LayerNorm(epsilon=self.norm_epsilon, name=name)
