"""A tokenizer: an autoencoder around a quantiser."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ar_jax.schedules import Grid
from ar_jax.tokenizers.autoencoder import Autoencoder
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.contract import Quantized, Quantizer
from ar_jax.tokenizers.pooled_autoencoder import PooledAutoencoder
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer

Array = jax.Array


class Tokenizer(nn.Module, kw_only=True):
    """Images float32 [B, H, W, C] in [-1, 1] <-> codes in generation order.

    Codes are int32 [B, L], or int8 [B, L, bits] of a quantiser that keeps bits.
    """

    autoencoder: Autoencoder | PooledAutoencoder
    quantizer: Quantizer

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Grids of the code scales."""
        return self.quantizer.grids

    @property
    def trained(self) -> Tokenizer:
        """What training makes: all of it."""
        return self

    @property
    def codebook_size(self) -> int:
        """V."""
        return self.quantizer.codebook_size

    @property
    def bits(self) -> int:
        """Of a code that is kept as bits; 0 where codes are single numbers."""
        return self.quantizer.bits

    @property
    def index_size(self) -> int:
        """How many numbers `index` tells apart."""
        return self.quantizer.index_size

    def index(self, codes: Array) -> Array:
        """int32 [B, L]: codes as numbers below ``index_size``; no parameters are needed."""
        return self.quantizer.index(codes)

    @property
    def codes_shape(self) -> tuple[int, ...]:
        """(L,) or (L, bits), of one image's codes."""
        length = sum(rows * columns for rows, columns in self.grids)
        return (length, self.bits) if self.bits else (length,)

    @property
    def codes_dtype(self) -> Any:
        """Of codes: int8 of bits, else int32."""
        return jnp.int8 if self.bits else jnp.int32

    @property
    def encoding_shape(self) -> tuple[int, ...]:
        """Of what `encode` makes of one image: the same."""
        return self.codes_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        return self.autoencoder.image_shape

    def __call__(self, images: Array, mask: Array | None = None) -> tuple[Array, Quantized]:
        """Training's pass: (unclamped reconstruction [B, H, W, C], what the quantiser did).

        ``mask`` float32 [B] is 0 for padding rows; see `Quantizer.quantize`.
        """
        quantized = self.quantizer.quantize(self.autoencoder.encode(images), mask)
        return self.autoencoder.decode(quantized.features), quantized

    def encode(self, images: Array) -> Array:
        """Codes."""
        return self.quantizer.quantize(self.autoencoder.encode(images)).codes

    def codes_of(self, encoding: Array, noise: Array | None = None) -> Array:
        """The codes of what `encode` made of images: itself, nothing is left to draw."""
        return encoding

    def decode(self, codes: Array, steps: Array | int | None = None) -> Array:
        """Images in [-1, 1], of all codes or a part of them, see `Quantizer.lookup`."""
        return self.decode_features(self.quantizer.lookup(codes, steps))

    def decode_features(self, features: Array) -> Array:
        """Images in [-1, 1] of the quantiser's features [B, h, w, C]."""
        return jnp.clip(self.autoencoder.decode(features), -1.0, 1.0)

    def begin(self, batch_size: int) -> Any:
        """What a sampler carries before the first code is drawn."""
        return self.quantizer.begin(batch_size)

    def advance(self, state: Any, codes: Array, step: Array | int) -> tuple[Any, Array | None]:
        """(state, context of the next step) after drawing a step's codes [B, n]."""
        return self.quantizer.advance(state, codes, step)

    def contexts(self, codes: Array) -> Array:
        """What every step after the first is fed, all at once: teacher forcing."""
        return self.quantizer.contexts(codes)

    def flip(self, inputs: Array, flips: Array) -> tuple[Array, Array]:
        """(right codes, contexts) after flipped bits; see `MultiScaleBitwiseQuantizer.correct`.

        ``inputs`` are images float32 [B, H, W, C] or codes int8 [B, L, bits].
        """
        assert isinstance(self.quantizer, MultiScaleBitwiseQuantizer)
        if jnp.issubdtype(inputs.dtype, jnp.floating):
            return self.quantizer.correct(self.autoencoder.encode(inputs), flips)
        return self.quantizer.correct(self.quantizer.lookup(inputs), flips, inputs)

    def correct(self, codes: Array, drawn: Array, wrong: Array) -> tuple[Array, Array]:
        """(right codes, contexts) after wrong draws; see `MultiScaleQuantizer.correct`."""
        assert isinstance(self.quantizer, MultiScaleQuantizer)
        return self.quantizer.correct(codes, drawn, wrong)


def to_float(images: Array) -> Array:
    """uint8 [..., C] -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(images: Array) -> Array:
    """float32 in [-1, 1] -> uint8, rounded to the nearest."""
    return jnp.clip(jnp.round((images + 1.0) * 127.5), 0, 255).astype(jnp.uint8)
