"""What is read of our modules and gradients, in the layouts of golden cases."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ar_jax.api import System
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.convert.places import Places, official_tensor
from ar_jax.nn.blocks import Block


def nchw(x: Any) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def strided(images: np.ndarray, recorded: np.ndarray | None) -> np.ndarray:
    """Every n-th row and column of [..., H, W], as many as were recorded."""
    if recorded is None:
        return images
    step = -(-images.shape[-1] // recorded.shape[-1])
    return images[..., ::step, ::step]


def norms(places: Places, gradient: Any, keys: Sequence[str]) -> np.ndarray:
    """float64 [n], the L2 norm of each official tensor."""
    return np.array(
        [np.linalg.norm(official_tensor(places, gradient, k).astype(np.float64)) for k in keys]
    )


def block_states(
    system: System, params: Any, cond: Any, codes: jax.Array, count: int | None = None
) -> list[jax.Array]:
    """The residual stream [B, T, D] before the first block and after every one of ``count``."""
    backbone, unstacked = system.backbone.for_sampling(params["backbone"])
    unrolled = dataclasses.replace(system, backbone=backbone)
    states: list[jax.Array] = []

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, Block) and context.method_name == "__call__":
            states.extend([args[0], out[0]] if not states else [out[0]])
        return out

    @jax.jit
    def run(params: Any) -> list[jax.Array]:
        with nn.intercept_methods(record):
            teacher_forced(unrolled, params, cond, codes)
        return states[: None if count is None else count + 1]

    return run(params | {"backbone": unstacked})
