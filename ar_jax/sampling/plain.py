"""The plain sampler: every step computes the whole sequence anew. For comparisons, in time and
in codes: it draws what `ar_jax.sampling.loop.CachedSampler` draws, without a cache, with the layers
scanned as in training and one program that serves every step.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cond, Params, System
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance


@dataclasses.dataclass(frozen=True)
class PlainSampler:
    """Draws codes step by step from a system as it was trained, in the schedule's own order."""

    system: System
    params: Params  # {'tokenizer', 'backbone', 'head'}

    def __call__(
        self,
        cond: Cond,
        noise: Array,
        *,
        knobs: Knobs | None = None,
        guidance: Guidance | None = None,
        steps: int | None = None,
    ) -> Array:
        """Codes int32 [B, L], zero behind the first ``steps`` steps (default: all).

        Args:
            cond: ``{'label': int32 [B]}``.
            noise: float32 [B, L, V] standard Gumbel.
            knobs, guidance: as the cached sampler's.
            steps: all cost the same, so that a few are enough to time.
        """
        schedule = self.system.schedule
        knobs = (knobs or Knobs()).as_arrays()
        scales = (guidance or Guidance()).scales(schedule.num_steps, schedule.known)
        guided = bool(np.any(scales != 1.0))
        codes = jnp.zeros(noise.shape[:2], jnp.int32)
        for index in range(schedule.num_steps if steps is None else steps):
            inputs = (codes, cond, noise, knobs.at(index), jnp.float32(scales[index]))
            codes = draw_step(self.system, self.params, *inputs, jnp.int32(index), guided=guided)
        return codes


@functools.partial(jax.jit, static_argnames="system")
def all_logits(system: System, params: Params, cond: Cond, codes: Array) -> Array:
    """Logits float32 [B, L, V] of all steps at once, given the ``codes`` [B, L] before each."""
    context = system.tokenizer.apply({"params": params["tokenizer"]}, codes, method="contexts")
    hidden, _ = system.backbone.apply({"params": params["backbone"]}, context, cond)
    return system.head.apply({"params": params["head"]}, hidden)


@functools.partial(jax.jit, static_argnames=("system", "guided"))
def draw_step(
    system: System,
    params: Params,
    codes: Array,
    cond: Cond,
    noise: Array,
    knobs: Knobs,
    scale: Array,
    index: Array,
    *,
    guided: bool,
) -> Array:
    """``codes`` [B, L] with those of the step ``index`` drawn."""
    if guided:
        null = system.backbone.conditioner.null(cond)
        both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        logits = all_logits(system, params, both, jnp.concatenate([codes, codes]))
        logits = system.head.guide(*jnp.split(logits, 2), scale)
    else:
        logits = all_logits(system, params, cond, codes)
    drawn = system.head.draw(truncate(logits, knobs), jnp.where(knobs.temperature > 0, noise, 0.0))
    here = jnp.asarray(system.schedule.step_id) == index
    return jnp.where(here[None], drawn, codes)
