"""All systems side by side on Fashion-MNIST: one codebase, one tokenizer budget, one evaluation.

    python experiments/benchmarks/systems.py --workdir=runs/systems \
        --out=experiments/benchmarks/systems.json
    python experiments/benchmarks/systems.py --workdir=runs/systems --only='var|mar' --seeds=0 \
        --out=some.json

Every run is experiments/demo.py in a folder of its own under --workdir; systems of one tokenizer
share its training. The default --mode=demo takes minutes on two CPU cores for each, an empty
``--mode=`` about an hour. Runs that --out has are not done again, and one that was stopped goes on.
After the runs all samplers are timed in turns in this one process. The table is printed and written
beside --out as Markdown, the first samples as PNG.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from ar_jax.build import create_sampler
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import load_system
from ar_jax.evaluation.repeats import RunTable, of_variant, spread
from ar_jax.evaluation.report import read_report
from ar_jax.evaluation.samples import generate, sampling_of
from ar_jax.io.console import configure_logging
from ar_jax.io.images import save_grid

ROOT = Path(__file__).resolve().parents[2]
SYSTEMS = sorted(
    path.stem
    for path in (ROOT / "configs" / "fashion_mnist").glob("*.py")
    if not path.stem.startswith("tokenizer_")
)

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file, kept up to date after every run.", required=True)
ONLY = flags.DEFINE_string("only", "", "Regular expression that the whole system's name matches.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of every system each.")
MODE = flags.DEFINE_string("mode", "demo", "Argument of the configurations.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1_000, "Samples to evaluate.")
BATCH = flags.DEFINE_integer("batch", 50, "Images that the timed samplers draw at once.")
TURNS = flags.DEFINE_integer("turns", 3, "Times that every sampler is timed; the median counts.")

# Of the report -> head of the column; what a system has no value of stays empty.
COLUMNS = {
    "parameters": ("parameters", 0),
    "steps_per_image": ("steps", 0),
    "milliseconds_per_image": ("ms an image", 1),
    "nats_per_image": ("nats an image", 1),
    "bits_per_dim": ("bits a pixel", 2),
    "loss": ("loss", 3),
    "class_accuracy": ("class accuracy", 3),
    "classifier_frechet_distance": ("Frechet distance", 2),
    "reconstruction_frechet_distance": ("its tokenizer's", 2),
}


def run_demo(system: str, seed: int) -> Path:
    """Trains and evaluates in a process of its own; the workdir.

    Raises:
        SystemExit: it failed or was stopped.
    """
    folder = Path(WORKDIR.value) / f"{system}_seed_{seed}"
    command = [sys.executable, str(ROOT / "experiments" / "demo.py")]
    command += [f"--system={system}", f"--workdir={folder}", f"--mode={MODE.value}"]
    command += [f"--seed={seed}", f"--tokenizers={Path(WORKDIR.value) / f'tokenizers_seed_{seed}'}"]
    command += [f"--num_images={NUM_IMAGES.value}"]
    if subprocess.run(command, check=False).returncode or not (folder / "report.json").exists():
        raise SystemExit(f"{system} did not end, see above: the same command goes on from here")
    return folder


def figures(folder: Path) -> dict[str, Any]:
    """What the table shows of a demo's workdir, but for the time of an image."""
    values = {
        name: entry["value"]
        for section in read_report(folder).values()
        for name, entry in section.get("metrics", {}).items()
    }
    _, system, _ = load_system(folder / "generator")
    parts = [value for name, value in values.items() if name.endswith("_parameters")]
    found = {name: values[name] for name in COLUMNS if name in values}
    return found | {
        "parameters": sum(parts),
        "steps_per_image": system.schedule.num_steps,
        "frechet_floor": values["frechet_floor"],
    }


def time_samplers(folders: Mapping[str, Path]) -> dict[str, float]:
    """Milliseconds per image of every run, guidance as configured: medians over turns."""
    samplers = {}
    for name, folder in folders.items():
        config, system, params = load_system(folder / "generator")
        labels = balanced_labels(BATCH.value, system.backbone.num_classes)
        knobs, guidance = sampling_of(config)
        sampler = create_sampler(system, params)
        samplers[name] = (sampler, labels, knobs, guidance)
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for turn in range(TURNS.value + 1):
        for name, (sampler, labels, knobs, guidance) in samplers.items():
            start = time.perf_counter()
            generate(sampler, labels, batch_size=BATCH.value, knobs=knobs, guidance=guidance)
            if turn:  # the first one compiles
                times[name].append(time.perf_counter() - start)
    return {name: 1e3 * statistics.median(values) / BATCH.value for name, values in times.items()}


def markdown(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all systems that have runs, with the floor of the Frechet distance below it."""
    heads = ["system", "runs", *(head for head, _ in COLUMNS.values())]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    for system in SYSTEMS:
        found = of_variant(runs, system)
        if not found:
            continue
        cells = [system, str(len(found))]
        for name, (_, digits) in COLUMNS.items():
            values = [run[name] for run in found if name in run]
            cells.append(spread(values, digits) if values else "")
        lines.append(f"| {' | '.join(cells)} |")
    floors = sorted({round(run["frechet_floor"], 3) for run in runs.values()})
    floor = ", ".join(f"{value:.3f}" for value in floors)
    return "\n".join(lines) + f"\n\nFloor of the Frechet distance, real test images: {floor}.\n"


def save_picture(path: Path, folders: Sequence[Path], each: int = 2) -> None:
    """A row for every workdir: its first ``each`` samples of every class."""
    rows = []
    for folder in folders:
        with np.load(folder / "samples.npz") as file:
            images, labels = file["arr_0"], file["arr_1"]
        classes = np.unique(labels)
        rows += [images[np.flatnonzero(labels == label)[:each]] for label in classes]
    save_grid(path, np.concatenate(rows), columns=each * len(classes), scale=2)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    systems = [system for system in SYSTEMS if re.fullmatch(ONLY.value or ".*", system)]
    if not systems:
        raise app.UsageError(f"--only={ONLY.value} is none of {', '.join(SYSTEMS)}")
    try:
        table = RunTable.open(OUT.value, MODE.value, markdown)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    seeds = [int(seed) for seed in SEEDS.value]
    wanted = [(system, seed) for seed in seeds for system in systems]
    first = {}  # one seed is enough for the time and the picture
    for index, (system, seed) in enumerate(wanted):
        name = f"{system}: seed {seed}"
        print(f"\n{index + 1}/{len(wanted)} {name}", flush=True)
        if name not in table.runs:
            table.add(name, figures(run_demo(system, seed)))
        folder = Path(WORKDIR.value) / f"{system}_seed_{seed}"
        if seed == seeds[0] and folder.exists():
            first[name] = folder
    for name, milliseconds in time_samplers(first).items():
        table.add(name, {**table.runs[name], "milliseconds_per_image": milliseconds})
    save_picture(table.path.with_suffix(".png"), list(first.values()))
    print(markdown(table.runs))


if __name__ == "__main__":
    app.run(main)
