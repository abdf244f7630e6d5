"""A function of many images: batches of one size, split over this process's devices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


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
    run, (whole, rows) = _compiled(function, devices), shardings(devices)
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
    return jax.jit(function, in_shardings=shardings(devices), out_shardings=shardings(devices)[1])


def shardings(devices: tuple[jax.Device, ...]) -> tuple[NamedSharding, NamedSharding]:
    """(a copy on every device, rows split over them)."""
    mesh = Mesh(np.asarray(devices), ("data",))
    return NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
