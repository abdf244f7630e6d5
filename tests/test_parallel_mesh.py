"""Mesh sizes, batch placement and the messages for sizes that do not fit."""

from __future__ import annotations

import flax.linen as nn
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.parallel.mesh import batch_sharding, check_batch, fetch, make_mesh, put_batch, use_mesh


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({}, (8, 1, 1)),
        ({"data": -1, "fsdp": 4}, (2, 4, 1)),
        ({"data": 1, "fsdp": -1, "tensor": 2}, (1, 4, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_sizes(sizes, shape):
    mesh = make_mesh(**sizes)
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Auto}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"fsdp": 0}, "config.mesh.fsdp=0 is not a size"),
        ({"data": -2}, "config.mesh.data=-2 is not a size"),
        ({"data": -1, "tensor": -1}, "config.mesh.data and config.mesh.tensor are both -1"),
        ({"fsdp": 3}, "no multiple of 3"),
        ({"data": 2, "fsdp": 2}, "asks for 4 devices .* but there are 8"),
        ({"data": 16}, "asks for 16 devices"),
    ],
)
def test_bad_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(**sizes)


def test_check_batch():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    check_batch(mesh, batch_size=8, accumulation=2)
    with pytest.raises(ValueError, match=r"batch_size=12 must be a multiple of 8 .* use 8 or 16"):
        check_batch(mesh, batch_size=12, accumulation=2)
    with pytest.raises(ValueError, match=r"batch_size=2 .* use 4$"):
        check_batch(mesh, batch_size=2, accumulation=1)
    with pytest.raises(ValueError, match="accumulation=0 must be at least 1"):
        check_batch(mesh, batch_size=4, accumulation=0)


def test_put_batch_splits_rows_in_order_over_data_and_fsdp():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    rows = np.arange(24, dtype=np.uint8).reshape(8, 3)
    placed = put_batch({"image": rows}, batch_sharding(mesh))["image"]
    assert placed.sharding == NamedSharding(mesh, P(("data", "fsdp")))
    assert {shard.data.shape for shard in placed.addressable_shards} == {(2, 3)}
    assert placed.dtype == np.uint8
    np.testing.assert_array_equal(fetch(placed), rows)
    with pytest.raises(ValueError, match=r"batch\['image'\] has 6 rows.*the 4 parts"):
        put_batch({"image": rows[:6]}, batch_sharding(mesh))


def test_use_mesh_makes_activation_constraints_effective():
    def f(x):
        return nn.with_logical_constraint(x * 2.0, ("batch", None))

    x = jax.ShapeDtypeStruct((8, 4), np.float32)
    assert "sharding_constraint" not in jax.jit(f).lower(x).as_text()
    with use_mesh(make_mesh(data=4, fsdp=2)):
        assert jax.jit(f).lower(x).as_text().count("sharding_constraint") == 1
