"""What is read of our modules and gradients, in the layouts of golden cases."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from ar_jax.api import System
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.convert.places import Places, official_tensor
from ar_jax.nn.blocks import Block
from ar_jax.objectives.likelihood import Likelihood


def nchw(x: Any) -> np.ndarray:
    """[..., H, W, C] -> [..., C, H, W]."""
    return np.moveaxis(np.asarray(x), -1, -3)


def recorded_part(case: Case, name: str, images: np.ndarray) -> np.ndarray:
    """Of images [..., H, W] what was recorded: as the README says, else every n-th row and column.

    n is such that as many rows and columns come out as were recorded.
    """
    part = case.select(name, images)
    recorded = case.io.get(name, images)
    if part.shape == recorded.shape:
        return part
    step = -(-images.shape[-1] // recorded.shape[-1])
    return images[..., ::step, ::step]


def corner(array: Any, recorded: np.ndarray) -> np.ndarray:
    """The leading part of an array that is as large as the recorded one.

    Axes of one, at the end of convolutions and in front of tables, are left out where they were not
    recorded.
    """
    array = np.asarray(array)
    while array.ndim > recorded.ndim and 1 in (array.shape[-1], array.shape[0]):
        array = array[..., 0] if array.shape[-1] == 1 else array[0]
    same = array.ndim == recorded.ndim
    return array[tuple(map(slice, recorded.shape))] if same else array


def said(section: Mapping[str, Any], **names: str) -> dict[str, Any]:
    """Our options that official arguments speak of: ``width="dim"`` takes 'dim' if it is there."""
    return {ours: section[key] for ours, key in names.items() if section.get(key) is not None}


def find_key(keys: Iterable[str], name: str, others: Mapping[str, str]) -> str:
    """The official key that the name of a recorded gradient means.

    'layer2_attention_wqkv' is 'layers.2.attention.wqkv.weight', 'quant_conv_w' and 'quant_conv_b'
    are a weight and a bias, '_head' and '_slice' at the end say that a part was recorded. What is
    called otherwise is in ``others``.

    Raises:
        ValueError: there is no such key.
    """
    plain = re.sub("_(head|slice)$", "", name)
    plain = others.get(plain, plain)
    plain = re.sub("^layer(\\d+)", r"layers_\1", re.sub("_w$", "", re.sub("_b$", "_bias", plain)))
    for key in keys:
        if plain in (key, key.removesuffix(".weight").replace(".", "_")):
            return key
    raise ValueError(f"no tensor is known by the name of the gradient {name!r}")


def norms(places: Places, gradient: Any, keys: Sequence[str]) -> np.ndarray:
    """float64 [n], the L2 norm of each official tensor."""
    return np.array(
        [np.linalg.norm(official_tensor(places, gradient, k).astype(np.float64)) for k in keys]
    )


def named_gradients(
    case: Case, prefix: str, places: Places, gradient: Any, joint: str
) -> Iterator[tuple[str, Any]]:
    """PREFIX.KEY of every recorded key; names and norms of all, and their norm in all.

    Those two are called PREFIX, ``joint`` and 'names' or 'norms'. A tensor that was not recorded is
    left out if nothing flows into it: torch has no gradient of what was not used.
    """
    for name in case.io:
        if (key := name.removeprefix(f"{prefix}.")) in places and key != name:
            yield name, case.select(name, official_tensor(places, gradient, key))
    recorded = [str(name) for name in case.io.get(f"{prefix}{joint}names", places)]
    known = [name for name in recorded if name in places]
    others = [name for name in places if name not in recorded]
    missing = [key for key, n in zip(others, norms(places, gradient, others), strict=True) if n]
    length = norms(places, gradient, known + missing)
    yield f"{prefix}{joint}names", np.array(known + missing)
    yield f"{prefix}{joint}norms", length
    yield f"{prefix}.total_norm", np.linalg.norm(length)


def loss_and_gradient(system: System, params: Any, codes: jax.Array) -> Any:
    """(cond, order or None) -> ((loss, metrics), gradient) of the likelihood; compiled once."""
    objective = Likelihood(system=system, label_dropout=0.0)
    trained = {name: params[name] for name in ("backbone", "head")}

    @jax.jit
    def run(trained: Any, cond: Any, order: jax.Array | None) -> Any:
        batch = {"codes": codes, **cond} | ({} if order is None else {"order": order})

        def loss(trained: Any) -> Any:
            value, aux = objective.loss(trained, {}, params, batch, jax.random.key(0), False)
            return value, aux.metrics

        return jax.value_and_grad(loss, has_aux=True)(trained)

    return functools.partial(run, trained)


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
