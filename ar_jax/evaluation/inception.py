"""FID's Inception-v3 over many images: batches of one size, split over this process's devices."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.io.network_file import FAMILY, check_network, read_network
from ar_jax.nn.inception import Features, inception_features, param_shapes

HOW = (
    "convert pt_inception-2015-12-05-6726825d.pth (of the releases of "
    "github.com/mseitzer/pytorch-fid) with experiments/convert.py --family=inception"
)


@dataclasses.dataclass(frozen=True)
class InceptionNetwork:
    """Call it on uint8 images.

    Attributes:
        params: of `ar_jax.nn.inception.Inception`.
        about: what their file says of itself: the SHA-256 of the official file among it.
        devices: that share a batch.
    """

    params: Any
    about: dict[str, Any]
    devices: tuple[jax.Device, ...]

    def __call__(self, images: np.ndarray, batch_size: int = 64) -> Features:
        """`Features` of images uint8 [N, H, W, 3], as numpy arrays; memory grows with N alone.

        Args:
            images: of any size; with one channel, it is taken three times.
            batch_size: images at a time, rounded up to a multiple of the devices.

        Raises:
            ValueError: images of another type or shape.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
            raise ValueError(
                f"images: {images.dtype} {images.shape}, but Inception takes uint8 [N, H, W, 3]"
            )
        return apply_in_batches(
            inception_features, self.params, images, batch_size=batch_size, devices=self.devices
        )


def load_inception(path: str | Path) -> InceptionNetwork:
    """Reads a converted Inception network and puts it on all local devices.

    Raises:
        ValueError: no such file, or none of this network; says where it comes from.
    """
    try:
        about, params = read_network(path)
    except ValueError as error:
        raise ValueError(f"{error}: {HOW}") from error
    if about.get(FAMILY) != "inception":
        raise ValueError(f"{path} is of the family {about.get(FAMILY)!r}, not 'inception': {HOW}")
    check_network(path, params, param_shapes())
    devices = tuple(jax.local_devices())
    return InceptionNetwork(jax.device_put(params, _shardings(devices)[0]), about, devices)


def apply_in_batches(
    function: Callable[[Any, jax.Array], Any],
    params: Any,
    images: np.ndarray,
    *,
    batch_size: int,
    devices: tuple[jax.Device, ...],
) -> Any:
    """``function(params, images)``, each of whose outputs has the images' rows, in batches.

    The last batch is filled up with zeros, so that one program does.

    Returns:
        Its outputs for all images [N, ...], as numpy arrays.

    Raises:
        ValueError: a batch size below 1, or no images.
    """
    if batch_size < 1 or not len(images):
        raise ValueError(f"{len(images)} images in batches of {batch_size}: at least 1 of each")
    run, (whole, rows) = _compiled(function, devices), _shardings(devices)
    params = jax.device_put(params, whole)
    size = -(-batch_size // len(devices)) * len(devices)
    filled: list[np.ndarray] = []
    structure: Any = None
    for start in range(0, len(images), size):
        batch = images[start : start + size]
        count = len(batch)
        if count < size:
            filler = np.zeros((size - count, *images.shape[1:]), images.dtype)
            batch = np.concatenate([batch, filler])
        outputs, structure = jax.tree.flatten(
            jax.device_get(run(params, jax.device_put(batch, rows)))
        )
        if not filled:
            filled = [np.empty((len(images), *out.shape[1:]), out.dtype) for out in outputs]
        for target, out in zip(filled, outputs, strict=True):
            target[start : start + count] = out[:count]
    return jax.tree.unflatten(structure, filled)


@functools.cache
def _compiled(function: Callable, devices: tuple[jax.Device, ...]) -> Callable:
    return jax.jit(function, in_shardings=_shardings(devices), out_shardings=_shardings(devices)[1])


def _shardings(devices: tuple[jax.Device, ...]) -> tuple[NamedSharding, NamedSharding]:
    """(a copy on every device, rows split over them)."""
    mesh = Mesh(np.asarray(devices), ("data",))
    return NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
