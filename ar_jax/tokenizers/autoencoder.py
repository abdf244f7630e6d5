"""The convolutional autoencoder around a quantiser."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.conv import Decoder, Encoder, conv
from ar_jax.schedules import Grid

Array = jax.Array


class Autoencoder(nn.Module, kw_only=True):
    """Images [B, H, W, C] <-> features [B, h, w, code_width].

    With ``moments`` it encodes into [B, h, w, 2 code_width]: means, then log-variances.

    Attributes:
        image_size: (H, W), or one number for squares; a multiple of the downsampling.
        image_channels: C.
        latent: channels between the encoder and the projection to the codes.
        code_width: channels of a code vector.
        channels, multipliers, attention, middle, patch, groups: see `ar_jax.nn.conv.Encoder`.
        decoder_multipliers: of the decoder, as many; None: ``multipliers``.
        encoder_blocks, decoder_blocks: residual blocks a level.
        encoder_attention, decoder_attention: levels with attention after each block, 0 the finest;
            None: the last one. Without ``attention`` there is none, in the middle neither.
        projection: kernel side of the convolutions around the quantiser (VAR 3, LlamaGen 1); 0:
            there are none (Infinity), and ``latent`` is ``code_width``.
    """

    image_size: int | tuple[int, int]
    image_channels: int
    latent: int
    code_width: int
    channels: int
    multipliers: tuple[int, ...]
    decoder_multipliers: tuple[int, ...] | None = None
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    attention: bool = True
    encoder_attention: tuple[int, ...] | None = None
    decoder_attention: tuple[int, ...] | None = None
    middle: bool = True
    patch: int = 1
    groups: int = 32
    projection: int = 1
    moments: bool = False
    dtype: DTypeLike = jnp.float32

    @property
    def downsample(self) -> int:
        """f, image pixels a latent cell spans."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, C)."""
        size = self.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return height, width, self.image_channels

    @property
    def grid(self) -> Grid:
        """(h, w) of the latent."""
        height, width, _ = self.image_shape
        if height % self.downsample or width % self.downsample:
            raise ValueError(
                f"tokenizer.autoencoder.image_size {self.image_size} is not a multiple of the "
                f"downsampling {self.downsample} (patch {self.patch}, {len(self.multipliers)} "
                "multipliers)"
            )
        return height // self.downsample, width // self.downsample

    def setup(self) -> None:
        common: dict[str, Any] = dict(
            channels=self.channels,
            attention=self.attention,
            middle=self.middle,
            patch=self.patch,
            groups=self.groups,
            dtype=self.dtype,
        )
        doubled = 2 if self.moments else 1
        self.encoder = Encoder(
            latent=doubled * self.latent,
            multipliers=self.multipliers,
            blocks=self.encoder_blocks,
            attention_levels=self.encoder_attention,
            **common,
        )
        self.decoder = Decoder(
            image_channels=self.image_channels,
            multipliers=self.decoder_multipliers or self.multipliers,
            blocks=self.decoder_blocks,
            attention_levels=self.decoder_attention,
            **common,
        )
        if self.projection:
            self.to_code = conv(
                doubled * self.code_width, size=self.projection, dtype=jnp.float32, name=None
            )
            self.from_code = conv(self.latent, size=self.projection, dtype=self.dtype, name=None)

    def encode(self, images: Array) -> Array:
        """float32 [B, h, w, code_width or twice that] of images [B, H, W, C] in [-1, 1]."""
        features = self.encoder(images)
        return self.to_code(features) if self.projection else features

    def decode(self, features: Array) -> Array:
        """Unclamped float32 images [B, H, W, C] of features [B, h, w, code_width]."""
        return self.decoder(self.from_code(features) if self.projection else features)
