"""Truncation of categorical distributions: temperature, top-k, top-p and min-p, all traced.

What else a sampler is told is here too: how confidence decoding chooses. Knobs are arrays, so that
other values do not recompile a sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

REMOVED = -jnp.inf
# Of -inf and inf in the order of the floats, see `_float_at`.
PLACES = (-0x7F800001, 0x7F800000)
# What confidence decoding compares codes by; see `ar_jax.sampling.confidence`.
CONFIDENCES = ("probability", "logit")
# Values that keep all, beside the defaults.
NEUTRAL = {"top_p": (1,)}


@flax.struct.dataclass
class Knobs:
    """How a distribution is sharpened before the draw; most fields are scalars.

    Attributes:
        temperature: divides the logits; 0 is greedy: the largest logit, no noise.
        step_temperatures: factors on it, one for every step of the schedule (of next-scale
            prediction coarse to fine); () is 1 everywhere.
        top_k: keep the k largest and ties with the k-th; 0 keeps all.
        top_p: keep the smallest set of largest probabilities whose sum reaches p; 0 or 1 keeps all.
        min_p: keep probabilities of at least this fraction of the largest; 0 keeps all.
        smooth: between scales, mix code vectors by Gumbel-softmax weights in place of drawing one
            (VAR's more_smooth); see `CategoricalHead.soften`. Static: it changes the program.
        choice_temperature, confidence: of confidence decoding alone, see
            `ar_jax.sampling.confidence`: the strength at first of the noise on confidences, and
            what these are, 'probability' (MaskGIT) or 'logit' (TiTok). The latter is static.
    """

    temperature: Array | float = 1.0
    step_temperatures: Array | tuple[float, ...] = ()
    top_k: Array | int = 0
    top_p: Array | float = 0.0
    min_p: Array | float = 0.0
    smooth: bool = flax.struct.field(pytree_node=False, default=False)
    choice_temperature: Array | float = 0.0
    confidence: str = flax.struct.field(pytree_node=False, default="probability")

    def as_arrays(self) -> Knobs:
        """Checked and typed (float32, int32), so that equal shapes mean one compilation."""
        for name in ("temperature", "choice_temperature"):
            if getattr(self, name) < 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be >= 0")
        factors = self.step_temperatures
        if any(factor < 0 for factor in factors):
            raise ValueError(f"sampling.step_temperatures is {factors}; they must be >= 0")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be >= 0 (0 keeps all)")
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not isinstance(self.smooth, bool):
            raise ValueError(f"sampling.smooth is {self.smooth!r}; it must be True or False")
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"sampling.confidence is {self.confidence!r}; it must be one of {CONFIDENCES}"
            )
        return Knobs(
            temperature=jnp.float32(self.temperature),
            step_temperatures=jnp.asarray(factors, jnp.float32) if len(factors) else (),
            top_k=jnp.int32(self.top_k),
            top_p=jnp.float32(self.top_p),
            min_p=jnp.float32(self.min_p),
            smooth=self.smooth,
            choice_temperature=jnp.float32(self.choice_temperature),
            confidence=self.confidence,
        )

    def at(self, step: Array | int) -> Knobs:
        """Those of one step of the schedule."""
        if len(self.step_temperatures) == 0:
            return self
        factors = jnp.asarray(self.step_temperatures)
        scaled = self.temperature * factors[step]
        return dataclasses.replace(self, temperature=scaled, step_temperatures=())

    def check_unused(self, names: Sequence[str], what: str) -> None:
        """Raises ValueError if one of the fields ``names``, without effect on ``what``, is set."""
        for name in names:
            value, default = getattr(self, name), getattr(Knobs(), name)
            if value not in (default, *NEUTRAL.get(name, ())):
                raise ValueError(
                    f"sampling.{name} is {value}, which means nothing for {what}: leave it at "
                    f"{default}"
                )


def truncate(logits: Array, knobs: Knobs) -> Array:
    """Logits float32 [..., V] after temperature, top-k, top-p, min-p; removed ones are -inf.

    The knobs are those of one step. Each filter sees what the one before it left, the order of VAR
    and LlamaGen. Ties stay or go together. Nothing is sorted: see `_threshold`, and at run time
    what is off is skipped.
    """
    logits = logits / jnp.maximum(knobs.temperature, 1e-5)
    logits = jax.lax.cond(knobs.top_k > 0, lambda x: _top_k(x, knobs.top_k), lambda x: x, logits)
    cuts_tail = (knobs.top_p > 0) & (knobs.top_p < 1)
    logits = jax.lax.cond(cuts_tail, lambda x: _top_p(x, knobs.top_p), lambda x: x, logits)
    floor = logits.max(-1, keepdims=True) + jnp.log(jnp.maximum(knobs.min_p, 1e-30))
    return jnp.where((knobs.min_p > 0) & (logits < floor), REMOVED, logits)


def _top_k(logits: Array, k: Array | int) -> Array:
    """Removed unless fewer than k are larger."""

    def few(larger: Array) -> Array:
        return larger.sum(-1, keepdims=True, dtype=jnp.int32) < k

    return jnp.where(logits >= _threshold(logits, few), logits, REMOVED)


def _top_p(logits: Array, p: Array | float) -> Array:
    """Removed unless all larger ones together have a probability of at most p."""
    probabilities = jax.nn.softmax(logits, axis=-1)

    def light(larger: Array) -> Array:
        return jnp.where(larger, probabilities, 0.0).sum(-1, keepdims=True) <= p

    return jnp.where(logits >= _threshold(logits, light), logits, REMOVED)


def _threshold(logits: Array, holds: Callable[[Array], Array]) -> Array:
    """The least float32 t [..., 1] with ``holds(logits > t)``, of which it says bool [..., 1].

    What holds of a set must hold of its subsets. Halving the floats in their order finds t exactly
    in 32 passes, whatever the logits are: a sort of 4,096 takes about 20 times as long on a CPU.
    """

    def halve(_: Array | int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # the mean, rounded down, without overflow
        held = holds(logits > _float_at(middle))
        return jnp.where(held, low, middle + 1), jnp.where(held, middle, high)

    places = [jnp.full((*logits.shape[:-1], 1), place, jnp.int32) for place in PLACES]
    return _float_at(jax.lax.fori_loop(0, 32, halve, tuple(places))[1])


def _float_at(place: Array) -> Array:
    """The float32 at a place int32 in the order of all floats, 0 at 0."""
    bits = jnp.where(place < 0, place ^ 0x7FFFFFFF, place)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
