"""How probable codes are to be drawn by refinement along a given order: heads that have a density.

The codes of one iteration are drawn apart from each other given all before them, so the density is
the product of theirs. Its logarithm, averaged over orders, is a lower bound of the density of the
codes whatever the order.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cond, Params, System


def has_likelihood(system: System) -> bool:
    """Whether codes are continuous and the head says how dense they are."""
    return system.tokenizer.codebook_size is None and hasattr(system.head, "log_prob")


@functools.partial(jax.jit, static_argnames="system")
def log_prob(system: System, params: Params, cond: Cond, codes: Array, order: Array) -> Array:
    """Log-density in nats, float32 [B], of `RefineSampler`'s draws, without guidance.

    Args:
        params: ``{'backbone', 'head'}`` at least.
        codes: float32 [B, L, C].
        order: int32 [B, L], the positions in the order in which they are drawn.
    """
    schedule, backbone, head = system.schedule, system.backbone, system.head
    step = jnp.asarray(schedule.step_id)[jnp.argsort(order, axis=1)]  # [B, L], of the positions

    def of_step(total: Array, s: Array) -> tuple[Array, None]:
        hidden = backbone.apply({"params": params["backbone"]}, codes, cond, step < s)
        rows = hidden.reshape(-1, hidden.shape[-1]), codes.reshape(-1, codes.shape[-1])
        each = head.apply({"params": params["head"]}, *rows, method="log_prob")
        return total + jnp.where(step == s, each.reshape(step.shape), 0.0).sum(1), None

    start = jnp.zeros(len(codes), jnp.float32)
    return jax.lax.scan(of_step, start, jnp.arange(schedule.num_steps))[0]
