"""The device mesh, the sharding of a batch over it, and what is active while code is traced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
# A batch is split over both: fsdp is data parallelism that also splits the parameters.
BATCH_AXES = ("data", "fsdp")
# What `nn.with_logical_constraint` means by its names; other names stay unsharded.
ACTIVATIONS = (("batch", BATCH_AXES), ("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"))


def make_mesh(
    *, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Mesh with the axes data, fsdp and tensor over all devices (or those given).

    Args:
        data: replicas that split the batch. At most one of the three may be -1: the rest.
        fsdp: parts that split the batch, the parameters and the optimiser's state.
        tensor: parts that split heads, feed-forward width and vocabulary.

    Raises:
        ValueError: names the field of config.mesh, its value and the sizes that would do.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = jax.device_count() if devices is None else len(devices)
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(
                f"config.mesh.{name}={size} is not a size: use a positive number, or -1 for the "
                f"rest of the {count} devices"
            )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"config.mesh.{free[0]} and config.mesh.{free[1]} are both -1: only one axis can take "
            f"the rest of the {count} devices"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if count % fixed:
            raise ValueError(
                f"config.mesh.{free[0]}=-1 cannot take the rest: the other axes need {fixed} "
                f"devices ({_product(sizes)}) and {count} is no multiple of {fixed}"
            )
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"config.mesh asks for {fixed} devices ({_product(sizes)}) but there are {count}: set "
            f"one axis to -1, or sizes whose product is {count}"
        )
    return jax.make_mesh(
        tuple(sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices
    )


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)


def check_batch(mesh: Mesh, *, batch_size: int, accumulation: int) -> None:
    """Checks that every device gets the same number of rows in every microbatch.

    Raises:
        ValueError: names config.train.batch_size or accumulation, and the nearest good values.
    """
    for name, value in (("batch_size", batch_size), ("accumulation", accumulation)):
        if value < 1:
            raise ValueError(f"config.train.{name}={value} must be at least 1")
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if shards % jax.process_count():
        raise ValueError(
            f"config.mesh: data {mesh.shape['data']} x fsdp {mesh.shape['fsdp']} = {shards} must "
            f"be a multiple of the {jax.process_count()} processes, which load disjoint rows"
        )
    unit = shards * accumulation
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        fits = " or ".join(str(size) for size in (below, above) if size)
        raise ValueError(
            f"config.train.batch_size={batch_size} must be a multiple of {unit} = "
            f"config.train.accumulation {accumulation} x data {mesh.shape['data']} x fsdp "
            f"{mesh.shape['fsdp']} of config.mesh; use {fits}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over data and fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Global device arrays [B, ...] of this process's rows [B / processes, ...].

    Raises:
        ValueError: names the entry whose rows do not divide among the devices.
    """
    shards = math.prod(sharding.mesh.shape[axis] for axis in BATCH_AXES)
    for name, local in batch.items():
        rows = local.shape[0] * jax.process_count()
        if rows % shards:
            raise ValueError(
                f"batch[{name!r}] has {rows} rows, which do not divide among the {shards} parts of "
                "data x fsdp"
            )
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(local))
        for name, local in batch.items()
    }


def put_whole(tree: Any, places: Any) -> Any:
    """Arrays that every process has whole, as global arrays of the shardings ``places``."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    # `device_put` of an array that is on a device already would copy from host to host.
    def put(leaf: Any, place: NamedSharding) -> jax.Array:
        whole = np.asarray(leaf)
        return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])

    return jax.tree.map(put, tree, places)


def fetch(array: jax.Array) -> np.ndarray:
    """The whole array on this host, wherever its parts lie; all processes call it together."""
    if array.is_fully_addressable or array.is_fully_replicated:
        return np.asarray(jax.device_get(array))
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes bare PartitionSpecs and `nn.with_logical_constraint` refer to ``mesh``."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(ACTIVATIONS):
        yield
