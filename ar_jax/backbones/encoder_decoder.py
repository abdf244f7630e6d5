"""The masked encoder-decoder transformer of continuous codes (MAR, arXiv:2406.11838).

The encoder sees the codes that are known behind a buffer of class embeddings; the decoder sees its
output and mask tokens at all other positions. Both attend in all directions. The decoder's hidden
states, at every position, are the condition of a head. Without an encoder (EAR, arXiv:2505.07812)
the decoder sees embedded codes.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.api import Cond
from ar_jax.backbones.conditions import ClassOrNullCondition
from ar_jax.nn.blocks import Stack
from ar_jax.nn.layers import LayerNorm
from ar_jax.nn.plain_stack import plain_stack
from ar_jax.schedules import Schedule

Array = jax.Array


class EncoderDecoder(nn.Module, kw_only=True):
    """Hidden states of all codes from those that are known.

    Attributes:
        schedule: of the codes; its steps matter to samplers only.
        code_width: C, numbers in a code.
        num_classes: the condition.
        width, depth, heads: of the encoder; of depth 0 there is none, nor the norm and position
            table in front of it and the table behind the decoder, and ``width`` is the decoder's.
        decoder_width, decoder_depth, decoder_heads: of the decoder.
        buffer: rows of the class embedding in front of the codes.
        mlp_ratio: the feed-forward layers are int(width * mlp_ratio) wide.
        norm_epsilon, activation, remat, scan: see `ar_jax.nn.blocks`.
        attention: 'auto', 'xla' or 'splash', see `ar_jax.nn.splash.attend_all`.
        attention_dropout, dropout: on attention weights; after attention and twice in the
            feed-forward layers.
        init_std: of embeddings, position tables and linear layers.
    """

    schedule: Schedule
    code_width: int
    num_classes: int
    width: int
    depth: int
    heads: int | None = None
    decoder_width: int
    decoder_depth: int
    decoder_heads: int
    buffer: int
    mlp_ratio: float = 4.0
    norm_epsilon: float = 1e-6
    activation: str = "gelu"
    attention_dropout: float = 0.0
    dropout: float = 0.0
    init_std: float = 0.02
    remat: str = "none"
    attention: str = "auto"
    scan: bool = True
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        length, init = self.schedule.length, nn.initializers.normal(self.init_std)

        def table(name: str, rows: int, width: int) -> Array:
            return self.param(name, init, (rows, width), jnp.float32)

        def dense(width: int, name: str) -> nn.Dense:
            kernel_init = nn.initializers.xavier_uniform()
            return nn.Dense(width, kernel_init=kernel_init, dtype=self.dtype, name=name)

        def norm(name: str) -> LayerNorm:
            return LayerNorm(epsilon=self.norm_epsilon, name=name)

        self.condition = ClassOrNullCondition(
            num_classes=self.num_classes, width=self.width, init_std=self.init_std
        )
        self.token_embed = dense(self.width, "token_embed")
        if self.depth:
            assert self.heads is not None
            self.encoder_position = table("encoder_position", self.buffer + length, self.width)
            self.encoder_input_norm = norm("encoder_input_norm")
            self.encoder = self._stack(self.depth, self.width, self.heads, "encoder")
            self.encoder_norm = norm("encoder_norm")
            self.decoder_embed = dense(self.decoder_width, "decoder_embed")
        self.mask_token = table("mask_token", 1, self.decoder_width)
        self.decoder_position = table("decoder_position", self.buffer + length, self.decoder_width)
        self.decoder = self._stack(
            self.decoder_depth, self.decoder_width, self.decoder_heads, "decoder"
        )
        self.decoder_norm = norm("decoder_norm")
        if self.depth:
            self.hidden_position = table("hidden_position", length, self.decoder_width)

    @property
    def conditioner(self) -> ClassOrNullCondition:
        """The condition module, for its parameterless ``null`` and ``fields``."""
        return ClassOrNullCondition(
            num_classes=self.num_classes, width=self.width, init_std=self.init_std, parent=None
        )

    @property
    def hidden_width(self) -> int:
        """Width of the hidden states."""
        return self.decoder_width

    def __call__(self, codes: Array, cond: Cond, known: Array, *, train: bool = False) -> Array:
        """Hidden states float32 [B, L, decoder_width].

        Args:
            codes: float32 [B, L, C].
            cond: ``{'label': int32 [B]}``.
            known: bool [B, L]; the other codes have no influence.
            train: dropout on; needs the rng 'dropout'.
        """
        return self.decode(self.encode(codes, cond, known, train=train), known, train=train)

    def reveal(
        self,
        codes: Array,
        cond: Cond,
        order: Array,
        count: Array,
        *,
        most: int,
        train: bool = False,
    ) -> Array:
        """As `__call__` where the last ``count`` codes of every order are known.

        Only the last ``most`` rows of the order enter the encoder, which is cheaper where few codes
        are known.

        Args:
            order: int32 [B, L], permutations of the positions.
            count: int32 scalar, at most ``most``.
        """
        batch, length = order.shape
        positions = order[:, length - most :]
        known = jnp.broadcast_to(jnp.arange(most) >= most - count, (batch, most))
        rows = jnp.take_along_axis(codes, positions[..., None], axis=1)
        encoded = self.encode(rows, cond, known, positions, train=train)
        return self.decode(encoded, known, positions, train=train)

    def encode(
        self,
        codes: Array,
        cond: Cond,
        known: Array | None,
        positions: Array | None = None,
        *,
        train: bool = False,
    ) -> Array:
        """What the decoder is fed, [B, buffer + N, width]; rows of unknown codes mean nothing.

        Args:
            codes: float32 [B, N, C].
            known: bool [B, N]: nothing attends to the others, which equals leaving them out; None:
                all.
            positions: int32 [B, N], where the codes belong; None: N = L, in order.
        """
        batch = len(codes)
        buffer = self.condition(cond)[:, None]
        tokens = self.token_embed(codes.astype(self.dtype)).astype(jnp.float32)
        if not self.depth:
            buffer = jnp.broadcast_to(buffer, (batch, self.buffer, self.width))
            return jnp.concatenate([buffer, tokens], axis=1)
        table = self.encoder_position[self.buffer :]
        buffer = buffer + self.encoder_position[None, : self.buffer]
        tokens = tokens + (table[None] if positions is None else table[positions])
        x = jnp.concatenate([buffer, tokens], axis=1)
        x = self.encoder_input_norm(x).astype(self.dtype)
        mask = None
        if known is not None:
            always = jnp.ones((batch, self.buffer), bool)
            mask = jnp.concatenate([always, known], axis=1)
        x, _ = self.encoder(x, None, None, mask, None, 0, None, train)
        return self.encoder_norm(x)

    def decode(
        self,
        encoded: Array,
        known: Array | None,
        positions: Array | None = None,
        *,
        train: bool = False,
    ) -> Array:
        """Hidden states of all positions, float32 [B, L, decoder_width].

        Args:
            encoded: of `encode`, with the same ``known`` and ``positions``.
        """
        batch, length = len(encoded), self.schedule.length
        x = encoded
        if self.depth:
            x = self.decoder_embed(x.astype(self.dtype)).astype(jnp.float32)
        buffer, tokens = x[:, : self.buffer], x[:, self.buffer :]
        if positions is None:
            assert known is not None
            tokens = jnp.where(known[..., None], tokens, self.mask_token[None])
        else:
            places = positions if known is None else jnp.where(known, positions, length)
            empty = jnp.broadcast_to(self.mask_token[None], (batch, length, self.decoder_width))
            tokens = empty.at[jnp.arange(batch)[:, None], places].set(tokens, mode="drop")
        x = jnp.concatenate([buffer, tokens], axis=1) + self.decoder_position[None]
        x, _ = self.decoder(x.astype(self.dtype), None, None, None, None, 0, None, train)
        hidden = self.decoder_norm(x)[:, self.buffer :]
        return hidden + self.hidden_position[None] if self.depth else hidden

    def _stack(self, depth: int, width: int, heads: int, name: str) -> Stack:
        return plain_stack(
            name=name,
            width=width,
            depth=depth,
            heads=heads,
            mlp_hidden=int(width * self.mlp_ratio),
            norm_epsilon=self.norm_epsilon,
            activation=self.activation,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
            hidden_dropout=self.dropout,
            init_std=self.init_std,
            attention=self.attention,
            remat=self.remat,
            scan=self.scan,
            dtype=self.dtype,
        )
