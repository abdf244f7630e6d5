"""Speculative Jacobi decoding of raster codes: exact (SJD, arXiv:2410.01699; MC-SJD's redraws).

A window of drafts lies behind the codes that are settled, each with the distribution q that it was
drawn from. One call of the model gives p of all of them. From left to right a draft stays with
probability min(1, p / q), and the first that does not is drawn anew from what p has above q. The
drafts behind it are redrawn from their p, which is their next q. Rows of the cache that saw a wrong
draft are written again, as the next window begins where this one stopped. What is drawn has the
plain sampler's distribution, with fewer calls of the model; of one key it is another image.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, Samples, System
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, by_step, check_keys

# How a draft behind the first rejection is drawn again. 'independent': with new noise (SJD).
# 'gumbel': with the position's own Gumbel noise, so that it changes only where p does enough.
# 'maximal': it stays as often as is possible at all.
REDRAWS = ("independent", "gumbel", "maximal")


class Speculated(NamedTuple):
    """Samples, and how often the model was called for them."""

    samples: Samples
    calls: Array  # int32 [B], for each image; the plain sampler needs L


class State(NamedTuple):
    """Of one image, or with a leading axis of B."""

    codes: Array  # int32 [L], of which the first are settled
    settled: Array  # int32
    log_q: Array  # float32 [W, V], of the drafts from the first one that is not settled on
    calls: Array  # int32
    cache: Cache


def speculate(
    sampler: CachedSampler,
    cond: Cond,
    keys: Array,
    *,
    window: int = 16,
    redraw: str = "maximal",
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
) -> Speculated:
    """Draws one image for every condition with fewer calls of the model.

    Args:
        sampler: of a system that draws one code a step from codes.
        cond, keys, knobs, guidance: see `CachedSampler.__call__`. Of temperature 0 the codes are
            the plain sampler's; else they are other draws from the same distribution.
        window: W, drafts that are checked in one call; static, as is ``redraw``.
        redraw: one of `REDRAWS`.

    Raises:
        ValueError: another kind of system, a window that is not between 1 and L - 1, an unknown
            ``redraw``, smooth draws, or keys that are not one for every condition.
    """
    system, schedule = sampler.system, sampler.system.schedule
    check_one_by_one(sampler, "speculation")
    if not 1 <= window < schedule.length:
        raise ValueError(f"window is {window}; it must be between 1 and {schedule.length - 1}")
    if redraw not in REDRAWS:
        raise ValueError(f"redraw is {redraw!r}; it must be one of {REDRAWS}")
    check_keys(keys, len(jax.tree.leaves(cond)[0]))
    knobs, scales = by_step(schedule, knobs, guidance)
    (guidance or Guidance()).check_layers(0)
    if knobs.smooth:
        raise ValueError("sampling.smooth mixes codes between scales: there is none to speculate")
    codes, calls = draw_speculative(
        *(system, sampler.params, cond, keys, knobs, jnp.asarray(scales)),
        guided=bool(np.any(scales != 1.0)),
        window=window,
        redraw=redraw,
    )
    return Speculated(Samples(codes=codes, images=sampler.decode(codes)), calls)


def check_one_by_one(sampler: CachedSampler, what: str) -> None:
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


@functools.partial(jax.jit, static_argnames=("system", "guided", "window", "redraw"))
def draw_speculative(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array,
    knobs: Knobs,
    scales: Array,
    *,
    guided: bool,
    window: int,
    redraw: str,
) -> tuple[Array, Array]:
    """The program: (codes int32 [B, L], calls of the model int32 [B]). See `speculate`."""
    length, rows = system.schedule.length, jnp.arange(window)
    null = system.backbone.conditioner.null(cond)

    def log_p(
        context: Array | None, cond: Cond, null: Cond, step: Any, positions: Array, cache: Cache
    ) -> tuple[Array, Cache]:
        """(log-probabilities [n, V] as they are drawn from, cache) of one image's positions [n]."""
        fed = cond
        if guided:
            fed = jax.tree.map(lambda a, b: jnp.stack([a, b]), cond, null)
        else:
            fed = jax.tree.map(lambda a: a[None], cond)
        if context is not None:
            context = jnp.broadcast_to(context[None], (2 if guided else 1, len(context)))
        hidden, cache = system.backbone.apply(
            {"params": params["backbone"]}, context, fed, step=step, cache=cache
        )
        logits = system.head.apply({"params": params["head"]}, hidden)  # [1 or 2, n, V]
        if guided:
            logits = system.head.guide(logits[:1], logits[1:], scales[positions][None, :, None])
        return jax.vmap(lambda row, i: _log_softmax(row, knobs.at(i)))(logits[0], positions), cache

    def begin(key: Array, cond: Cond, null: Cond) -> State:
        """The first code is settled, the others are drafts of the uniform distribution."""
        cache = system.backbone.init_cache(2 if guided else 1)
        first, cache = log_p(None, cond, null, 0, jnp.zeros(1, jnp.int32), cache)
        code = _draw(first[0], jax.random.gumbel(jax.random.fold_in(key, 0), first[0].shape))
        vocab = first.shape[-1]
        drafts = jnp.argmax(own_noise(key, jnp.arange(length), vocab), axis=-1)
        codes = drafts.astype(jnp.int32).at[0].set(code)
        one = jnp.ones((), jnp.int32)
        return State(codes, one, jnp.full((window, vocab), -jnp.log(float(vocab))), one, cache)

    def own_noise(key: Array, positions: Array, vocab: int) -> Array:
        """Gumbel noise [n, V] of the positions, the same in all iterations."""
        key = jax.random.fold_in(key, length)
        return jax.vmap(lambda i: jax.random.gumbel(jax.random.fold_in(key, i), (vocab,)))(
            positions
        )

    def iterate(state: State, key: Array, cond: Cond, null: Cond) -> State:
        """One call of the model. A window at the end begins before the first draft."""
        start = jnp.minimum(state.settled, length - window)
        positions = start + rows
        ahead = positions - state.settled  # which row of log_q; below 0: settled
        context = jax.lax.dynamic_slice_in_dim(state.codes, start - 1, window)
        new, cache = log_p(context, cond, null, start, positions, state.cache)
        drafts = jax.lax.dynamic_slice_in_dim(state.codes, start, window)
        old = state.log_q[jnp.maximum(ahead, 0)]
        vocab = new.shape[-1]
        accept, again, fresh, fixed = jax.random.split(jax.random.fold_in(key, state.calls), 4)
        stays = jax.random.uniform(accept, (window,)) < _ratio(new, old, drafts)
        stays = stays | (ahead < 0)
        stop = jnp.where(stays.all(), window, jnp.argmax(~stays))  # the first rejected
        left = residual(new, old)
        noise = jax.random.gumbel(fresh, (window, vocab))
        if redraw == "independent":
            redrawn = _draw(new, noise)
        elif redraw == "gumbel":
            redrawn = _draw(new, own_noise(key, positions, vocab))
        else:
            keeps = jax.random.uniform(again, (window,)) < _ratio(new, old, drafts)
            redrawn = jnp.where(keeps, drafts, _draw(left, noise))
        corrected = _draw(left, jax.random.gumbel(fixed, (window, vocab)))
        drawn = jnp.where(rows < stop, drafts, jnp.where(rows == stop, corrected, redrawn))
        settled = jnp.minimum(start + stop + 1, start + window)
        after = settled + rows - start  # where the next window's drafts lie in this one
        kept = new[jnp.minimum(after, window - 1)]
        log_q = jnp.where(after[:, None] < window, kept, -jnp.log(float(vocab)))
        codes = jax.lax.dynamic_update_slice_in_dim(state.codes, drawn, start, axis=0)
        calls = state.calls + (state.settled < length)
        return State(codes, settled, log_q, calls, cache)

    state = jax.vmap(begin)(keys, cond, null)
    state = jax.lax.while_loop(
        lambda state: (state.settled < length).any(),
        lambda state: jax.vmap(iterate)(state, keys, cond, null),
        state,
    )
    return state.codes, state.calls


