"""Logits of every step: the sampler's inner loop over known codes, or all steps at once."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import System


@functools.partial(jax.jit, static_argnames="system")
def stepwise_logits(
    system: System,
    params: Any,
    cond: Any,
    codes: jax.Array,
    scales: jax.Array | None,
    order: jax.Array | None = None,
) -> tuple[jax.Array, list[jax.Array]]:
    """Cached logits [B, L, V] and the contexts [B, n, ...] of all steps after the first.

    ``params`` as trained; with ``scales`` [S] the logits are guided: null + s (cond - null).
    ``codes`` are in the order of ``order`` [B, L], the schedule's own if None.
    """
    schedule, batch = system.schedule, len(codes)
    backbone, unstacked = system.backbone.for_sampling(params["backbone"])
    if scales is not None:
        null = backbone.conditioner.null(cond)
        cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, null)
        scales = jnp.asarray(scales)
        order = None if order is None else jnp.concatenate([order, order])
    tokenizer = {"params": params["tokenizer"]}

    def predict(step: Any, context: Any, cache: Any, segment: Any = None) -> Any:
        if scales is not None and context is not None:
            context = jnp.concatenate([context, context])
        hidden, cache = backbone.apply(
            {"params": unstacked},
            context,
            cond,
            order=order,
            step=step,
            segment=segment,
            cache=cache,
        )
        logits: Any = system.head.apply({"params": params["head"]}, hidden)
        if scales is not None:
            logits = logits[batch:] + scales[step] * (logits[:batch] - logits[batch:])
        return logits, cache

    def advance(state: Any, step: Any, drawn: jax.Array) -> Any:
        return system.tokenizer.apply(tokenizer, state, drawn, step, method="advance")

    state = system.tokenizer.apply(tokenizer, batch, method="begin")
    first, cache = predict(0, None, backbone.init_cache(batch if scales is None else 2 * batch))
    state, context = advance(state, 0, codes[:, : schedule.sizes[0]])
    logits, contexts = [first], []
    if schedule.equal_steps and schedule.num_steps > 1:  # a traced step, where the sampler has one

        def body(carry: Any, step: jax.Array) -> Any:
            state, context, cache = carry
            logits, cache = predict(step, context, cache, (1, schedule.num_steps))
            size = schedule.sizes[0]
            drawn = jax.lax.dynamic_slice_in_dim(codes, step * size, size, axis=1)
            state, following = advance(state, step, drawn)
            return (state, following, cache), (logits, context)

        steps = jnp.arange(1, schedule.num_steps)
        _, (rest, fed) = jax.lax.scan(body, (state, context, cache), steps)
        return jnp.concatenate([first, *rest], axis=1), list(fed)
    for step in range(1, schedule.num_steps):
        start, size = schedule.starts[step], schedule.sizes[step]
        contexts.append(context)
        out, cache = predict(step, context, cache)
        logits.append(out)
        state, context = advance(state, step, codes[:, start : start + size])
    return jnp.concatenate(logits, axis=1), contexts


def teacher_forced(
    system: System, params: Any, cond: Any, codes: jax.Array, order: jax.Array | None = None
) -> Any:
    """Logits [B, L, V] of all steps at once, codes and logits in the order of ``order`` [B, L]."""
    context = system.tokenizer.apply({"params": params["tokenizer"]}, codes, method="contexts")
    hidden, _ = system.backbone.apply({"params": params["backbone"]}, context, cond, order=order)
    return system.head.apply({"params": params["head"]}, hidden)
