"""Convolutional encoder and decoder of images: the VQGAN family's, shared by VAR and LlamaGen."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from ar_jax.nn.attention import attend

Array = jax.Array

# torch's default for convolutions: uniform(-1, 1) / sqrt(fan in).
TORCH_INIT: Initializer = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def conv(
    features: int,
    *,
    name: str | None,
    dtype: DTypeLike,
    size: int = 3,
    stride: int = 1,
    padding: str | tuple = "SAME",
) -> nn.Conv:
    """A square convolution with bias."""
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        kernel_init=TORCH_INIT,
        dtype=dtype,
        name=name,
    )


# Of group norms whose channels the groups asked for do not divide (Infinity).
SPARE_GROUPS = 24


def group_norm(x: Array, groups: int, *, name: str) -> Array:
    """Affine group norm, float32, epsilon 1e-6 as in every VQGAN."""
    count = SPARE_GROUPS if x.shape[-1] % groups else groups
    fields: dict[str, Any] = dict(epsilon=1e-6, use_fast_variance=False, dtype=jnp.float32)
    return nn.GroupNorm(count, **fields, name=name)(x)


class ResidualBlock(nn.Module, kw_only=True):
    """norm, SiLU, 3x3, norm, SiLU, 3x3, added to the input (1x1 if the width changes)."""

    features: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = jax.nn.silu(group_norm(x, self.groups, name="norm1"))
        h = conv(self.features, dtype=self.dtype, name="conv1")(h)
        h = jax.nn.silu(group_norm(h, self.groups, name="norm2"))
        h = conv(self.features, dtype=self.dtype, name="conv2")(h)
        if x.shape[-1] != self.features:
            x = conv(self.features, size=1, dtype=self.dtype, name="shortcut")(x)
        return x + h


class AttentionBlock(nn.Module, kw_only=True):
    """Single-head self-attention over all positions, 1x1 projections, residual."""

    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        batch, height, width, channels = x.shape
        h = group_norm(x, self.groups, name="norm")
        q, k, v = (
            conv(channels, size=1, dtype=self.dtype, name=name)(h).reshape(
                batch, height * width, 1, channels
            )
            for name in ("query", "key", "value")
        )
        h = attend(q, k, v, mask=None, scale=channels**-0.5).reshape(x.shape)
        return x + conv(channels, size=1, dtype=self.dtype, name="out")(h)


class Encoder(nn.Module, kw_only=True):
    """Images [B, H, W, C] -> features float32 [B, H/f, W/f, latent], f = patch * 2^(levels - 1).

    Attributes:
        channels: base width.
        multipliers: width factor of each level; a stride of two between levels.
        blocks: residual blocks a level.
        attention: attention in the middle and after each block of the ``attention_levels``.
        attention_levels: numbers of the levels; None: the last one.
        middle: residual blocks after the last level, with attention between the first two.
        patch: the images are first folded into patches of this side (1 in every release).
        groups: groups of every group norm, see `group_norm`.
    """

    latent: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: bool
    attention_levels: tuple[int, ...] | None = None
    middle: bool
    patch: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = dict(groups=self.groups, dtype=self.dtype)
        x = fold(x, self.patch)
        x = conv(self.channels, dtype=self.dtype, name="conv_in")(x)
        last = len(self.multipliers) - 1
        attending = _attending(self.attention, self.attention_levels, last)
        for level, factor in enumerate(self.multipliers):
            for i in range(self.blocks):
                features = self.channels * factor
                x = ResidualBlock(features=features, name=f"level{level}_block{i}", **common)(x)
                if level in attending:
                    x = AttentionBlock(name=f"level{level}_attention{i}", **common)(x)
            if level < last:
                # Zeros right and below only, as the official strided convolutions have it.
                x = conv(
                    x.shape[-1],
                    stride=2,
                    padding=((0, 1), (0, 1)),
                    dtype=self.dtype,
                    name=f"level{level}_down",
                )(x)
        if self.middle:
            x = _middle(x, self.attention, common)
        x = jax.nn.silu(group_norm(x, self.groups, name="norm_out"))
        x = conv(self.latent, dtype=self.dtype, name="conv_out")(x)
        return x.astype(jnp.float32)


class Decoder(nn.Module, kw_only=True):
    """Features [B, h, w, latent] -> images float32 [B, H, W, C], unclamped; mirrors `Encoder`.

    Levels are numbered by resolution, so the coarsest, which runs first, has the highest number.
    """

    image_channels: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: bool
    attention_levels: tuple[int, ...] | None = None
    middle: bool
    patch: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        common: dict[str, Any] = dict(groups=self.groups, dtype=self.dtype)
        last = len(self.multipliers) - 1
        attending = _attending(self.attention, self.attention_levels, last)
        x = conv(self.channels * self.multipliers[-1], dtype=self.dtype, name="conv_in")(x)
        if self.middle:
            x = _middle(x, self.attention, common)
        for level in range(last, -1, -1):
            features = self.channels * self.multipliers[level]
            for i in range(self.blocks):
                x = ResidualBlock(features=features, name=f"level{level}_block{i}", **common)(x)
                if level in attending:
                    x = AttentionBlock(name=f"level{level}_attention{i}", **common)(x)
            if level > 0:
                x = x.repeat(2, axis=1).repeat(2, axis=2)  # nearest neighbour
                x = conv(features, dtype=self.dtype, name=f"level{level}_up")(x)
        x = jax.nn.silu(group_norm(x, self.groups, name="norm_out"))
        x = conv(self.image_channels * self.patch**2, dtype=self.dtype, name="conv_out")(x)
        return unfold(x, self.patch).astype(jnp.float32)


def _attending(attention: bool, levels: tuple[int, ...] | None, last: int) -> tuple[int, ...]:
    """The levels with attention."""
    if not attention:
        return ()
    return (last,) if levels is None else levels


def _middle(x: Array, attention: bool, common: dict[str, Any]) -> Array:
    x = ResidualBlock(features=x.shape[-1], name="middle_block0", **common)(x)
    if attention:
        x = AttentionBlock(name="middle_attention", **common)(x)
    return ResidualBlock(features=x.shape[-1], name="middle_block1", **common)(x)


def fold(x: Array, patch: int) -> Array:
    """[B, H, W, C] -> [B, H/p, W/p, p * p * C]."""
    if patch == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h // patch, w // patch, patch * patch * c)


def unfold(x: Array, patch: int) -> Array:
    """The inverse of `fold`: [B, h, w, p * p * C] -> [B, h p, w p, C]."""
    if patch == 1:
        return x
    b, h, w, c = x.shape
    x = x.reshape(b, h, w, patch, patch, c // patch**2)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * patch, w * patch, c // patch**2)
