"""The noise under which a model draws an image that exists (after VARIN, discrete noise inversion).

Drawn again under it, the codes come back; under another condition they become another image that
takes after the first, as far as the noise is kept.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Array, Cond, Params, System
from ar_jax.sampling.companions import Companion
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept, check_kept
from ar_jax.sampling.loop import CachedSampler, by_step, check_keys, check_order, draw_steps


def invert(
    sampler: Any,
    codes: Array,
    cond: Cond,
    keys: Array,
    *,
    knobs: Knobs | None = None,
    guidance: Guidance | None = None,
    order: Array | None = None,
) -> Array:
    """Noise float32 [B, L, V], in the order of the draws, that gives ``codes`` [B, L].

    Of bits it is [B, L, bits, 2].

    `CachedSampler.__call__` with this ``noise`` and the same condition, knobs, guidance and order
    draws ``codes`` again, all of them. Noise of codes that the model drew itself under the same
    settings is standard Gumbel noise; see `CategoricalHead.invert`.

    Args:
        keys: one an image [B]: many noises give the same image, and this is one of them.

    Raises:
        ValueError: keys or codes are not one for every condition, temperature 0 (of which no noise
            is asked), filters that remove codes of the image, or a sampler without Gumbel noise.
    """
    if not isinstance(sampler, CachedSampler):
        raise ValueError(
            "inversion gives the Gumbel noise of categorical draws: the codes of a "
            f"{type(sampler).__name__} are drawn otherwise"
        )
    system = sampler.system
    batch_size = len(jax.tree.leaves(cond)[0])
    check_keys(keys, batch_size)
    shape = (batch_size, *system.tokenizer.codes_shape)
    kept = check_kept(codes, jnp.ones(shape[:2], bool), shape)
    length = system.schedule.length
    if order is None and system.schedule.shuffled:  # the order in which noise alone is drawn from
        order = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch_size, length))
    if order is not None:
        order = check_order(order, batch_size, length)
    knobs, scales = by_step(system.schedule, knobs, guidance)
    for field, wrong in (
        ("temperature", knobs.temperature == 0),
        ("step_temperatures", np.any(np.asarray(knobs.step_temperatures) == 0)),
        ("smooth", knobs.smooth),
    ):
        if wrong:
            raise ValueError(
                f"sampling.{field} is {getattr(knobs, field)}: inversion needs draws of single "
                "codes at a temperature above 0"
            )
    knobs = knobs.spread(len(scales))
    arguments = (sampler.params, cond, keys, knobs, jnp.asarray(scales), order, kept)
    noise = draw_inverse(system, *arguments, **sampler.mixing(scales, guidance))
    lost = int((~jnp.isfinite(noise)).any(tuple(range(2, noise.ndim))).sum())
    if lost:
        raise ValueError(
            f"{lost} of {batch_size * system.schedule.length} codes were removed by "
            "sampling.top_k, top_p or min_p, so that no noise gives them: invert without filters"
        )
    return noise


@functools.partial(jax.jit, static_argnames=("system", "guided", "layers"))
def draw_inverse(
    system: System,
    params: Params,
    cond: Cond,
    keys: Array,
    knobs: Knobs,
    scales: Array,
    order: Array | None,
    kept: Kept,
    *,
    guided: bool,
    layers: tuple[int, ...] = (0,),
    companions: tuple[Companion, ...] = (),
) -> Array:
    """The program of `invert`: the sampler's own, so that logits are rounded as they are there."""
    inputs = (system, params, cond, keys, knobs, scales, None, order, kept)
    options: dict[str, Any] = {"layers": layers, "companions": companions}
    noise, _ = draw_steps(*inputs, guided=guided, **options, inverted=True)
    return noise


@jax.jit
def blend_noise(noise: Array, keys: Array, weight: Array | float) -> Array:
    """Part of a noise and part fresh: standard Gumbel noise [B, L, V] again, whatever the weight.

    The larger of two Gumbels moved by log w and log(1 - w) is a standard Gumbel.

    Args:
        noise: standard Gumbel noise, of `invert`.
        keys: one an image [B], not those that the noise was made with.
        weight: 1 keeps all of it, 0 nothing; scalar, or [B] of every image.
    """
    shape = noise.shape[1:]
    fresh = jax.vmap(lambda key: jax.random.gumbel(key, shape))(keys)
    weight = jnp.asarray(weight, jnp.float32).reshape(-1, *(1,) * len(shape))
    return jnp.maximum(noise + jnp.log(weight), fresh + jnp.log1p(-weight))
