"""Compiled calls of an objective, for its tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

BATCH = 16
KEY = jax.random.key(5)


@functools.partial(jax.jit, static_argnames=("objective", "train"))
def loss_of(objective, params, stats, frozen, batch, key=KEY, train=False) -> Any:
    return objective.loss(params, stats, frozen, batch, key, train)


@functools.partial(jax.jit, static_argnames="objective")
def gradient_of(objective, params, stats, frozen, batch, key=KEY) -> Any:
    def loss(params: Any) -> Any:
        return objective.loss(params, stats, frozen, batch, key, True)

    return jax.grad(loss, has_aux=True)(params)


def sharded(tree: Any) -> Any:
    """Rows over eight devices."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def replicated(tree: Any) -> Any:
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def close(a: Any, b: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=atol), a, b)
