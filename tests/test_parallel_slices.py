"""The axis over several slices: layout, batches, parameters, messages, and the same training."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.parallel.mesh import (
    batch_axes,
    batch_sharding,
    check_batch,
    fetch,
    lay_out_slices,
    make_mesh,
    put_batch,
    slice_numbers,
    use_mesh,
)
from ar_jax.parallel.rules import partition
from ar_jax.train.fields import call_with
from ar_jax.train.optimizer import build_optimizer
from ar_jax.train.program import build_program
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_training import ToyObjective, toy_config, toy_data

BATCH = ("slice", "data", "fsdp")


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (2, 4, 1, 1)),
        ({"data": 1, "fsdp": -1}, (2, 1, 4, 1)),
        ({"data": 2, "tensor": 2}, (2, 2, 1, 2)),
    ],
)
def test_the_other_axes_share_a_slice(sizes, shape):
    mesh = make_mesh(slices=2, **sizes)
    assert mesh.axis_names == (*BATCH, "tensor")
    assert tuple(mesh.shape.values()) == shape
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}
    assert list(mesh.devices.flat) == jax.devices()


def test_one_slice_is_the_mesh_without_the_axis():
    assert make_mesh(fsdp=2, slices=1) == make_mesh(fsdp=2)
    assert batch_axes(make_mesh()) == ("data", "fsdp")


def fake_devices(slices: int, each: int = 4) -> list[Any]:
    """Devices that say which slice they come from, the last slice's first."""
    return [
        SimpleNamespace(id=n, slice_index=n, platform="gpu", device_kind="fake")
        for n in reversed(range(slices))
        for _ in range(each)
    ]


def test_a_row_of_the_mesh_is_a_slice_of_the_devices():
    devices = fake_devices(2)
    assert slice_numbers(devices) == {0, 1}
    placed = lay_out_slices(2, (1, 2, 2), devices)
    assert placed.shape == (2, 1, 2, 2)
    assert [{device.slice_index for device in row.flat} for row in placed] == [{0}, {1}]
    assert slice_numbers(jax.devices()) == set()


@pytest.mark.parametrize("shape", [(4, 16, 1), (8, 8, 1), (1, 64, 1)])
def test_an_axis_may_take_a_part_of_a_dimension_of_the_torus(shape):
    """Of 8x8 chips 16 are two rows, or two columns: `jax.make_mesh` refuses them."""
    chips = [
        SimpleNamespace(
            id=n,
            platform="tpu",
            device_kind="TPU v6 lite",
            coords=(n % 8, n // 8, 0),
            core_on_chip=0,
            process_index=0,
            slice_index=0,
        )
        for n in range(64)
    ]
    placed = lay_out_slices(1, shape, chips)
    assert placed.shape == (1, *shape)
    assert sorted(chip.id for chip in placed.flat) == list(range(64))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"slices": 0}, r"config.mesh.slices=0 is not a number of slices: use 1, or another"),
        ({"slices": -1}, r"config.mesh.slices=-1 is not a number of slices"),
        ({"slices": 3}, r"slices=3 does not divide the 8 devices; use one of \[1, 2, 4, 8\]"),
        ({"slices": 2, "fsdp": 8}, r"the 4 devices of each of 2 slices: the other axes need 8 "),
        ({"slices": 2, "data": 8}, "asks for 8 .* there are 4 devices of each of 2 slices"),
        ({"slices": 2, "fsdp": 0}, "config.mesh.fsdp=0 is not a size: .* of each of 2 slices"),
        ({"slices": 1, "devices": fake_devices(2)}, "come from 2 slices: use config.mesh.slices=2"),
        ({"slices": 0, "devices": fake_devices(2)}, r"not a number of slices: use 2$"),
        ({"slices": 4, "devices": fake_devices(2)}, "slices=4 but the 8 devices come from 2"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_batches_are_split_over_slices_and_parameters_are_not():
    mesh = make_mesh(data=1, fsdp=2, tensor=2, slices=2)
    rows = np.arange(24, dtype=np.uint8).reshape(8, 3)
    placed = put_batch({"image": rows}, batch_sharding(mesh))["image"]
    assert placed.sharding == NamedSharding(mesh, P(BATCH))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(fetch(placed), rows)
    spec = partition("blocks/mlp/up/kernel", (64, 256), mesh)
    assert spec == P("fsdp", "tensor")
    check_batch(mesh, batch_size=8, accumulation=2)
    with pytest.raises(ValueError, match="slices 2 x data 1 x fsdp 2 of config.mesh; use 4 or 8"):
        check_batch(mesh, batch_size=6, accumulation=1)


def train(sizes: dict[str, Any]) -> tuple[list[Any], Any]:
    """Metrics of three steps and the parameters before them."""
    config = toy_config(train__batch_size=16)
    optimizer = call_with(build_optimizer, config.optimizer, "optimizer", steps=config.train.steps)
    data = toy_data(config)
    mesh = make_mesh(**sizes)
    objective = ToyObjective(noise=0.1)
    program = build_program(objective, optimizer, mesh, seed=0, ema_decay=0.9, accumulation=2)
    history = []
    with use_mesh(mesh):
        state = program.init()
        # Copies of their own: on CPUs `device_get` may show memory that is donated later.
        first = jax.tree.map(np.array, jax.device_get(state.params))
        for _ in range(3):
            batch = put_batch(next(data), program.rows)
            state, metrics = program.train_step(state, {}, batch, program.key)
            history.append(jax.device_get(metrics))
        last = jax.tree.map(np.array, jax.device_get(state.params))
    return history, (first, last)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_two_slices_train_as_one():
    expected, (first, last) = train({"data": -1})
    for sizes in ({"data": -1, "slices": 2}, {"data": 1, "fsdp": 2, "tensor": 2, "slices": 2}):
        got, (other_first, other_last) = train(sizes)
        jax.tree.map(np.testing.assert_array_equal, first, other_first)
        for name in ("loss", "accuracy", "grad_norm"):
            np.testing.assert_allclose(
                [m[name] for m in got], [m[name] for m in expected], rtol=2e-6, err_msg=name
            )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), last, other_last
        )
