"""Samplers with narrower weights: bfloat16, or int8 with a scale for every output channel.

    sampler = with_weights(CachedSampler.create(system, params), "int8")

Lossy: what is drawn is not what the weights as trained draw; `distance` measures by how much. The
kernels of backbone and head are narrowed, everything else and the tokenizer stay as they are. A
kernel is widened where it is multiplied, which a TPU's or GPU's compiler does inside the product. A
CPU's does it once a call, before the first step: there int8 saves what lies in memory between
calls, and neither time nor the peak.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cond, Params
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.plain import all_logits

WEIGHTS = ("float32", "bfloat16", "int8")
NARROWED = ("backbone", "head")
# Axes that the kernel of a module of this name is multiplied over, from the first on; else one.
CONTRACTED = {"out": 2}


@flax.struct.dataclass
class Int8:
    """A kernel as ``values * scale``, rounded to the nearest: off by at most half a scale."""

    values: Array  # int8, -127 ... 127
    scale: Array  # float32 of as many axes, 1 where the product sums

    @classmethod
    def of(cls, kernel: Array, contracted: int) -> Int8:
        """Of a kernel whose first ``contracted`` axes are summed over."""
        axes = tuple(range(contracted))
        largest = jnp.abs(kernel).max(axes, keepdims=True).astype(jnp.float32)
        scale = jnp.where(largest > 0, largest / 127, 1.0)
        return cls(values=jnp.round(kernel / scale).astype(jnp.int8), scale=scale)

    def widened(self) -> Array:
        """Float32."""
        return self.values.astype(jnp.float32) * self.scale


@dataclasses.dataclass(frozen=True)
class Widening:
    """A Linen module whose parameters may be `Int8`: they are widened where it is applied."""

    module: Any

    def apply(self, variables: dict[str, Params], *arguments: Any, **options: Any) -> Any:
        """As the module's."""
        params = jax.tree.map(_widened, variables["params"], is_leaf=_is_int8)
        return self.module.apply(variables | {"params": params}, *arguments, **options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "module":  # asked for before there are fields
            raise AttributeError(name)
        return getattr(self.module, name)


def with_weights(sampler: Any, weights: str) -> Any:
    """The sampler, of any kind that has ``system`` and ``params``, with narrower kernels.

    Args:
        sampler: as its ``create`` made it.
        weights: 'float32' (as it is), 'bfloat16' or 'int8'.

    Raises:
        ValueError: another name.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights={weights!r} must be one of {WEIGHTS}")
    if weights == "float32":
        return sampler

    def narrowed(path: tuple, leaf: Array) -> Any:
        if path[-1].key != "kernel":
            return leaf
        if weights == "bfloat16":
            return leaf.astype(jnp.bfloat16)
        return Int8.of(leaf, CONTRACTED.get(path[-2].key, 1) if leaf.ndim > 2 else 1)

    params = dict(sampler.params)
    for part in NARROWED:
        params[part] = jax.tree.map_with_path(narrowed, params[part])
    system = sampler.system
    if weights == "int8":
        modules = {part: Widening(getattr(system, part)) for part in NARROWED}
        system = dataclasses.replace(system, **modules)
    return dataclasses.replace(sampler, system=system, params=params)


def distance(
    sampler: Any, narrow: Any, cond: Cond, guidance: Guidance | None = None
) -> dict[str, float]:
    """What narrower weights change, along the codes that ``sampler`` draws greedily.

    Args:
        sampler, narrow: two `ar_jax.sampling.loop.CachedSampler`s of one system.
        cond: of the images, [B].
        guidance: of the greedy draws; the logits compared are the conditional ones.

    Returns:
        'largest_logit_error', 'mean_logit_error' and, for scale, 'logit_deviation', of logits given
        the same codes; 'same_next_code': the share of codes whose largest logit is the same;
        'same_code': of the codes that both draw greedily on their own, where one that differs may
        change all after it.
    """
    greedy = dict(knobs=Knobs(temperature=0.0), guidance=guidance)
    codes, others = (one(cond, **greedy).codes for one in (sampler, narrow))
    wide, thin = (all_logits(one.system, one.params, cond, codes) for one in (sampler, narrow))
    error = jnp.abs(wide - thin)
    found = {
        "largest_logit_error": error.max(),
        "mean_logit_error": error.mean(),
        "logit_deviation": wide.std(),
        "same_next_code": (wide.argmax(-1) == thin.argmax(-1)).mean(),
        "same_code": (codes == others).mean(),
    }
    return {name: float(value) for name, value in found.items()}


def _is_int8(leaf: Any) -> bool:
    return isinstance(leaf, Int8)


def _widened(leaf: Any) -> Any:
    return leaf.widened() if _is_int8(leaf) else leaf
