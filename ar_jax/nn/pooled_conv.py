"""MaskGIT's convolutional encoder and decoder (arXiv:2202.04200): average pooling, no attention.

Differs from `ar_jax.nn.conv` in its downsampling, in the biases that its convolutions lack, and in
residual blocks that change the width: those do not add their input (see `PlainResidualBlock`).
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from ar_jax.nn.conv import TORCH_INIT, group_norm

Array = jax.Array


def conv(features: int, *, size: int, bias: bool, dtype: DTypeLike, name: str) -> nn.Conv:
    """A square convolution that keeps the resolution."""
    return nn.Conv(
        features,
        (size, size),
        padding="SAME",
        use_bias=bias,
        kernel_init=TORCH_INIT,
        dtype=dtype,
        name=name,
    )


class PlainResidualBlock(nn.Module, kw_only=True):
    """norm, SiLU, 3x3, norm, SiLU, 3x3 without biases, added to the input.

    Where the width changes, what is added is a 1x1 convolution of the block's own output h, so
    that the input only reaches the result through h. The released weights are trained like this.
    """

    features: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        def plain(size: int, name: str) -> nn.Conv:
            return conv(self.features, size=size, bias=False, dtype=self.dtype, name=name)

        h = jax.nn.silu(group_norm(x, self.groups, name="norm1"))
        h = plain(3, "conv1")(h)
        h = jax.nn.silu(group_norm(h, self.groups, name="norm2"))
        h = plain(3, "conv2")(h)
        return h + (x if x.shape[-1] == self.features else plain(1, "shortcut")(h))


class PooledEncoder(nn.Module, kw_only=True):
    """Images [B, H, W, C] -> features float32 [B, H/f, W/f, latent], f = 2^(levels - 1).

    Attributes:
        latent: channels of a feature.
        channels: base width.
        multipliers: width factor of each level; 2x2 average pooling between levels.
        blocks: residual blocks of a level, and again after the last level.
        groups: groups of every group norm.
    """

    latent: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = dict(groups=self.groups, dtype=self.dtype)
        x = conv(self.channels, size=3, bias=False, dtype=self.dtype, name="conv_in")(x)
        for level, factor in enumerate(self.multipliers):
            if level:
                x = nn.avg_pool(x, (2, 2), strides=(2, 2))
            for i in range(self.blocks):
                features = self.channels * factor
                name = f"level{level}_block{i}"
                x = PlainResidualBlock(features=features, name=name, **common)(x)
        x = _middle(x, self.blocks, common)
        x = jax.nn.silu(group_norm(x, self.groups, name="norm_out"))
        x = conv(self.latent, size=1, bias=True, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


class PooledDecoder(nn.Module, kw_only=True):
    """Features [B, h, w, latent] -> images float32 [B, H, W, C], unclamped.

    Levels are numbered by resolution, so the coarsest, which runs first, has the highest number.
    """

    image_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = dict(groups=self.groups, dtype=self.dtype)
        widths = [self.channels * factor for factor in self.multipliers]
        x = conv(widths[-1], size=3, bias=True, dtype=self.dtype, name="conv_in")(x)
        x = _middle(x, self.blocks, common)
        for level in range(len(widths) - 1, -1, -1):
            for i in range(self.blocks):
                name = f"level{level}_block{i}"
                x = PlainResidualBlock(features=widths[level], name=name, **common)(x)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                name = f"level{level}_up"
                x = conv(widths[level], size=3, bias=True, dtype=self.dtype, name=name)(x)
        x = jax.nn.silu(group_norm(x, self.groups, name="norm_out"))
        x = conv(self.image_channels, size=3, bias=True, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


def _middle(x: Array, blocks: int, common: dict[str, Any]) -> Array:
    for i in range(blocks):
        x = PlainResidualBlock(features=x.shape[-1], name=f"middle_block{i}", **common)(x)
    return x
