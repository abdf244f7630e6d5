"""MaskGIT's autoencoder around a quantiser: what RAR and TiTok build on."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.pooled_conv import PooledDecoder, PooledEncoder
from ar_jax.schedules import Grid

Array = jax.Array


class PooledAutoencoder(nn.Module, kw_only=True):
    """Images [B, H, W, C] in [-1, 1] <-> features [B, h, w, code_width], without projections.

    The networks themselves see and make images in [0, 1].

    Attributes:
        image_size: (H, W), or one number for squares; a multiple of the downsampling.
        image_channels: C.
        code_width: channels of the features, which are the code vectors'.
        channels, multipliers, blocks, groups: see `ar_jax.nn.pooled_conv.PooledEncoder`.
    """

    image_size: int | tuple[int, int]
    image_channels: int
    code_width: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int = 2
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    @property
    def downsample(self) -> int:
        """f, image pixels a latent cell spans."""
        return 2 ** (len(self.multipliers) - 1)

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
                f"downsampling {self.downsample} of {len(self.multipliers)} multipliers"
            )
        return height // self.downsample, width // self.downsample

    def setup(self) -> None:
        common: dict[str, Any] = dict(
            channels=self.channels,
            multipliers=self.multipliers,
            blocks=self.blocks,
            groups=self.groups,
            dtype=self.dtype,
        )
        self.encoder = PooledEncoder(latent=self.code_width, **common)
        self.decoder = PooledDecoder(image_channels=self.image_channels, **common)

    def encode(self, images: Array) -> Array:
        """float32 [B, h, w, code_width] of images [B, H, W, C] in [-1, 1]."""
        return self.encoder((images + 1.0) / 2.0)

    def decode(self, features: Array) -> Array:
        """Unclamped float32 images [B, H, W, C] of features [B, h, w, code_width]."""
        return 2.0 * self.decoder(features) - 1.0
