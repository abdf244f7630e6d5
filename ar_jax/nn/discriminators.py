"""Discriminators of adversarial training: images float32 [B, H, W, C] in [-1, 1] -> logits."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ar_jax.nn.conv import TORCH_INIT, conv

Array = jax.Array

# PatchGAN's own: normal draws of this deviation, around 0 for kernels and 1 for the norms' scales.
PATCH_STD = 0.02


class BatchNorm(nn.Module, kw_only=True):
    """Normalises every channel over batch and positions; affine, float32.

    With ``train`` the statistics are those of the whole call: under `jax.jit` of all devices' rows.
    They move the running ones, collection 'batch_stats' (`mean`, `var`, the latter unbiased), which
    are what counts without ``train``.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        width = x.shape[-1]
        scale = self.param("scale", _around_one, (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        means = self.variable("batch_stats", "mean", jnp.zeros, (width,))
        variances = self.variable("batch_stats", "var", jnp.ones, (width,))
        x = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            count = x.size // width
            mean = x.mean(axes)
            var = jnp.square(x - mean[None, None, None]).mean(axes)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                for running, now in ((means, mean), (variances, var * (count / max(count - 1, 1)))):
                    now = jax.lax.stop_gradient(now)
                    running.value = self.momentum * running.value + (1 - self.momentum) * now
        else:
            mean, var = means.value, variances.value
        slope = scale * jax.lax.rsqrt(var + self.epsilon)
        return (x - mean[None, None, None]) * slope[None, None, None] + bias[None, None, None]


class PatchDiscriminator(nn.Module, kw_only=True):
    """PatchGAN (arXiv:1611.07004) as VQGAN and LlamaGen have it: logits [B, h, w, 1] of patches.

    Attributes:
        channels: width of the first layer; doubled by every other one, eightfold at most.
        layers: strided ones; images need `least_size` pixels a side, 24 for 3 of them, 12 for 2.
    """

    channels: int = 64
    layers: int = 3
    dtype: DTypeLike = jnp.float32

    @property
    def least_size(self) -> int:
        """Pixels a side below which there is no logit."""
        return 3 * 2**self.layers  # the two last layers take a cell each

    def problem(self, image_shape: tuple[int, int, int]) -> str | None:
        """What is wrong with a field, which the text begins with; None: nothing."""
        if min(image_shape[:2]) < self.least_size:
            return (
                f"layers is {self.layers}, which needs images of {self.least_size} pixels a side, "
                f"but the tokenizer's are {image_shape[:2]}: use fewer"
            )
        return _not_positive(channels=self.channels, layers=self.layers)

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        def layer(x: Array, features: int, stride: int, index: int, bias: bool) -> Array:
            return nn.Conv(
                features,
                (4, 4),
                strides=stride,
                padding=1,
                use_bias=bias,
                kernel_init=nn.initializers.normal(PATCH_STD),
                dtype=self.dtype,
                name=f"conv{index}",
            )(x)

        x = _leaky(layer(x, self.channels, 2, 0, bias=True), 0.2)
        for i in range(1, self.layers + 1):
            stride = 2 if i < self.layers else 1
            x = layer(x, self.channels * min(2**i, 8), stride, i, bias=False)
            x = _leaky(BatchNorm(name=f"norm{i}")(x, train), 0.2)
        return layer(x, 1, 1, self.layers + 1, bias=True).astype(jnp.float32)


class StyleBlock(nn.Module, kw_only=True):
    """Two 3x3 convolutions, a blur and a strided one, beside a strided 1x1; half the resolution."""

    features: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = x
        for i in range(2):
            h = _leaky(conv(self.features, dtype=self.dtype, name=f"conv{i}")(h), 0.2)
        h = jnp.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
        h = blur(h, (1, 2, 1), stride=1, padding="VALID")
        strided: dict[str, Any] = dict(stride=2, dtype=self.dtype)
        h = conv(self.features, padding=((1, 1), (1, 1)), name="down", **strided)(h)
        x = conv(self.features, size=1, padding="VALID", name="shortcut", **strided)(x)
        return (x + h) / jnp.sqrt(jnp.asarray(2.0, x.dtype))


class StyleDiscriminator(nn.Module, kw_only=True):
    """StyleGAN's residual one (arXiv:1912.04958) as LlamaGen has it: one logit an image, [B, 1].

    Attributes:
        width: of all layers at 32 pixels and below; above it is halved with every doubling.
    """

    width: int = 512
    dtype: DTypeLike = jnp.float32

    def problem(self, image_shape: tuple[int, int, int]) -> str | None:
        """See `PatchDiscriminator.problem`."""
        return _not_positive(width=self.width)

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        first = conv(self._features(max(x.shape[1:3])), dtype=self.dtype, name="conv_in")
        x, level = _leaky(first(x), 0.2), 0
        while (size := max(x.shape[1:3])) > 4:
            features = self._features((size + 1) // 2)
            x = StyleBlock(features=features, dtype=self.dtype, name=f"block{level}")(x)
            level += 1
        x = _leaky(conv(self.width, dtype=self.dtype, name="conv_out")(x), 0.2)
        x = x.reshape(len(x), -1)
        hidden = nn.Dense(self.width, kernel_init=TORCH_INIT, dtype=self.dtype, name="hidden")
        x = _leaky(hidden(x), 0.2)
        output = nn.Dense(1, kernel_init=TORCH_INIT, dtype=self.dtype, name="output")
        return output(x).astype(jnp.float32)

    def _features(self, size: int) -> int:
        """Width at a resolution, which is rounded up to a power of two."""
        return max(self.width * 32 // max(1 << (size - 1).bit_length(), 32), 1)


class PooledStage(nn.Module, kw_only=True):
    """3x3, a blur that halves the resolution, group norm, leaky ReLU."""

    features: int
    groups: int
    dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = conv(self.features, dtype=self.dtype, name="conv")(x)
        x = blur(x, (1, 3, 3, 1), stride=2, padding="SAME")
        norm = nn.GroupNorm(
            self.groups, epsilon=1e-5, use_fast_variance=False, dtype=jnp.float32, name="norm"
        )
        return _leaky(norm(x), 0.1)


class PooledDiscriminator(nn.Module, kw_only=True):
    """1d-tokenizer's (TiTok, arXiv:2406.07550): blurred stages, pooled to as many logits always.

    Logits [B, pool, pool, 1]. The network itself sees images in [0, 1].

    Attributes:
        channels: of the first stage; doubled by every later one.
        stages: halvings of the resolution.
        pool: side of the map that the last stage's maxima are taken into.
        groups: of every group norm.
    """

    channels: int = 128
    stages: int = 3
    pool: int = 16
    groups: int = 32
    dtype: DTypeLike = jnp.float32

    def problem(self, image_shape: tuple[int, int, int]) -> str | None:
        """See `PatchDiscriminator.problem`."""
        if self.groups > 0 and self.channels % self.groups:
            return f"groups is {self.groups}, which does not divide channels {self.channels}"
        return _not_positive(channels=self.channels, stages=self.stages, pool=self.pool)

    @nn.compact
    def __call__(self, x: Array, train: bool = True) -> Array:
        x = (x + 1.0) / 2.0
        x = _leaky(conv(self.channels, size=5, dtype=self.dtype, name="conv_in")(x), 0.1)
        for i in range(self.stages):
            features = self.channels * 2**i
            x = PooledStage(
                features=features, groups=self.groups, dtype=self.dtype, name=f"stage{i}"
            )(x)
        x = adaptive_max_pool(x, self.pool)
        x = _leaky(conv(x.shape[-1], size=1, dtype=self.dtype, name="hidden")(x), 0.1)
        return conv(1, size=5, dtype=self.dtype, name="output")(x).astype(jnp.float32)


def blur(x: Array, taps: tuple[int, ...], *, stride: int, padding: str) -> Array:
    """Every channel of [B, H, W, C] with the outer product of ``taps``, whose sum becomes one."""
    line = np.asarray(taps, np.float64)
    kernel = np.outer(line, line) / line.sum() ** 2
    kernel = np.broadcast_to(kernel[:, :, None, None], (*kernel.shape, 1, x.shape[-1]))
    return jax.lax.conv_general_dilated(
        x,
        jnp.asarray(kernel, x.dtype),
        (stride, stride),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=x.shape[-1],
    )


def adaptive_max_pool(x: Array, size: int) -> Array:
    """[B, H, W, C] -> [B, size, size, C], maxima.

    Cell i covers n i / size to n (i + 1) / size of n rows. Edges are rounded outwards, so that
    cells overlap, and repeat where n is below ``size``.
    """
    for axis in (1, 2):
        n = x.shape[axis]
        first = [i * n // size for i in range(size)]
        last = [-(-(i + 1) * n // size) - 1 for i in range(size)]
        span = max(b - a for a, b in zip(first, last, strict=True)) + 1
        # What fills up the shorter windows is their own last cell, which changes no maximum.
        index = np.minimum(np.asarray(first)[:, None] + np.arange(span), np.asarray(last)[:, None])
        x = jnp.take(x, index, axis=axis).max(axis + 1)
    return x


def _not_positive(**fields: int) -> str | None:
    bad = ((name, value) for name, value in fields.items() if value < 1)
    return next((f"{name} is {value}; it must be at least 1" for name, value in bad), None)


def _leaky(x: Array, slope: float) -> Array:
    return jax.nn.leaky_relu(x, slope)


def _around_one(key: Array, shape: tuple[int, ...], dtype: DTypeLike = jnp.float32) -> Array:
    return 1.0 + PATCH_STD * jax.random.normal(key, shape, dtype)
