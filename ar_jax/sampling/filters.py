"""Truncation of categorical distributions: temperature, top-k, top-p and min-p, all traced.

What else a sampler is told is here too: how confidence decoding chooses. Knobs are arrays, so that
other values do not recompile a sampler.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

Array = jax.Array

REMOVED = -jnp.inf
# Of -inf and inf in the order of the floats, see `_float_at`.
PLACES = (-0x7F800001, 0x7F800000)
# What confidence decoding compares codes by; see `ar_jax.sampling.confidence`.
CONFIDENCES = ("probability", "logit")
# Knobs that have one value for every step, or none.
BY_STEP = ("step_temperatures", "step_top_k", "step_top_p")
# Those of the factor on the temperature that depends on the entropy.
BY_ENTROPY = ("entropy_gain", "entropy_width", "entropy_floor")
# Values that keep all, beside the defaults.
NEUTRAL = {"top_p": (1,)}


@flax.struct.dataclass
class Knobs:
    """How a distribution is sharpened before the draw; most fields are scalars.

    Attributes:
        temperature: divides the logits; 0 is greedy: the largest logit, no noise.
        step_temperatures: factors on it, one for every step of the schedule (of next-scale
            prediction coarse to fine); () is 1 everywhere.
        entropy_gain, entropy_width, entropy_floor: a, b and c of a further factor for every code,
            a exp(-H / b) + c, with H the entropy in nats of the distribution that the code is drawn
            from, guided but not yet filtered (arXiv:2510.09012, whose code has 2.5, 3 and 0.6 and
            takes H after top-k): sure codes, of flat regions, are drawn warmer than unsure ones.
            a = 0 and c = 1 is no factor. Codes of bits have an H for every bit.
        top_k: keep the k largest and ties with the k-th; 0 keeps all.
        step_top_k: in its place one for every step; () is `top_k` everywhere.
        top_p: keep the smallest set of largest probabilities whose sum reaches p; 0 or 1 keeps all.
        step_top_p: in its place one for every step; () is `top_p` everywhere.
        min_p: keep probabilities of at least this fraction of the largest; 0 keeps all.
        smooth: between scales, mix code vectors by Gumbel-softmax weights in place of drawing one
            (VAR's more_smooth); see `CategoricalHead.soften`. Static: it changes the program.
        choice_temperature, confidence: of confidence decoding alone, see
            `ar_jax.sampling.confidence`: the strength at first of the noise on confidences, and
            what these are, 'probability' (MaskGIT) or 'logit' (TiTok). The latter is static.
    """

    temperature: Array | float = 1.0
    step_temperatures: Array | tuple[float, ...] = ()
    entropy_gain: Array | float = 0.0
    entropy_width: Array | float = 1.0
    entropy_floor: Array | float = 1.0
    top_k: Array | int = 0
    step_top_k: Array | tuple[int, ...] = ()
    top_p: Array | float = 0.0
    step_top_p: Array | tuple[float, ...] = ()
    min_p: Array | float = 0.0
    smooth: bool = flax.struct.field(pytree_node=False, default=False)
    choice_temperature: Array | float = 0.0
    confidence: str = flax.struct.field(pytree_node=False, default="probability")

    def as_arrays(self) -> Knobs:
        """Checked and typed (float32, int32), so that equal shapes mean one compilation."""
        for name in ("temperature", "choice_temperature", "entropy_gain", "entropy_floor"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be >= 0")
        if not self.entropy_width > 0:
            raise ValueError(f"sampling.entropy_width is {self.entropy_width}; it must be > 0")
        factors = self.step_temperatures
        if any(factor < 0 for factor in factors):
            raise ValueError(f"sampling.step_temperatures is {factors}; they must be >= 0")
        if self.top_k < 0:
            raise ValueError(f"sampling.top_k is {self.top_k}; it must be >= 0 (0 keeps all)")
        if any(k < 0 or k != int(k) for k in self.step_top_k):
            raise ValueError(
                f"sampling.step_top_k is {self.step_top_k}; they must be whole numbers >= 0 "
                "(0 keeps all)"
            )
        for name in ("top_p", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"sampling.{name} is {getattr(self, name)}; it must be in [0, 1]")
        if not all(0 <= p <= 1 for p in self.step_top_p):
            raise ValueError(f"sampling.step_top_p is {self.step_top_p}; they must be in [0, 1]")
        if not isinstance(self.smooth, bool):
            raise ValueError(f"sampling.smooth is {self.smooth!r}; it must be True or False")
        if self.confidence not in CONFIDENCES:
            raise ValueError(
                f"sampling.confidence is {self.confidence!r}; it must be one of {CONFIDENCES}"
            )
        return Knobs(
            temperature=jnp.float32(self.temperature),
            step_temperatures=_by_step(factors, jnp.float32),
            entropy_gain=jnp.float32(self.entropy_gain),
            entropy_width=jnp.float32(self.entropy_width),
            entropy_floor=jnp.float32(self.entropy_floor),
            top_k=jnp.int32(self.top_k),
            step_top_k=_by_step(self.step_top_k, jnp.int32),
            top_p=jnp.float32(self.top_p),
            step_top_p=_by_step(self.step_top_p, jnp.float32),
            min_p=jnp.float32(self.min_p),
            smooth=self.smooth,
            choice_temperature=jnp.float32(self.choice_temperature),
            confidence=self.confidence,
        )

    def spread(self, num_steps: int) -> Knobs:
        """The same as arrays of all S steps, so that one program serves whoever gives which."""
        knobs = self.as_arrays()
        given = {
            "step_temperatures": jnp.float32(1.0),
            "step_top_k": knobs.top_k,
            "step_top_p": knobs.top_p,
        }
        missing: dict[str, Any] = {
            name: jnp.full(num_steps, value)
            for name, value in given.items()
            if not len(getattr(knobs, name))
        }
        return dataclasses.replace(knobs, **missing)

    def check_steps(self, num_steps: int) -> None:
        """Raises ValueError if a field that has a value a step has not S of them."""
        for name in BY_STEP:
            count = len(getattr(self, name))
            if count not in (0, num_steps):
                raise ValueError(
                    f"sampling.{name} has {count} numbers; the schedule has {num_steps} steps: "
                    "give one for each"
                )

    def at(self, step: Array | int) -> Knobs:
        """Those of one step of the schedule."""
        changes: dict[str, Any] = dict.fromkeys(BY_STEP, ())
        if len(self.step_temperatures):
            changes["temperature"] = self.temperature * jnp.asarray(self.step_temperatures)[step]
        if len(self.step_top_k):
            changes["top_k"] = jnp.asarray(self.step_top_k)[step]
        if len(self.step_top_p):
            changes["top_p"] = jnp.asarray(self.step_top_p)[step]
        return dataclasses.replace(self, **changes)

    def check_unused(self, names: Sequence[str], what: str) -> None:
        """Raises ValueError if one of the fields ``names``, without effect on ``what``, is set."""
        for name in names:
            value, default = getattr(self, name), getattr(Knobs(), name)
            if (
                len(value) > 0
                if name in BY_STEP
                else value not in (default, *NEUTRAL.get(name, ()))
            ):
                raise ValueError(
                    f"sampling.{name} is {value}, which means nothing for {what}: leave it at "
                    f"{default}"
                )


def truncate(logits: Array, knobs: Knobs) -> Array:
    """Logits float32 [..., V] after temperature, top-k, top-p, min-p; removed ones are -inf.

    The knobs are those of one step. Each filter sees what the one before it left, the order of VAR
    and LlamaGen. Ties stay or go together. Nothing is sorted: see `_threshold`, and at run time
    what is off is skipped, and so is the entropy where no factor depends on it.
    """
    aware = (jnp.asarray(knobs.entropy_gain) != 0) | (jnp.asarray(knobs.entropy_floor) != 1)
    one = jnp.ones((*logits.shape[:-1], 1), logits.dtype)
    factor = jax.lax.cond(aware, lambda x: entropy_factor(x, knobs), lambda x: one, logits)
    logits = logits / jnp.maximum(knobs.temperature * factor, 1e-5)
    top_p = jnp.asarray(knobs.top_p)
    cuts_tail = (top_p > 0) & (top_p < 1)
    logits = jax.lax.cond(knobs.top_k > 0, lambda x: _top_k(x, knobs.top_k), lambda x: x, logits)
    logits = jax.lax.cond(cuts_tail, lambda x: _top_p(x, knobs.top_p), lambda x: x, logits)
    floor = logits.max(-1, keepdims=True) + jnp.log(jnp.maximum(knobs.min_p, 1e-30))
    return jnp.where((knobs.min_p > 0) & (logits < floor), REMOVED, logits)


def entropy_factor(logits: Array, knobs: Knobs) -> Array:
    """Of the temperature, [..., 1] for logits [..., V]; see `Knobs`."""
    log_p = jax.nn.log_softmax(logits, axis=-1)
    p = jnp.exp(log_p)
    entropy = -jnp.where(p > 0, p * log_p, 0.0).sum(-1, keepdims=True)
    return knobs.entropy_gain * jnp.exp(-entropy / knobs.entropy_width) + knobs.entropy_floor


def _by_step(values: Any, dtype: Any) -> Array | tuple[()]:
    """Values of all steps as an array, or none."""
    return jnp.asarray(values, dtype) if len(values) else ()


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
