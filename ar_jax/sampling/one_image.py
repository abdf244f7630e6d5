"""Distributions of one image's codes, some rows of the sequence a call: for speculation.

A batch of images is a `jax.vmap` of these, so that each has its own place in the sequence.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cache, Cond, Params, System
from ar_jax.sampling.filters import Knobs, truncate


def check_one_by_one(sampler: Any, what: str) -> None:
    """Raises ValueError unless one model draws one code a step from the codes before it."""
    system, schedule = sampler.system, sampler.system.schedule
    if sampler.companions:
        roles = ", ".join(companion.role for companion in sampler.companions)
        raise ValueError(f"{what} is of one model, and the sampler has others beside it: {roles}")
    if schedule.num_steps != schedule.length or system.tokenizer.quantizer.context != "codes":
        raise ValueError(
            f"schedule.name={schedule.name!r}: {what} is of systems that draw one code a step from "
            "the codes before it"
        )


def check_windows(sampler: Any, what: str) -> None:
    """`check_one_by_one`, and that one call of the backbone can take the steps of many codes."""
    check_one_by_one(sampler, what)
    backbone = sampler.system.backbone
    if not getattr(backbone, "takes_windows", False):
        raise ValueError(
            f"{what} needs a backbone that takes many steps in one call, which "
            f"{type(backbone).__name__} does not: use 'decoder'"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneImage:
    """A system, for one image of a guided or an unguided draw.

    Attributes:
        knobs, scales: see `ar_jax.sampling.loop.by_step`.
        guided: whether the null condition is asked too.
    """

    system: System
    params: Params
    knobs: Knobs
    scales: Array  # float32 [L]
    guided: bool

    @property
    def rows(self) -> int:
        """Sequences of the cache: the condition's and, if guided, the null condition's."""
        return 2 if self.guided else 1

    def init_cache(self) -> Cache:
        """An empty cache."""
        return self.system.backbone.init_cache(self.rows)

    def logits(
        self,
        context: Array | None,
        cond: Cond,
        step: Any,
        positions: Array,
        cache: Cache,
        order: Array | None,
        backbone: Any = None,
    ) -> tuple[Array, Cache]:
        """(guided logits float32 [n, V], cache).

        Args:
            context: int32 [n], the codes that the rows are fed; None: the prefix, for one row.
            cond: without an axis of B.
            step: of the first row.
            positions: int32 [n], the place in the sequence of what each row predicts.
            order: int32 [L], the cells in the order of the draws.
            backbone: in place of the system's, of the same parameters.
        """
        backbone = self.system.backbone if backbone is None else backbone
        cond = jax.tree.map(lambda leaf: leaf[None], cond)
        if self.guided:
            null = backbone.conditioner.null(cond)
            cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        context, order = jax.tree.map(
            lambda row: jnp.broadcast_to(row[None], (self.rows, len(row))), (context, order)
        )
        hidden, cache = backbone.apply(
            {"params": self.params["backbone"]}, context, cond, order=order, step=step, cache=cache
        )
        head = self.system.head
        logits = head.apply({"params": self.params["head"]}, hidden)  # [1 or 2, n, V]
        if self.guided:
            logits = head.guide(logits[:1], logits[1:], self.scales[positions][None, :, None])
        return logits[0], cache

    def log_p(self, logits: Array, positions: Array) -> Array:
        """Log-probabilities [n, V] that codes are drawn from, under the knobs of their steps."""
        return jax.vmap(lambda row, place: _log_softmax(row, self.knobs.at(place)))(
            logits, positions
        )

    def greedy(self, positions: Array) -> Array:
        """Bool [n], whether the largest logit is the code."""
        return jax.vmap(lambda place: jnp.asarray(self.knobs.at(place).temperature) <= 0)(positions)


def draw(logits: Array, gumbel: Array) -> Array:
    """Codes int32 [...] of logits [..., V]."""
    return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)


def residual(log_p: Array, log_q: Array) -> Array:
    """Logits [..., V] of max(p - q, 0), from which a rejected draft is drawn anew."""
    above = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    # Nothing is above only if both are equal up to rounding, where nothing is rejected.
    return jnp.where(above.sum(-1, keepdims=True) > 0, jnp.log(above), log_p)


def _log_softmax(logits: Array, knobs: Knobs) -> Array:
    """Log-probabilities [V] under the knobs of one step; at temperature 0 of the largest alone."""
    kept = jax.nn.log_softmax(truncate(logits, knobs))
    largest = jax.nn.one_hot(jnp.argmax(logits), logits.shape[-1], dtype=bool)
    return jnp.where(knobs.temperature > 0, kept, jnp.where(largest, 0.0, -jnp.inf))
