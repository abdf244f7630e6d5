"""Norms of gradients parameter by parameter, in the parts that published models have."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.parallel.rules import path_name

Array = jax.Array

# A parameter of a scanned stack holds those of all its layers.
STACKED = r"(^|/)blocks/"
FUSED = re.compile(r"(^|/)attention/(query|key|value)/")  # one matrix in published models


def norm_sum(gradient: Any) -> Array:
    """The sum of the L2 norms of all parameters' gradients, float32 scalar.

    Layers of a stack count each for itself, and the projections of an attention to queries, keys
    and values as one.
    """
    squares: dict[str, Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        name = path_name(path)
        axes = tuple(range(1, leaf.ndim)) if re.search(STACKED, name) else None
        part = FUSED.sub(r"\1attention/fused/", name)
        squares[part] = squares.get(part, 0.0) + jnp.square(leaf.astype(jnp.float32)).sum(axes)
    return sum((jnp.sqrt(each).sum() for each in squares.values()), jnp.float32(0))