def residual(log_p: Array, log_q: Array) -> Array:
    """Logits [..., V] of max(p - q, 0), from which a rejected draft is drawn anew."""
    above = jnp.maximum(jnp.exp(log_p) - jnp.exp(log_q), 0.0)
    # Nothing is above only if both are equal up to rounding, where nothing is rejected.
    return jnp.where(above.sum(-1, keepdims=True) > 0, jnp.log(above), log_p)


def _ratio(log_p: Array, log_q: Array, codes: Array) -> Array:
    """p / q [W] of drafts [W]."""
    difference = log_p - log_q
    return jnp.exp(jnp.take_along_axis(difference, codes[:, None], axis=-1)[:, 0])


def _draw(logits: Array, gumbel: Array) -> Array:
    return jnp.argmax(logits + gumbel, axis=-1).astype(jnp.int32)


def _log_softmax(logits: Array, knobs: Knobs) -> Array:
    """Log-probabilities [V] under the knobs of one step; at temperature 0 of the largest alone."""
    kept = jax.nn.log_softmax(truncate(logits, knobs))
    largest = jax.nn.one_hot(jnp.argmax(logits), logits.shape[-1], dtype=bool)
    return jnp.where(knobs.temperature > 0, kept, jnp.where(largest, 0.0, -jnp.inf))
