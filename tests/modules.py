"""Flax modules under jit: a program a call, instead of one an operation."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax


@functools.partial(jax.jit, static_argnames=("module", "method"))
def init(module: nn.Module, key: jax.Array, *args: Any, method: str | None = None) -> Any:
    """The parameters of ``module``."""
    return module.init(key, *args, method=method)["params"]


@functools.partial(jax.jit, static_argnames=("module", "method", "static"))
def apply(
    module: nn.Module,
    params: Any,
    *args: Any,
    method: str | Callable | None = None,
    static: tuple = (),
) -> Any:
    """What ``module`` (or a method) gives for ``args`` and then the ``static`` arguments."""
    return module.apply({"params": params}, *args, *static, method=method)
