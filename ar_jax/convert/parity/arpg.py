"""ARPG's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp

from ar_jax.api import System
from ar_jax.convert import arpg
from ar_jax.convert.parity import ordered
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.ordered import Model, group_sizes
from ar_jax.convert.places import official_tensor
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler
from ar_jax.schedules import CURVES, random_groups

NOT_APPLICABLE: dict[str, str] = {}
# Of the recorded runs: curve -> its number of steps in spec.json, and the guidance's kind.
RUNS = {"arccos": ("steps", "linear_after"), "cosine": ("steps2", "constant")}
GRADIENTS = {"mask_token": "", "emb": "embeddings.weight"}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return ("ids", "labels", "order", "gen_order", "drop_u")


def summarised(name: str) -> str | None:
    """The logits whose mean loss an array is."""
    return "logits" if name.startswith("loss") else None


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""

    @functools.cache
    def model() -> Model:
        return ordered.load(case, arpg, case["ids"])

    yield Section(("schedule_*",), functools.partial(_schedules, case))
    yield Section(("logits",), with_model(_logits, model))
    yield Section(("loss*", "grad_*"), with_model(_losses, model))
    runs = case.names(r"gen_(\w+?)_(?:ids|logits_in_order|counts)")
    for run in dict.fromkeys(found[1] for _, found in runs):
        outputs = tuple(f"gen_{run}_{what}" for what in ("ids", "logits_in_order", "counts"))
        yield Section(outputs, with_model(_drawn, model, run))


def _schedules(case: Case) -> Outputs:
    for name, found in case.names(rf"schedule_(\d+)_(\d+)_({'|'.join(CURVES)})"):
        steps, curve = int(found[2]), found[3]
        yield name, group_sizes(random_groups(grid=(1, int(found[1])), steps=steps, curve=curve))


def _logits(model: Model) -> Outputs:
    yield "logits", model.logits(model.order())


def _losses(model: Model) -> Outputs:
    yield from ordered.losses(model, model.order(), GRADIENTS)
    if "grad_mask_token" in model.case.io:
        _, gradient = model.loss_and_gradient(model.cond, model.order())
        table = official_tensor(model.part.places, gradient, "embeddings.weight")
        yield "grad_mask_token", table[model.system.backbone.vocab_size]


def _how(model: Model, run: str) -> tuple[System, Guidance]:
    """(the system with its steps, guidance) of a run, by its name."""
    if run not in RUNS:
        raise ValueError(
            f"the run {run!r} is none of {', '.join(RUNS)}: spec.json does not say how it was drawn"
        )
    field, kind = RUNS[run]
    (grid,) = model.system.schedule.grids
    system = model.with_schedule(
        dict(name="random_groups", grid=grid, steps=model.settings[field], curve=run)
    )
    return system, Guidance(kind=kind, scale=model.settings["scale"])


def _drawn(model: Model, run: str) -> Outputs:
    """The greedy codes of a run, the logits that they were drawn from, and the groups' sizes."""
    system, guidance = _how(model, run)
    yield f"gen_{run}_counts", group_sizes(system.schedule)
    order = model.order("gen_order")
    sampler = CachedSampler.create(system, model.params)
    # The temperature has no effect on a greedy run.
    knobs = Knobs(temperature=0.0)
    codes = sampler(model.cond, knobs=knobs, guidance=guidance, order=order).codes
    yield f"gen_{run}_ids", codes
    if f"gen_{run}_logits_in_order" in model.case.io:
        sequence = jnp.take_along_axis(codes, order, axis=1)
        logits = model.drawn_from(system, sequence, order, guidance)
        yield f"gen_{run}_logits_in_order", logits
