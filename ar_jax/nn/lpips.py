"""LPIPS v0.1 (arXiv:1801.03924): the distance of two images in the features of a trained network.

Parameters are ``{'backbone': {'conv0': {'kernel', 'bias'}, ...}, 'linear': {'layer0': [C], ...}}``,
a backbone's convolutions under torchvision's numbers. `ar_jax.convert.lpips` reads them from the
official files.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

Array = jax.Array

# ImageNet's means and deviations, restated for images in [-1, 1].
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
EPSILON = 1e-10
# Pixels of the shorter side at which the last map has one.
SMALLEST = {"vgg": 16, "alexnet": 31}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution and its ReLU.

    Attributes:
        index: of torchvision's ``features``.
        features: outputs.
        size, stride, padding: of the convolution, square.
        pool: side of the max pooling with stride 2 in front of it; 0: none.
        tap: its output is one of the five that are compared.
    """

    index: int
    features: int
    size: int = 3
    stride: int = 1
    padding: int = 1
    pool: int = 0
    tap: bool = False


def _vgg(*stages: tuple[int, tuple[int, ...]]) -> tuple[Layer, ...]:
    return tuple(
        Layer(
            index=index,
            features=features,
            pool=2 if stage and index == indices[0] else 0,
            tap=index == indices[-1],
        )
        for stage, (features, indices) in enumerate(stages)
        for index in indices
    )


NETWORKS: dict[str, tuple[Layer, ...]] = {
    "vgg": _vgg(
        (64, (0, 2)), (128, (5, 7)), (256, (10, 12, 14)), (512, (17, 19, 21)), (512, (24, 26, 28))
    ),
    "alexnet": (
        Layer(index=0, features=64, size=11, stride=4, padding=2, tap=True),
        Layer(index=3, features=192, size=5, padding=2, pool=3, tap=True),
        Layer(index=6, features=384, pool=3, tap=True),
        Layer(index=8, features=256, tap=True),
        Layer(index=10, features=256, tap=True),
    ),
}


class Backbone(nn.Module, kw_only=True):
    """Scaled images [B, H, W, 3] -> the five tapped feature maps [B, h, w, C], after their ReLU."""

    network: str

    @nn.compact
    def __call__(self, x: Array) -> list[Array]:
        taps = []
        for layer in NETWORKS[self.network]:
            if layer.pool:
                x = nn.max_pool(x, (layer.pool, layer.pool), (2, 2))
            x = nn.Conv(
                layer.features,
                (layer.size, layer.size),
                strides=layer.stride,
                padding=layer.padding,
                name=f"conv{layer.index}",
            )(x)
            x = jax.nn.relu(x)
            if layer.tap:
                taps.append(x)
        return taps


def lpips(params: Any, images: Array, references: Array, *, network: str) -> Array:
    """The distance of each image from its reference, float32 [B].

    Args:
        params: see the module's docstring.
        images, references: float32 [B, H, W, 3] in [-1, 1], or [B, H, W, 1], whose channel is then
            taken three times.
        network: 'vgg' (of tokenizer training) or 'alexnet' (of most published scores): their
            distances are different numbers.

    Raises:
        ValueError: an unknown network, or images of another number of channels or too small.
    """
    ours, theirs = (_features(params, x, network) for x in (images, references))
    return layer_distances(ours, theirs, linear_weights(params)).sum(-1)


def lpips_map(params: Any, images: Array, references: Array, *, network: str) -> Array:
    """Where they differ: float32 [B, H, W], the layers' maps enlarged (bilinearly) and summed."""
    ours, theirs = (_features(params, x, network) for x in (images, references))
    shape = images.shape[:3]
    maps = layer_maps(ours, theirs, linear_weights(params))
    return sum(
        (jax.image.resize(m, shape, "bilinear", antialias=False) for m in maps), jnp.zeros(shape)
    )


def _features(params: Any, images: Array, network: str) -> list[Array]:
    check_images(images.shape, network=network)
    return tapped(params, scaled(images), network=network)


def param_shapes(network: str) -> Any:
    """ShapeDtypeStructs of the parameters; see `lpips` for the names and what is raised."""
    _check(network)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    backbone = jax.eval_shape(Backbone(network=network).init, jax.random.key(0), images)["params"]
    widths = [layer.features for layer in NETWORKS[network] if layer.tap]
    linear = {
        f"layer{i}": jax.ShapeDtypeStruct((width,), jnp.float32) for i, width in enumerate(widths)
    }
    return {"backbone": backbone, "linear": linear}


def scaled(images: Array) -> Array:
    """Images [B, H, W, 3 or 1] in [-1, 1] as the backbones take them; float32 [B, H, W, 3]."""
    shift, scale = (jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 3) for x in (SHIFT, SCALE))
    return (images.astype(jnp.float32) - shift) / scale


def check_images(shape: tuple[int, ...], *, network: str) -> None:
    """Raises ValueError if images [..., H, W, C] are none that the network can compare."""
    _check(network)
    if shape[-1] not in (1, 3):
        raise ValueError(f"images have {shape[-1]} channels; LPIPS takes 3, or 1")
    if min(shape[-3:-1]) < SMALLEST[network]:
        raise ValueError(
            f"images have {shape[-3]}x{shape[-2]} pixels; {network!r} takes at least "
            f"{SMALLEST[network]}x{SMALLEST[network]}"
        )


def tapped(params: Any, images: Array, *, network: str) -> list[Array]:
    """The tapped features of scaled images."""
    return Backbone(network=network).apply({"params": params["backbone"]}, images)  # type: ignore[return-value]


def linear_weights(params: Any) -> list[Array]:
    """Of the layers, each [C]."""
    return [params["linear"][f"layer{i}"] for i in range(len(params["linear"]))]


def layer_distances(
    features: Sequence[Array], references: Sequence[Array], weights: Sequence[Array] | None = None
) -> Array:
    """What each layer adds to the distance, float32 [B, layers].

    Args:
        features, references: maps [B, h, w, C] of the layers.
        weights: of the layers' channels; None: all one.
    """
    maps = layer_maps(features, references, weights)
    return jnp.stack([m.mean((1, 2)) for m in maps], axis=-1)


def layer_maps(
    features: Sequence[Array], references: Sequence[Array], weights: Sequence[Array] | None = None
) -> list[Array]:
    """Weighted squared difference of the normalised features of each layer, float32 [B, h, w]."""
    maps = []
    for i, (a, b) in enumerate(zip(features, references, strict=True)):
        square = jnp.square(normalised(a) - normalised(b))
        maps.append(square.sum(-1) if weights is None else square @ weights[i])
    return maps


def normalised(features: Array) -> Array:
    """f / (|f| + 1e-10) over the last axis, float32; zero, and so its gradient, where f is."""
    features = features.astype(jnp.float32)
    square = jnp.square(features).sum(-1, keepdims=True)
    # The root's gradient at zero is infinite, and times zero it would be NaN.
    some = square > 0
    length = jnp.sqrt(jnp.where(some, square, 1.0))
    return jnp.where(some, features / (length + EPSILON), 0.0)


def _check(network: str) -> None:
    if network not in NETWORKS:
        raise ValueError(f"network {network!r} is none of {', '.join(NETWORKS)}")
