"""LPIPS's golden cases: both backbones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert import lpips
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section
from ar_jax.convert.parity.readings import nchw
from ar_jax.convert.part import to_params
from ar_jax.nn.lpips import (
    layer_distances,
    linear_weights,
    lpips_map,
    normalised,
    scaled,
    tapped,
)
from ar_jax.nn.lpips import lpips as distance

NOT_APPLICABLE: Mapping[str, str] = {}
# How a case calls a network: the names of its sub-models, and ours.
NAMES = {
    "vgg": ("vgg16_features", "lpips_vgg", "vgg"),
    "alex": ("alexnet_features", "lpips_alex", "alexnet"),
}


def inputs(case: Case) -> Sequence[str]:
    """Images, and features to normalise."""
    return ("*_x0", "*_x1", "norm_in")


def limits(case: Case) -> Mapping[str, float]:
    """Of gradients: one pooling that takes the other of two nearly equal pixels moves them so far.

    The case's images were chosen so that PyTorch, in both precisions, and XLA take the same ones,
    but XLA's convolutions round otherwise on another processor.
    """
    return {"*_grad_x0_*": 7e-3}


def sections(case: Case) -> Iterable[Section]:
    """The normalisation, and everything of each network."""
    yield Section(("norm_out",), lambda: _normalised(case))
    for name in NAMES:
        yield Section((f"{name}_*",), lambda name=name: _outputs(case, name))  # type: ignore[misc]


def load(case: Case, name: str) -> tuple[Any, str]:
    """(our parameters, our name) of the case's 'vgg' or 'alex'."""
    backbone, linear, network = NAMES[name]
    tensors = case.state_dict(backbone) | case.state_dict(linear)
    part = lpips.network({key: tensor.shape for key, tensor in tensors.items()})
    if part.section["network"] != network:
        raise ValueError(f"{case.name}: {backbone} is of {part.section['network']}")
    params = to_params(part, tensors, lpips.expected(part), f"{case.name} {name}")
    return jax.tree.map(jnp.asarray, params), network


def _normalised(case: Case) -> Outputs:
    yield "norm_out", nchw(normalised(jnp.moveaxis(case["norm_in"], 1, -1)))


def _outputs(case: Case, name: str) -> Outputs:
    params, network = load(case, name)
    x0, x1 = (jnp.moveaxis(case[f"{name}_x{i}"], 1, -1) for i in range(2))

    @jax.jit
    def run(params: Any, x0: jax.Array, x1: jax.Array) -> dict[str, Any]:
        taken, others = (tapped(params, scaled(x), network=network) for x in (x0, x1))
        plain, unscaled = (tapped(params, x, network=network) for x in (x0, x1))
        weights = linear_weights(params)
        # What [0, 1] images are to us, as the official flag has it.
        restated = [2 * ((x + 1) / 2) - 1 for x in (x0, x1)]
        gradient = jax.grad(lambda x: distance(params, x, x1, network=network).sum())(x0)
        return {
            "dist": distance(params, x0, x1, network=network),
            "layers": layer_distances(taken, others, weights),
            "grad": gradient,
            "taps": taken,
            "scaled": scaled(x0),
            "dist_swapped": distance(params, x1, x0, network=network),
            "dist_same": distance(params, x1, x1, network=network),
            "dist_normalize": distance(params, *restated, network=network),
            "spatial": lpips_map(params, x0, x1, network=network),
            "baseline": layer_distances(taken, others).sum(-1),
            "dist_v00_noscaling": layer_distances(plain, unscaled, weights).sum(-1),
        }

    found = run(params, x0, x1)
    gradient = np.asarray(found.pop("grad"))
    yield f"{name}_grad_x0_norm", np.sqrt(np.square(gradient, dtype=np.float64).sum((1, 2, 3)))
    yield f"{name}_grad_x0_slice", nchw(gradient)[..., ::5, ::5]
    yield f"{name}_scaled_slice", nchw(found.pop("scaled"))[..., ::9, ::9]
    yield f"{name}_spatial_slice", np.asarray(found.pop("spatial"))[:, ::7, ::7]
    for i, tap in enumerate(found.pop("taps"), start=1):
        channels, rows = (max(1, tap.shape[axis] // part) for axis, part in ((-1, 8), (1, 4)))
        yield f"{name}_relu{i}_slice", nchw(tap)[:, ::channels, ::rows, ::rows]
    for output, array in found.items():
        yield f"{name}_{output}", array
