"""The Inception-v3 of FID: the graph of 2015-12-05 with 1008 logits, its pooling and its resize.

It differs from the textbook network in what its pools do at the border, in the maximum that the
last block takes in place of an average, and in a resize without half-pixel centres; each of them
changes a FID. Parameters have the names of the published PyTorch copy; `ar_jax.convert.inception`
reads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

SIZE = 299
POOL, LOGITS = 2048, 1008
SPATIAL = (17, 17, 7)  # what sFID takes of the tensor 'mixed_6/conv'
EPSILON = 1e-3


@flax.struct.dataclass
class Features:
    """What the network says of N images, float32.

    Attributes:
        pool: [N, 2048], the mean over the last grid ('pool3'): of FID, precision and recall.
        spatial: [N, 2023], of sFID: 7 channels of a 17 x 17 grid, channels last.
        logits: [N, 1008] without the bias, as the inception score takes them.
    """

    pool: Any
    spatial: Any
    logits: Any


def inception_features(params: Any, images: Array) -> Features:
    """Features of uint8 images [N, H, W, 3] of any size; float32 in full precision.

    Args:
        params: of `Inception`.
        images: as they would be stored; [N, H, W, 1] is taken three times.
    """
    if images.shape[-1] == 1:
        images = jnp.repeat(images, 3, axis=-1)
    with jax.default_matmul_precision("highest"):
        return Inception().apply({"params": params}, preprocess(images))  # type: ignore[return-value]


@functools.cache
def param_shapes() -> Any:
    """ShapeDtypeStructs of the parameters."""
    images = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
    return jax.eval_shape(Inception().init, jax.random.key(0), images)["params"]


def preprocess(images: Array) -> Array:
    """Images [N, H, W, 3] in 0..255 -> what the network takes: [N, 299, 299, 3] in [-1, 1)."""
    return (resize(images) - 128.0) / 128.0


def resize(images: Array, size: int = SIZE) -> Array:
    """TensorFlow 1's bilinear resize to a square, float32: no antialias, no half-pixel centres.

    Row i is taken at i * (H / size): images are neither shifted nor blurred when they shrink.
    """
    x = images.astype(jnp.float32)
    for axis in (2, 1):  # along x first
        low, high, weight = _taps(x.shape[axis], size)
        shape = [1] * x.ndim
        shape[axis] = size
        first, second = (jnp.take(x, jnp.asarray(i), axis=axis) for i in (low, high))
        x = first + (second - first) * jnp.asarray(weight).reshape(shape)
    return x


@functools.cache
def _taps(source: int, target: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(first pixel, second pixel, float32 weight of the second) of every target pixel."""
    scale = np.float32(source / target)
    at = np.arange(target, dtype=np.float32) * scale
    low = np.floor(at).astype(np.int32)
    return low, np.minimum(low + 1, source - 1), at - low.astype(np.float32)


class Unit(nn.Module, kw_only=True):
    """Convolution without bias, batch norm with its running statistics, ReLU.

    Attributes:
        features: outputs.
        size: (rows, columns) of the kernel.
        stride: 1 or 2.
        padding: 'SAME' keeps the size, 'VALID' pads nothing.
    """

    features: int
    size: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        ones, zeros, width = nn.initializers.ones, nn.initializers.zeros, (self.features,)
        shape = (*self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.he_normal(), shape, jnp.float32)
        scale = self.param("scale", ones, width, jnp.float32)
        bias = self.param("bias", zeros, width, jnp.float32)
        mean = self.param("mean", zeros, width, jnp.float32)
        var = self.param("var", ones, width, jnp.float32)
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        scale = scale / jnp.sqrt(var + EPSILON)
        x = (x - mean.reshape(1, 1, 1, -1)) * scale.reshape(1, 1, 1, -1)
        x = x + bias.reshape(1, 1, 1, -1)
        self.sow("intermediates", "normed", x)
        return jax.nn.relu(x)


def average(x: Array) -> Array:
    """3 x 3 averages of the real pixels: the padding is not counted."""
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def maximum(x: Array, stride: int = 2) -> Array:
    """3 x 3 maxima, unpadded with stride 2 and of the same size with stride 1."""
    return nn.max_pool(x, (3, 3), (stride, stride), "VALID" if stride == 2 else "SAME")


class Block(nn.Module, kw_only=True):
    """Branches side by side, their outputs concatenated.

    Attributes:
        branches: of each the units one after the other: (name, features, size); a tuple of units in
            a unit's place runs them side by side on the same input.
        pool: of the last branch, before its unit; None: there is none.
        pooled: outputs of the unit 'branch_pool'; 0: the pool alone.
        stride: of the last unit of each branch; with 2 these pad nothing.
    """

    branches: tuple[tuple, ...]
    pool: Callable[[Array], Array]
    pooled: int = 0
    stride: int = 1

    @nn.compact
    def __call__(self, x: Array) -> Array:
        outputs = []
        for branch in self.branches:
            h = x
            for i, step in enumerate(branch):
                last = i == len(branch) - 1 and self.stride == 2
                more: dict[str, Any] = dict(stride=2, padding="VALID") if last else {}
                units = step if isinstance(step[0], tuple) else (step,)
                parts = [
                    Unit(features=features, size=size, name=name, **more)(h)
                    for name, features, size in units
                ]
                h = jnp.concatenate(parts, axis=-1)
            outputs.append(h)
        pooled = self.pool(x)
        if self.pooled:
            pooled = Unit(features=self.pooled, name="branch_pool")(pooled)
        return jnp.concatenate([*outputs, pooled], axis=-1)


