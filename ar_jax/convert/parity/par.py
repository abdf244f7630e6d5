"""PAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax.numpy as jnp
import numpy as np

from ar_jax.backbones.step_rows import held_cells
from ar_jax.convert import par
from ar_jax.convert.parity import ordered
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.ordered import Model
from ar_jax.convert.parity.stepwise import stepwise_logits
from ar_jax.nn.positions import rope_2d
from ar_jax.nn.splash import visible_rows
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.loop import CachedSampler, draw_codes
from ar_jax.schedules import Schedule, distant_groups

NOT_APPLICABLE: dict[str, str] = {}
GRADIENTS = {
    "special": par.TRANSITION,
    "tok_emb": "tok_embeddings.weight",
    "cls_emb": "cls_embedding.embedding_table.weight",
}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return ("raster_ids", "labels", "drop_u")


def summarised(name: str) -> str | None:
    """The logits whose mean loss an array is."""
    return "logits" if name.startswith("loss") else None


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""

    @functools.cache
    def model() -> Model:
        return ordered.load(case, par, case["raster_ids"])

    yield Section(("perm_*",), functools.partial(_permutations, case))
    layout = ("permutation", "inverse_permutation", "seq_ids", "rope_table", "*_mask")
    yield Section((*layout, "gen_call_*"), with_model(_layout, model))
    yield Section(("logits",), with_model(_logits, model))
    yield Section(("loss*", "grad_*"), with_model(_losses, model))
    runs = case.names(r"gen(_\w+?)?_(?:seq_ids|raster_ids|logits)")
    for run in dict.fromkeys(found[1] or "" for _, found in runs):
        outputs = tuple(f"gen{run}_{what}" for what in ("seq_ids", "raster_ids", "logits"))
        yield Section(outputs, with_model(_drawn, model, run))


def _cells(schedule: Schedule) -> np.ndarray:
    return np.asarray(schedule.cells, np.int32)


def _permutations(case: Case) -> Outputs:
    for name, found in case.names(r"perm_(\d+)x(\d+)_n(\d+)"):
        rows, columns, regions = (int(number) for number in found.groups())
        yield name, _cells(distant_groups(grid=(rows, columns), regions=regions))


def _sequence(model: Model) -> jnp.ndarray:
    return model.codes[:, _cells(model.system.schedule)]


def _steps_beyond(model: Model, rows: int) -> tuple[int, ...]:
    """Steps of so many rows: after ours, which need not be fed the last group, come more groups."""
    steps, size = model.system.backbone.row_steps, model.system.schedule.sizes[-1]
    more = range(max(rows - len(steps), 0))
    return (*steps, *(steps[-1] + 1 + i // size for i in more))[:rows]


def _layout(model: Model) -> Outputs:
    """The order, and what rows hold and see."""
    backbone, schedule = model.system.backbone, model.system.schedule
    cells = _cells(schedule)
    yield "permutation", cells
    yield "inverse_permutation", np.argsort(cells).astype(np.int32)
    yield "seq_ids", _sequence(model)
    head_width = backbone.width // backbone.heads
    whole = held_cells(schedule, 1, "codes", head_width, backbone.rope_base)
    # The last group, which is not fed.
    last = schedule.coords[-schedule.sizes[-1] :, 1:]
    yield "rope_table", np.concatenate([whole, rope_2d(last, head_width, backbone.rope_base)])
    for name in ("train_mask", "cache_mask"):
        if name in model.case.io:
            rows = len(model.case[name])
            yield name, visible_rows(_steps_beyond(model, rows)).astype(np.uint8)
    calls = [backbone._row_range(step, None, None) for step in range(schedule.num_steps)]
    firsts, counts = np.asarray(calls, np.int32).T
    yield "gen_call_first_pos", firsts
    yield "gen_call_len", counts


def _logits(model: Model) -> Outputs:
    yield "logits", model.logits(None, _sequence(model))


def _losses(model: Model) -> Outputs:
    yield from ordered.losses(model, None, GRADIENTS)


def _scales(model: Model, run: str) -> np.ndarray:
    """Guidance of every step, float32 [S], of a run by its name.

    The official interval counts codes from the second on, and from the second group on anew; the
    first code is always guided.
    """
    schedule, settings = model.system.schedule, model.settings
    if run not in ("", "_cfg", "_nocfg", "_interval"):
        raise ValueError(
            f"the run 'gen{run}' is none of gen, gen_nocfg and gen_interval: spec.json does not "
            "say how it was drawn"
        )
    scale = 1.0 if run == "_nocfg" else max(settings["cfg_scale"], 1.0)
    scales = np.full(schedule.num_steps, scale, np.float32)
    if run == "_interval" and settings["cfg_interval"] > -1:
        size = schedule.sizes[-1]
        drawn = [0, *range(size - 1), *range(0, schedule.length - size, size)]
        scales[np.asarray(drawn) > settings["cfg_interval"]] = 1.0
    return scales


def _drawn(model: Model, run: str) -> Outputs:
    """The greedy codes of a run, in both orders, and the logits that they were drawn from."""
    scales = _scales(model, run)
    guided = bool((scales != 1).any())
    sampler = CachedSampler.create(model.system, model.params)
    knobs = Knobs(temperature=0.0).as_arrays()
    inputs = (model.cond, None, knobs, jnp.asarray(scales), None)
    codes = draw_codes(sampler.system, sampler.params, *inputs, guided=guided)
    sequence = codes[:, _cells(model.system.schedule)]
    yield f"gen{run}_raster_ids", codes
    yield f"gen{run}_seq_ids", sequence
    if f"gen{run}_logits" in model.case.io:
        strength = jnp.asarray(scales) if guided else None
        found = stepwise_logits(model.system, model.params, model.cond, sequence, strength)
        yield f"gen{run}_logits", found[0]
