"""The sampler's inner loop, one step at a time, over codes that are already known."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import System


@functools.partial(jax.jit, static_argnames="system")
def stepwise_logits(
    system: System, params: Any, cond: Any, codes: jax.Array, scales: jax.Array | None
) -> tuple[jax.Array, list[jax.Array]]:
    """Cached logits [B, L, V] and the contexts [B, n, ...] of all steps after the first.

    ``params`` as trained; with ``scales`` [S] the logits are guided: null + s (cond - null).
    """
    schedule, batch = system.schedule, len(codes)
    backbone, unstacked = system.backbone.for_sampling(params["backbone"])
    if scales is not None:
        null = backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
    cache = backbone.init_cache(batch if scales is None else 2 * batch)
    tokenizer = {"params": params["tokenizer"]}
    state = system.tokenizer.apply(tokenizer, batch, method="begin")
    context, logits, contexts = None, [], []
    for step, (start, size) in enumerate(zip(schedule.starts, schedule.sizes, strict=True)):
        fed = context
        if scales is not None and context is not None:
            fed = jnp.concatenate([context, context])
        # Traced where the sampler traces it.
        traced = schedule.equal_steps and step > 0
        index = jnp.int32(step) if traced else step
        hidden, cache = backbone.apply({"params": unstacked}, fed, cond, step=index, cache=cache)
        out = system.head.apply({"params": params["head"]}, hidden)
        if scales is not None:
            out = out[batch:] + scales[step] * (out[:batch] - out[batch:])
        logits.append(out)
        drawn = codes[:, start : start + size]
        state, context = system.tokenizer.apply(tokenizer, state, drawn, step, method="advance")
        if step + 1 < schedule.num_steps:
            contexts.append(context)
    return jnp.concatenate(logits, axis=1), contexts


def teacher_forced(system: System, params: Any, cond: Any, codes: jax.Array) -> jax.Array:
    """Logits [B, L, V] of all steps at once."""
    context = system.tokenizer.apply({"params": params["tokenizer"]}, codes, method="contexts")
    hidden, _ = system.backbone.apply({"params": params["backbone"]}, context, cond)
    return system.head.apply({"params": params["head"]}, hidden)
