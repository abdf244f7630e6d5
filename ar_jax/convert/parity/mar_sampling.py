"""The sampler's runs of MAR's golden cases, iteration by iteration."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import schedules
from ar_jax.convert.parity.compare import Outputs
from ar_jax.convert.parity.readings import nchw
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.refine import RefineNoise, RefineSampler

# Official names of the schedules of guidance over the iterations -> ours.
GUIDANCE = {"linear": "linear_known", "constant": "constant"}
ITERATIONS = 64  # official default


def run(model: Any, sampler: dict[str, Any]) -> Outputs:
    """A guided or plain run of all iterations, fed the recorded orders and noise.

    Args:
        model: `ar_jax.convert.parity.mar.Model`.
        sampler: the run's entry in spec.json.

    Raises:
        ValueError: the official code has no such schedule of guidance, or an array is missing.
    """
    tag, system = sampler["tag"], model.system
    iterations = sampler.get("num_iter", ITERATIONS)
    schedule = schedules.masked(grid=system.schedule.grids[0], iterations=iterations)
    backbone = system.backbone.clone(schedule=schedule)
    head = model.respaced(sampler["steps"]) if "steps" in sampler else system.head
    system = dataclasses.replace(system, schedule=schedule, backbone=backbone, head=head)
    guidance = guidance_of(model.case.name, sampler)
    yield f"{tag}_tokens_per_iter", np.asarray(schedule.sizes)
    yield f"{tag}_cfg_per_iter", guidance.scales(schedule.num_steps, schedule.known)
    noise, parts = _recorded_noise(model, tag, schedule, len(head.sampling.timesteps))
    null = backbone.conditioner.null(model.cond)
    cond = null if sampler.get("labels", True) is None else model.cond
    keys = image_keys(0, 0, len(noise.order))  # not used: the noise is given
    knobs = Knobs(temperature=sampler.get("temperature", 1.0))
    sample = RefineSampler.create(system, model.params)
    drawn = sample(cond, keys, knobs=knobs, guidance=guidance, noise=noise)
    codes = np.asarray(drawn.codes)

    @jax.jit
    def hidden(params: Any, known: jax.Array, cond: Any) -> jax.Array:
        return backbone.apply({"params": params}, jnp.asarray(codes), cond, known)

    known = np.zeros(codes.shape[:2], bool)
    images = np.arange(len(codes))[:, None]
    passes = (cond, null) if guidance.scale != 1.0 else (cond,)
    for i, part in enumerate(parts):
        states = [hidden(model.params["backbone"], known, labels) for labels in passes]
        picked = [np.asarray(state)[images, part].reshape(-1, state.shape[-1]) for state in states]
        yield f"{tag}_iter{i}_z", np.concatenate(picked)
        yield f"{tag}_iter{i}_tokens", codes[images, part].reshape(-1, codes.shape[-1])
        known[images, part] = True
    yield f"{tag}_latent", nchw(model.ask("tokenizer", "unpatchify", drawn.codes))


def guidance_of(case: str, sampler: dict[str, Any]) -> Guidance:
    """Of a run; raises ValueError, which names the case, for a schedule of no official name."""
    kind = sampler.get("cfg_schedule", "linear")
    if kind not in GUIDANCE:
        raise ValueError(
            f"{case}: cfg_schedule of the sampler {sampler['tag']!r} is {kind!r}; the official "
            f"code has {' and '.join(GUIDANCE)}"
        )
    return Guidance(scale=sampler.get("cfg", 1.0), kind=GUIDANCE[kind])


def _recorded_noise(
    model: Any, tag: str, schedule: schedules.Schedule, steps: int
) -> tuple[RefineNoise, list[np.ndarray]]:
    """Ours from the recorded draws, and the positions [B, n] that every iteration predicts.

    Official orders are revealed from their ends; the rows of an iteration are in (image, position)
    order, and guided ones are followed by as many that nothing uses.
    """
    orders = model[f"{tag}_orders"]
    batch, length = orders.shape
    parts, starts, later, end = [], [], [], length
    for i, size in enumerate(schedule.sizes):
        parts.append(np.sort(orders[:, end - size : end], axis=1))
        end -= size
        start = model[f"{tag}_iter{i}_init_noise"][: batch * size]
        noise = model[f"{tag}_iter{i}_step_noise"][:, : batch * size]
        starts.append(start.reshape(batch, size, -1))
        later.append(noise.reshape(steps, batch, size, -1))
    return RefineNoise(
        order=jnp.asarray(np.concatenate(parts, axis=1), jnp.int32),
        start=jnp.asarray(np.concatenate(starts, axis=1)),
        steps=jnp.asarray(np.concatenate(later, axis=2)),
    ), parts
