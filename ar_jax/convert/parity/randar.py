"""RandAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.backbones.instructed_decoder import instructions
from ar_jax.convert import randar
from ar_jax.convert.parity import ordered
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.ordered import Model, group_sizes
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler
from ar_jax.schedules import random_groups

NOT_APPLICABLE: dict[str, str] = {}
GRADIENTS = {
    "pos_instruct": "pos_instruct_embeddings",
    "tok_emb": "tok_embeddings.weight",
    "cls_emb": "cls_embedding.embedding_table.weight",
}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return ("ids", "labels", "order", "drop_u")


def summarised(name: str) -> str | None:
    """The logits whose mean loss an array is."""
    return "logits" if name.startswith("loss") else None


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""

    def load() -> Model:
        return ordered.load(case, randar, case["ids"], steps=_steps(case))

    model = functools.cache(load)
    yield Section(("schedule*",), functools.partial(_schedules, case))
    yield Section(("pos_instruct_tokens",), with_model(_instructions, model))
    yield Section(("logits", "logits_raster"), with_model(_logits, model))
    yield Section(("loss*", "grad_*"), with_model(_losses, model))
    runs = case.names(r"gen_(\w+?)_(?:ids|logits_in_order|calls|first_pos)")
    for run in dict.fromkeys(found[1] for _, found in runs):
        drawn = ("ids", "logits_in_order", "calls", "first_pos")
        outputs = tuple(f"gen_{run}_{what}" for what in drawn)
        yield Section(outputs, with_model(_drawn, model, run))


def _steps(case: Case) -> int:
    """Of parallel sampling; officially -1 is one for every code."""
    steps, length = (
        case.spec.get("sampling", {}).get("steps", -1),
        case.spec["config"]["block_size"],
    )
    return length if steps < 0 else steps


def _section(model: Model, steps: int) -> dict[str, Any]:
    (grid,) = model.system.schedule.grids
    return dict(name="random_groups", grid=grid, steps=steps, curve="cosine_ahead")


def _schedules(case: Case) -> Outputs:
    length = case.spec["config"]["block_size"]
    for name, found in case.names(r"schedule(?:_(\d+)_(\d+))?"):
        codes, steps = (int(found[1]), int(found[2])) if found[1] else (length, _steps(case))
        schedule = random_groups(grid=(1, codes), steps=steps, curve="cosine_ahead")
        yield name, group_sizes(schedule)


def _instructions(model: Model) -> Outputs:
    backbone, vector = model.system.backbone, model.params["backbone"]["instruction"]
    turned = backbone.rotations(model.order())
    yield "pos_instruct_tokens", instructions(vector, turned, backbone.heads, len(model.codes))


def _logits(model: Model) -> Outputs:
    yield "logits", model.logits(model.order())
    if "logits_raster" in model.case.io:
        raster = jnp.broadcast_to(jnp.arange(model.codes.shape[1])[None], model.codes.shape)
        yield "logits_raster", model.logits(raster)


def _losses(model: Model) -> Outputs:
    yield from ordered.losses(model, model.order(), GRADIENTS)


def _how(model: Model, run: str) -> tuple[System, Guidance]:
    """(the system with its steps, guidance) of a run, by its name."""
    if run not in ("par", "seq", "nocfg"):
        raise ValueError(
            f"the run {run!r} is none of par, seq and nocfg: spec.json does not say how it was "
            "drawn"
        )
    steps = model.codes.shape[1] if run == "seq" else _steps(model.case)
    begin, end = model.settings.get("cfg", (1.0, 1.0))
    guided = run != "nocfg" and end > 1  # by the last scale alone, as officially
    guidance = Guidance(kind="linear_before", begin=begin, scale=end) if guided else Guidance()
    return model.with_schedule(_section(model, steps)), guidance


def _drawn(model: Model, run: str) -> Outputs:
    """The greedy codes of a run, what they were drawn from, and the rows of every call."""
    system, guidance = _how(model, run)
    order = model.order()
    sampler = CachedSampler.create(system, model.params)
    knobs = Knobs(temperature=0.0)
    codes = sampler(model.cond, knobs=knobs, guidance=guidance, order=order).codes
    yield f"gen_{run}_ids", codes
    if f"gen_{run}_logits_in_order" in model.case.io:
        sequence = jnp.take_along_axis(codes, order, axis=1)
        logits = model.drawn_from(system, sequence, order, guidance)
        yield f"gen_{run}_logits_in_order", logits
    calls = [system.backbone.call_rows(step) for step in range(system.schedule.num_steps)]
    firsts, counts = np.asarray(calls, np.int32).T
    yield f"gen_{run}_first_pos", firsts
    yield f"gen_{run}_calls", counts
