"""Speculative Jacobi decoding, of codes that are drawn one a step: exact (SJD, arXiv:2410.01699).

A window of drafts lies behind the codes that are settled, each with the distribution q that it was
drawn from. One call of the model gives p of all of them. From left to right a draft stays with
probability min(1, p / q), and the first that does not is drawn anew from what p has above q. The
drafts behind it are redrawn from their p, which is their next q (MC-SJD's ways to do so are
`REDRAWS`). Rows of the cache that saw a wrong draft are written again, as the next window begins
where this one stopped. What is drawn has the plain sampler's distribution, with fewer calls of the
model; of one key it is another image. With a `Grouping` it has another distribution.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cache, Cond, Params, Samples, System
from ar_jax.sampling.around import AroundSampler
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.grouped import Grouping, code_distances, group_ratio
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import (
    CachedSampler,
    by_step,
    check_keys,
    check_order,
    draw_order,
    to_cells,
)
from ar_jax.sampling.one_image import OneImage, check_windows, draw, residual
from ar_jax.schedules import Schedule

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeSampler(AroundSampler):
    """`speculate` with its settings, called as the sampler that it is made of.

    The samples say how often the model was called for each image.
    """

    sampler: CachedSampler
    window: int = 16
    redraw: str = "maximal"
    grouping: Grouping | None = None

    def __call__(self, cond: Cond, keys: Array, **settings: Any) -> Samples:
        """See `speculate`."""
        fields: dict[str, Any] = {
            "window": self.window,
            "redraw": self.redraw,
            "grouping": self.grouping,
        }
        return speculate(self.sampler, cond, keys, **fields, **settings).samples


def speculate(
    sampler: CachedSampler,
    cond: Cond,
    keys: Array,
    *,
    window: int = 16,
    redraw: str = "maximal",
    grouping: Grouping | None = None,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    order: Array | None = None,
) -> Speculated:
    """Draws one image for every condition with fewer calls of the model.

    Args:
        sampler: of a system that draws one code a step from codes.
        cond, keys, knobs, guidance, order: see `CachedSampler.__call__`. Of temperature 0 the codes
            are the plain sampler's; else they are other draws from the same distribution.
        window: W, drafts that are checked in one call; static, as is ``redraw``.
        redraw: one of `REDRAWS`.
        grouping: lossy acceptance; static. None: exact.

    Raises:
        ValueError: another kind of system, a window that is not between 1 and L - 1, an unknown
            ``redraw``, smooth draws, or keys or an order that are not one for every condition.
    """
    check_windows(sampler, "speculation")
    length = sampler.system.schedule.length
    if not 1 <= window < length:
        raise ValueError(f"window is {window}; it must be between 1 and {length - 1}")
    if redraw not in REDRAWS:
        raise ValueError(f"redraw is {redraw!r}; it must be one of {REDRAWS}")
    inputs, guided = speculation_inputs(sampler.system.schedule, cond, keys, knobs, guidance, order)
    codes, calls = draw_speculative(
        *(sampler.system, sampler.params, *inputs),
        guided=guided,
        window=window,
        redraw=redraw,
        grouping=grouping,
    )
    samples = Samples(codes=codes, images=sampler.decode(codes), order=inputs[-1], calls=calls)
    return Speculated(samples, calls)


def speculation_inputs(
    schedule: Schedule,
    cond: Cond,
    keys: Array,
    knobs: Knobs | None,
    guidance: Guidance | None,
    order: Array | None,
) -> tuple[tuple, bool]:
    """((cond, keys, knobs, scales, order) as programs take them, whether any step is guided).

    Raises:
        ValueError: see `speculate`.
    """
    batch_size = len(jax.tree.leaves(cond)[0])
    check_keys(keys, batch_size)
    knobs, scales = by_step(schedule, knobs, guidance)
    (guidance or Guidance()).check_layers(0)
    if knobs.smooth:
        raise ValueError("sampling.smooth mixes codes between scales: there is none to speculate")
    knobs.check_unused(("choice_temperature", "confidence"), "codes drawn in a fixed order")
    if order is not None:
        order = check_order(order, batch_size, schedule.length)
    elif schedule.shuffled:
        order = draw_order(keys, schedule.length)
    return (cond, keys, knobs, jnp.asarray(scales), order), bool(np.any(scales != 1.0))


@functools.partial(jax.jit, static_argnames=("system", "guided", "window", "redraw", "grouping"))
def draw_speculative(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array,
    knobs: Knobs,
    scales: Array,
    order: Array | None = None,
    *,
    guided: bool,
    window: int,
    redraw: str,
    grouping: Grouping | None = None,
) -> tuple[Array, Array]:
    """The program: (codes int32 [B, L], calls of the model int32 [B]). See `speculate`."""
    length, rows = system.schedule.length, jnp.arange(window)
    model = OneImage(system=system, params=params, knobs=knobs, scales=scales, guided=guided)
    ratio = _ratio
    if grouping is not None:
        ratio = functools.partial(
            group_ratio, grouping=grouping, distances=code_distances(system, params)
        )

    def begin(key: Array, cond: Cond, order: Array | None) -> State:
        """The first code is settled, the others are drafts of the uniform distribution."""
        place = jnp.zeros(1, jnp.int32)
        logits, cache = model.logits(None, cond, 0, place, model.init_cache(), order)
        first = model.log_p(logits, place)
        code = draw(first[0], jax.random.gumbel(jax.random.fold_in(key, 0), first[0].shape))
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

    def iterate(state: State, key: Array, cond: Cond, order: Array | None) -> State:
        """One call of the model. A window at the end begins before the first draft."""
        start = jnp.minimum(state.settled, length - window)
        positions = start + rows
        ahead = positions - state.settled  # which row of log_q; below 0: settled
        context = jax.lax.dynamic_slice_in_dim(state.codes, start - 1, window)
        logits, cache = model.logits(context, cond, start, positions, state.cache, order)
        new = model.log_p(logits, positions)
        drafts = jax.lax.dynamic_slice_in_dim(state.codes, start, window)
        old = state.log_q[jnp.maximum(ahead, 0)]
        vocab = new.shape[-1]
        accept, again, fresh, fixed = jax.random.split(jax.random.fold_in(key, state.calls), 4)
        stays = jax.random.uniform(accept, (window,)) < ratio(new, old, drafts)
        stays = stays | (ahead < 0)
        stop = jnp.where(stays.all(), window, jnp.argmax(~stays))  # the first rejected
        left = residual(new, old)
        noise = jax.random.gumbel(fresh, (window, vocab))
        if redraw == "independent":
            redrawn = draw(new, noise)
        elif redraw == "gumbel":
            redrawn = draw(new, own_noise(key, positions, vocab))
        else:
            keeps = jax.random.uniform(again, (window,)) < _ratio(new, old, drafts)
            redrawn = jnp.where(keeps, drafts, draw(left, noise))
        corrected = draw(left, jax.random.gumbel(fixed, (window, vocab)))
        drawn = jnp.where(rows < stop, drafts, jnp.where(rows == stop, corrected, redrawn))
        settled = jnp.minimum(start + stop + 1, start + window)
        after = settled + rows - start  # where the next window's drafts lie in this one
        kept = new[jnp.minimum(after, window - 1)]
        log_q = jnp.where(after[:, None] < window, kept, -jnp.log(float(vocab)))
        codes = jax.lax.dynamic_update_slice_in_dim(state.codes, drawn, start, axis=0)
        calls = state.calls + (state.settled < length)
        return State(codes, settled, log_q, calls, cache)

    state = jax.vmap(begin)(keys, cond, order)
    state = jax.lax.while_loop(
        lambda state: (state.settled < length).any(),
        lambda state: jax.vmap(iterate)(state, keys, cond, order),
        state,
    )
    return to_cells(state.codes, order), state.calls


def _ratio(log_p: Array, log_q: Array, codes: Array) -> Array:
    """p / q [W] of drafts [W]."""
    difference = log_p - log_q
    return jnp.exp(jnp.take_along_axis(difference, codes[:, None], axis=-1)[:, 0])