ONE, THREE, FIVE = (1, 1), (3, 3), (5, 5)
WIDE, TALL = (1, 7), (7, 1)


def _block_a(pooled: int) -> dict[str, Any]:
    """35 x 35."""
    return dict(
        branches=(
            (("branch1x1", 64, ONE),),
            (("branch5x5_1", 48, ONE), ("branch5x5_2", 64, FIVE)),
            (("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE))
            + (("branch3x3dbl_3", 96, THREE),),
        ),
        pool=average,
        pooled=pooled,
    )


def _block_c(width: int) -> dict[str, Any]:
    """17 x 17."""
    return dict(
        branches=(
            (("branch1x1", 192, ONE),),
            (("branch7x7_1", width, ONE), ("branch7x7_2", width, WIDE), ("branch7x7_3", 192, TALL)),
            (("branch7x7dbl_1", width, ONE), ("branch7x7dbl_2", width, TALL))
            + (("branch7x7dbl_3", width, WIDE), ("branch7x7dbl_4", width, TALL))
            + (("branch7x7dbl_5", 192, WIDE),),
        ),
        pool=average,
        pooled=192,
    )


def _block_e(pool: Callable[[Array], Array]) -> dict[str, Any]:
    """8 x 8."""

    def crossed(name: str) -> tuple:
        return ((f"{name}a", 384, (1, 3)), (f"{name}b", 384, (3, 1)))

    return dict(
        branches=(
            (("branch1x1", 320, ONE),),
            (("branch3x3_1", 384, ONE), crossed("branch3x3_2")),
            (("branch3x3dbl_1", 448, ONE), ("branch3x3dbl_2", 384, THREE))
            + (crossed("branch3x3dbl_3"),),
        ),
        pool=pool,
        pooled=192,
    )


BLOCKS: dict[str, dict[str, Any]] = {
    "Mixed_5b": _block_a(32),
    "Mixed_5c": _block_a(64),
    "Mixed_5d": _block_a(64),
    "Mixed_6a": dict(
        branches=(
            (("branch3x3", 384, THREE),),
            (("branch3x3dbl_1", 64, ONE), ("branch3x3dbl_2", 96, THREE))
            + (("branch3x3dbl_3", 96, THREE),),
        ),
        pool=maximum,
        stride=2,
    ),
    "Mixed_6b": _block_c(128),
    "Mixed_6c": _block_c(160),
    "Mixed_6d": _block_c(160),
    "Mixed_6e": _block_c(192),
    "Mixed_7a": dict(
        branches=(
            (("branch3x3_1", 192, ONE), ("branch3x3_2", 320, THREE)),
            (("branch7x7x3_1", 192, ONE), ("branch7x7x3_2", 192, WIDE))
            + (("branch7x7x3_3", 192, TALL), ("branch7x7x3_4", 192, THREE)),
        ),
        pool=maximum,
        stride=2,
    ),
    "Mixed_7b": _block_e(average),
    "Mixed_7c": _block_e(functools.partial(maximum, stride=1)),
}
# name, outputs, kernel, stride, padding; or the name of a pool.
STEM: tuple[tuple, ...] = (
    ("Conv2d_1a_3x3", 32, THREE, 2, "VALID"),
    ("Conv2d_2a_3x3", 32, THREE, 1, "VALID"),
    ("Conv2d_2b_3x3", 64, THREE, 1, "SAME"),
    ("MaxPool_1",),
    ("Conv2d_3b_1x1", 80, ONE, 1, "VALID"),
    ("Conv2d_4a_3x3", 192, THREE, 1, "VALID"),
    ("MaxPool_2",),
)


class Inception(nn.Module):
    """Images [N, 299, 299, 3] in [-1, 1) -> `Features`."""

    @nn.compact
    def __call__(self, x: Array) -> Features:
        for name, *unit in STEM:
            if unit:
                features, size, stride, padding = unit
                x = Unit(features=features, size=size, stride=stride, padding=padding, name=name)(x)
            else:
                x = maximum(x)
            self.sow("intermediates", f"after_{name}", x)
        spatial = x
        for name, fields in BLOCKS.items():
            x = Block(name=name, **fields)(x)
            self.sow("intermediates", f"after_{name}", x)
            if name == "Mixed_6d":
                # The block's first branch comes first in it; the graph's name is mixed_6/conv.
                spatial = x[..., : SPATIAL[-1]].reshape(len(x), -1)
        pool = x.mean((1, 2))
        kernel = self.param(
            "fc_kernel", nn.initializers.lecun_normal(), (POOL, LOGITS), jnp.float32
        )
        self.param("fc_bias", nn.initializers.zeros, (LOGITS,), jnp.float32)
        return Features(pool=pool, spatial=spatial, logits=pool @ kernel)
