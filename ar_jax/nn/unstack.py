"""Parameters of scanned stacks, as samplers want them: a tree for every layer, cast once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.typing import DTypeLike

Array = jax.Array


def unstack(params: dict[str, Any], stacks: Mapping[str, int], dtype: DTypeLike) -> dict[str, Any]:
    """Parameters whose scanned `ar_jax.nn.blocks.Stack`s are unrolled ones; the rest as it is.

    Args:
        params: of a module.
        stacks: depths of its stacks by their names: ``blocks`` becomes ``blocks_0`` ...
        dtype: what the blocks compute in. Their kernels become it, the same numbers that a call
            would cast them to, which then reads half the bytes.
    """
    return params | {name: _unrolled(params[name], depth, dtype) for name, depth in stacks.items()}


def _unrolled(stack: dict[str, Any], depth: int, dtype: DTypeLike) -> dict[str, Any]:
    def cast(path: tuple, leaf: Array) -> Array:
        return leaf.astype(dtype) if path[-1].key == "kernel" else leaf

    blocks = jax.tree.map_with_path(cast, stack["blocks"])
    layers = {f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], blocks) for i in range(depth)}
    return {name: value for name, value in stack.items() if name != "blocks"} | layers
