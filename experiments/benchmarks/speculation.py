"""Speculative decoding of a generator that draws one code a step: what each rule saves.

    python experiments/benchmarks/speculation.py --workdir=runs/llamagen --out=speculation.json
    python experiments/benchmarks/speculation.py --workdir=runs/llamagen --draft=runs/small \
        --branches=1-1-1-1,3-1-1 --windows=8,16 --out=speculation.json

The plain sampler and all rules draw --num_images images, guided and filtered as the workdir's
configuration says, in turns in this one process; the first turn compiles and the median of the
others counts. Saved steps are the plain sampler's steps over the calls of the model, saved time the
plain sampler's seconds over the rule's; both above 1 where the rule is the faster. A batch goes on
until its slowest image is done, which its calls are beside those of an image. The model's own
likelihood of what was drawn says whether it has the plain sampler's distribution, see
`ar_jax.evaluation.speculation.law_distance`: it has for the exact rules, up to chance, and has not
for grouped acceptance. A second plain run shows what chance does. Written are --out and, beside it,
the table as Markdown.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from ar_jax.build import create_sampler
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import describe_weights, load_system
from ar_jax.evaluation.samples import (
    check_class_conditional,
    describe_sampling,
    generate,
    sampling_of,
)
from ar_jax.evaluation.speculation import (
    Speculation,
    call_figures,
    law_distance,
    load_draft,
    nats_of,
)
from ar_jax.io.console import configure_logging
from ar_jax.sampling.loop import CachedSampler
from ar_jax.sampling.speculative import REDRAWS

WORKDIR = flags.DEFINE_string("workdir", None, "Of the generator.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file.", required=True)
DRAFT = flags.DEFINE_string("draft", None, "Workdir of a smaller generator, to draft with it too.")
WINDOWS = flags.DEFINE_list("windows", ["16"], "Of Jacobi speculation.")
BRANCHES = flags.DEFINE_list("branches", ["1-1-1-1", "3-1-1", "2-2-1"], "Trees of drafts.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 500, "Of each rule.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 50, "Images drawn at a time.")
TURNS = flags.DEFINE_integer("turns", 3, "Times that every rule is timed; the median counts.")
SEED = flags.DEFINE_integer("seed", 0, "Of all draws.")

# Of the figures -> head of the column, digits.
COLUMNS = {
    "calls_per_image": ("calls an image", 1),
    "calls_standard_error": ("standard error", 1),
    "steps_saved": ("steps saved", 2),
    "calls_per_batch": ("calls a batch", 1),
    "milliseconds_per_image": ("ms an image", 1),
    "time_saved": ("time saved", 2),
    "nats_per_image": ("nats an image", 1),
    "nats_off_in_standard_errors": ("off, in standard errors", 1),
    "total_variation_of_nats": ("total variation", 3),
    "chi_square_p": ("p", 3),
}


def speculations() -> list[Speculation]:
    """All that are compared."""
    found = [
        Speculation(rule=rule, window=int(window))
        for window in WINDOWS.value
        for rule in (*REDRAWS, "grouped")
    ]
    if DRAFT.value:
        for branches in BRANCHES.value:
            counts = tuple(map(int, branches.split("-")))
            found.append(Speculation(rule="draft", draft=DRAFT.value, branches=counts))
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """The table of what `main` writes."""
    heads = ["rule", *(head for head, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for name, figures in found["rules"].items():
        cells = [
            f"{figures[column]:,.{digits}f}" if column in figures else ""
            for column, (_, digits) in COLUMNS.items()
        ]
        lines.append(f"| {' | '.join([name, *cells])} |")
    about = found["about"]
    return "\n".join(lines) + (
        f"\n\n{about['num_images']:,} images of {about['steps']} codes, {about['batch_size']} at a "
        f"time, {about['device']}; {about['sampling']}; {about['weights']}.\n"
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    config, system, params = load_system(WORKDIR.value)
    check_class_conditional(system)
    knobs, guidance = sampling_of(config)
    plain = create_sampler(system, params)
    if not isinstance(plain, CachedSampler):
        raise app.UsageError(f"--workdir={WORKDIR.value} holds no generator of one code a step")
    draft = load_draft(DRAFT.value, plain) if DRAFT.value else None
    samplers: dict[str, Any] = {"plain": plain}
    samplers |= {str(one): one.sampler(plain, draft) for one in speculations()}
    samplers["plain, again"] = plain
    labels = balanced_labels(NUM_IMAGES.value, system.backbone.num_classes)
    settings: dict[str, Any] = dict(batch_size=BATCH_SIZE.value, knobs=knobs, guidance=guidance)
    times: dict[str, list[float]] = {name: [] for name in samplers}
    drawn: dict[str, Any] = {}
    with jax.default_matmul_precision(config["precision"]):
        for turn in range(TURNS.value + 1):
            for name, sampler in samplers.items():
                # Another seed for the second plain run, else it would be the first.
                seed = SEED.value + (name == "plain, again")
                count = NUM_IMAGES.value if turn else min(BATCH_SIZE.value, NUM_IMAGES.value)
                start = time.perf_counter()
                drawn[name] = generate(sampler, labels[:count], seed=seed, **settings)
                if turn:  # the first one compiles
                    times[name].append(time.perf_counter() - start)
        cond = {"label": labels}
        nats = {
            name: nats_of(plain, cond, made.codes, guidance, BATCH_SIZE.value)
            for name, made in drawn.items()
        }
    seconds = {name: statistics.median(values) for name, values in times.items()}
    rules: dict[str, Any] = {}
    for name, made in drawn.items():
        figures = {
            "milliseconds_per_image": 1e3 * seconds[name] / NUM_IMAGES.value,
            "time_saved": seconds["plain"] / seconds[name],
            **law_distance(nats[name], nats["plain"]),
        }
        if made.calls is not None:
            figures |= call_figures(made.calls, system.schedule.num_steps, BATCH_SIZE.value)
        rules[name] = figures
    del rules["plain"]["chi_square_p"]  # of itself
    about = {
        "num_images": NUM_IMAGES.value,
        "batch_size": BATCH_SIZE.value,
        "turns": TURNS.value,
        "steps": system.schedule.num_steps,
        "device": jax.devices()[0].device_kind,
        "sampling": describe_sampling(knobs, guidance),
        "weights": describe_weights(WORKDIR.value, config),
    }
    found = {"about": about, "rules": rules}
    path = Path(OUT.value)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(found), encoding="utf-8")
    print(markdown(found))


if __name__ == "__main__":
    app.run(main)
