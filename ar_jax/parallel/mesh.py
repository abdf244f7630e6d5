"""The device mesh, the sharding of a batch over it, and what is active while code is traced."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
# In front of AXES where there are several slices. Each holds all parameters: what crosses the DCN
# between slices, far slower than the ICI inside, is then little more than the gradients.
SLICE = "slice"
# A batch is split over all that the mesh has: fsdp is data parallelism that also splits the
# parameters.
BATCH_AXES = (SLICE, "data", "fsdp")
# What `nn.with_logical_constraint` means by its names, besides batch; others stay unsharded.
ACTIVATIONS = (("heads", "tensor"), ("mlp", "tensor"), ("vocab", "tensor"))


def make_mesh(
    *,
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    slices: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """Mesh with the axes data, fsdp and tensor over all devices (or those given).

    With several slices they are the axes of each, and the axis slice comes before them.

    Args:
        data: replicas that split the batch. At most one of data, fsdp and tensor may be -1: the
            rest of a slice's devices.
        fsdp: parts that split the batch, the parameters and the optimiser's state.
        tensor: parts that split heads, feed-forward width and vocabulary.
        slices: that split the batch over DCN, as many as the devices say there are. Devices that
            do not say (those of CPUs) are cut up in their order.

    Raises:
        ValueError: names the field of config.mesh, its value and the sizes that would do.
    """
    devices = jax.devices() if devices is None else devices
    _check_slices(slices, devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    count = len(devices) // slices
    where = f"{count} devices" if slices == 1 else f"{count} devices of each of {slices} slices"
    for name, size in sizes.items():
        if size != -1 and size < 1:
            raise ValueError(
                f"config.mesh.{name}={size} is not a size: use a positive number, or -1 for the "
                f"rest of the {where}"
            )
    free = [name for name, size in sizes.items() if size == -1]
    if len(free) > 1:
        raise ValueError(
            f"config.mesh.{free[0]} and config.mesh.{free[1]} are both -1: only one axis can take "
            f"the rest of the {where}"
        )
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if free:
        if count % fixed:
            raise ValueError(
                f"config.mesh.{free[0]}=-1 cannot take the rest of the {where}: the other axes "
                f"need {fixed} ({_product(sizes)}) and {count} is no multiple of {fixed}"
            )
        sizes[free[0]] = count // fixed
    elif fixed != count:
        raise ValueError(
            f"config.mesh asks for {fixed} devices ({_product(sizes)}) but there are {where}: set "
            f"one axis to -1, or sizes whose product is {count}"
        )
    placed = lay_out_slices(slices, tuple(sizes.values()), devices)
    if slices == 1:
        return Mesh(placed[0], AXES, axis_types=(AxisType.Auto,) * len(AXES))
    return Mesh(placed, (SLICE, *AXES), axis_types=(AxisType.Auto,) * (1 + len(AXES)))


def slice_numbers(devices: Sequence[Any]) -> set[int]:
    """Numbers of the slices that the devices come from; empty for devices that do not say."""
    if devices[0].platform == "cpu":
        return set()
    return {device.slice_index for device in devices if hasattr(device, "slice_index")}


def lay_out_slices(slices: int, shape: tuple[int, ...], devices: Sequence[Any]) -> np.ndarray:
    """Devices [slices, *shape]: a slice in each row, laid out as its links are.

    An axis may take a part of one of the torus's dimensions (16 of 8x8), which has fewer links:
    better than to refuse the sizes.
    """
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)[None]
    if not slice_numbers(devices):
        return np.asarray(devices).reshape(slices, *shape)
    return mesh_utils.create_hybrid_device_mesh(
        (1, *shape),
        (slices, *(1 for _ in shape)),
        devices,
        allow_split_physical_axes=True,
    )


def _check_slices(slices: int, devices: Sequence[Any]) -> None:
    count, found = len(devices), len(slice_numbers(devices))
    if slices < 1:
        raise ValueError(
            f"config.mesh.slices={slices} is not a number of slices: use {found or 1}"
            + ("" if found else f", or another divisor of the {count} devices")
        )
    if found and slices != found:
        raise ValueError(
            f"config.mesh.slices={slices} but the {count} devices come from {found} slices: use "
            f"config.mesh.slices={found}"
        )
    if count % slices:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ValueError(
            f"config.mesh.slices={slices} does not divide the {count} devices; use one of "
            f"{divisors}"
        )


def _product(sizes: Mapping[str, int]) -> str:
    return " x ".join(f"{name} {size}" for name, size in sizes.items() if size != -1)


def batch_axes(mesh: Mesh | AbstractMesh) -> tuple[str, ...]:
    """The axes of ``mesh`` that a batch is split over."""
    return tuple(axis for axis in BATCH_AXES if axis in mesh.shape)


def _batch_parts(mesh: Mesh | AbstractMesh) -> tuple[int, str]:
    """(parts that a batch is split into, their product by the fields of config.mesh)."""
    fields = {axis: "slices" if axis == SLICE else axis for axis in batch_axes(mesh)}
    sizes = {field: mesh.shape[axis] for axis, field in fields.items()}
    return math.prod(sizes.values()), _product(sizes)


def check_batch(mesh: Mesh, *, batch_size: int, accumulation: int) -> None:
    """Checks that every device gets the same number of rows in every microbatch.

    Raises:
        ValueError: names config.train.batch_size or accumulation, and the nearest good values.
    """
    for name, value in (("batch_size", batch_size), ("accumulation", accumulation)):
        if value < 1:
            raise ValueError(f"config.train.{name}={value} must be at least 1")
    shards, product = _batch_parts(mesh)
    if shards % jax.process_count():
        raise ValueError(
            f"config.mesh: {product} = {shards} must be a multiple of the {jax.process_count()} "
            "processes, which load disjoint rows"
        )
    unit = shards * accumulation
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        fits = " or ".join(str(size) for size in (below, above) if size)
        raise ValueError(
            f"config.train.batch_size={batch_size} must be a multiple of {unit} = "
            f"config.train.accumulation {accumulation} x {product} of config.mesh; use {fits}"
        )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows split over slices, data and fsdp."""
    return NamedSharding(mesh, P(batch_axes(mesh)))


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Global device arrays [B, ...] of this process's rows [B / processes, ...].

    Raises:
        ValueError: names the entry whose rows do not divide among the devices.
    """
    shards, product = _batch_parts(sharding.mesh)
    for name, local in batch.items():
        rows = local.shape[0] * jax.process_count()
        if rows % shards:
            raise ValueError(
                f"batch[{name!r}] has {rows} rows, which do not divide among the {shards} parts of "
                f"{product}"
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
    with jax.set_mesh(mesh), nn.logical_axis_rules((("batch", batch_axes(mesh)), *ACTIVATIONS)):
        yield


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What a program over the mesh is compiled with, for `jax.jit`.

    A TPU's compiler would turn the product with a weight that is gathered from n devices into n
    products, each beside the transfer of the next part. Ours are too small to gain by it: by the
    compiler's own estimate a step of VAR-d16 over fsdp 16 takes 416 ms in place of 240.
    """
    if mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
