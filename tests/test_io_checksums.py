"""Checksums of arrays: the same however an array is split, another for every change of it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ar_jax.io.checksums import find_change, tree_checksums
from ar_jax.parallel.mesh import make_mesh, use_mesh
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

TYPES = ["float32", "bfloat16", "int32", "uint8", "bool"]


def of(values: jax.Array) -> int:
    return tree_checksums({"x": values})["x"][1]


def reference(values: np.ndarray) -> int:
    """By Python's integers, entry by entry."""
    bits = values if values.dtype == bool else values.view(f"u{values.dtype.itemsize}")
    total = 0
    for index, entry in enumerate(bits.ravel().tolist()):
        mixed = (int(entry) + index * 0x9E3779B9) % 2**32
        mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B % 2**32
        mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 % 2**32
        total += mixed ^ mixed >> 16
    return total % 2**32


@pytest.mark.parametrize("dtype", TYPES)
def test_is_the_same_on_one_device_and_on_eight(dtype):
    """By rows, columns or both, or copied, and as counted by hand."""
    values = jax.random.normal(jax.random.key(1), (8, 16)) * 50
    whole = (values > 0) if dtype == "bool" else values.astype(dtype)
    expected = reference(np.asarray(whole))
    assert of(whole) == expected
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    for spec in (P(), P("fsdp"), P(None, ("data", "tensor")), P("tensor", "fsdp")):
        assert of(jax.device_put(whole, NamedSharding(mesh, spec))) == expected, spec


def test_all_leaves_of_a_tree_are_named():
    """Without entries or dimensions as well, and numpy's, but for those that devices change."""
    tree: dict[str, Any] = {
        "params": {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.int32(5), jnp.zeros((0, 4))]},
        "state": {"host": np.ones(3, np.float32), "wide": np.ones(3)},
    }
    sums = tree_checksums(tree)
    a, five = np.asarray(tree["params"]["a"]), np.asarray(tree["params"]["b"][0])
    assert sums == {
        "params/a": ["float32", reference(a)],
        "params/b/0": ["int32", reference(five)],
        "params/b/1": ["float32", 0],
        "state/host": ["float32", reference(tree["state"]["host"])],
    }


def test_a_mesh_around_the_call_changes_nothing():
    """Of arrays on one device or on none, as parameters are that were loaded or converted."""
    tree = {"one": jax.device_put(jnp.arange(6.0), jax.devices()[3]), "none": np.ones(4, np.int8)}
    sums = tree_checksums(tree)
    with use_mesh(make_mesh(data=2, fsdp=4)):
        assert tree_checksums(tree) == sums


def test_every_flipped_bit_is_seen():
    bits = np.random.default_rng(2).integers(0, 2**32, 4, np.uint32)
    rows = np.tile(bits, (33, 1))
    rows[np.arange(32), np.arange(32) % 4] ^= np.uint32(1) << np.arange(32, dtype=np.uint32)
    sums = tree_checksums([jnp.asarray(row) for row in rows])
    assert len({total for _, total in sums.values()}) == 33


def test_entries_that_change_places_are_seen():
    """Of powers of two, 2^k apart: a multiplier that is linear in the place misses such."""
    values = np.ones((16, 64, 64), np.float32)
    for n, place in enumerate([0, *(1 << k for k in range(12)), 3, 5, 96]):
        values[n].flat[place] = 0.5
    totals = [total for _, total in tree_checksums([*map(jnp.asarray, values)]).values()]
    assert len(set(totals)) == 16


def test_find_change_names_leaves():
    loaded = {name: ["float32", 1] for name in "abcdef"}
    assert find_change({}, loaded) is None
    assert find_change(loaded, loaded) is None
    assert find_change({"a": ["bfloat16", 2]}, loaded) is None  # loaded as another type
    assert find_change({"b": ["float32", 2]}, loaded) == (
        "b: not the values that were saved (checksums differ)"
    )
    everything = find_change({name: ["float32", 2] for name in "abcdefg"}, loaded)
    assert everything is not None and everything.startswith("a, b, c, d and 2 more: ")
