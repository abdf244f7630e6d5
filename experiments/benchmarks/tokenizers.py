"""A table of the quantisers on Fashion-MNIST: the same budget, three seeds, mean and spread.

    python experiments/benchmarks/tokenizers.py --workdir=runs/tokenizers \
        --out=experiments/benchmarks/tokenizers.json
    python experiments/benchmarks/tokenizers.py --workdir=runs/tokenizers --only=fsq --out=some.json

Every run trains a configuration of configs/fashion_mnist in a folder of its own under --workdir and
evaluates it on the 4,000 test images: minutes on two CPU cores each with the default --mode=demo.
Runs that --out has are not done again, and one that was stopped goes on. The table is printed and
written beside --out as Markdown.
"""

from __future__ import annotations

import dataclasses
import math
import re
import runpy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from ar_jax.build import build_tokenizer
from ar_jax.evaluation.repeats import RunTable, of_variant, spread
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import read_config
from ar_jax.train.run import train_and_evaluate

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "fashion_mnist"

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs.", required=True)
OUT = flags.DEFINE_string("out", None, "JSON file, kept up to date after every run.", required=True)
ONLY = flags.DEFINE_string("only", "", "Regular expression: the variants whose names it finds.")
SEEDS = flags.DEFINE_list("seeds", ["0", "1", "2"], "One run of every variant each.")
MODE = flags.DEFINE_string("mode", "demo", "Argument of the configurations.")


@dataclasses.dataclass(frozen=True)
class Variant:
    """A row: a configuration, and what of it is set otherwise ('a.b' -> value)."""

    name: str
    config: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


METRICS = {  # of the report -> head of the column
    "psnr": "PSNR, dB",
    "ssim": "SSIM",
    "reconstruction_frechet_distance": "Frechet distance",
    "reconstruction_class_accuracy": "class accuracy",
}
EMA = {"tokenizer.codebook_update": "ema"}
PATCHGAN = {"objective.adversarial.weight": 0.5}
FEW = {"tokenizer.codebook_size": 16}
MANY = {"tokenizer.codebook_size": 1024}  # of which two thirds die if none restarts
COARSE = MANY | {"tokenizer.scales": (1, 4, 7)}  # 2 x 2 codes have little use for so many
WIDE = {"tokenizer.autoencoder.code_width": 32}  # VAR's own
NO_RESTARTS = {"objective.restart_below": 0.0}
VARIANTS = (
    Variant("vq", "tokenizer_vq"),
    Variant("vq of 16 codes", "tokenizer_vq", FEW),  # blurred, which a discriminator notices
    Variant("vq of 16 codes, patchgan", "tokenizer_vq", FEW | PATCHGAN),
    Variant("multiscale_vq", "tokenizer_multiscale"),
    Variant("multiscale_vq, no restarts", "tokenizer_multiscale", NO_RESTARTS),
    Variant("multiscale_vq of 1,024 codes", "tokenizer_multiscale", MANY),
    Variant(
        "multiscale_vq of 1,024 codes, no restarts", "tokenizer_multiscale", MANY | NO_RESTARTS
    ),
    Variant("multiscale_vq of 1,024 codes on 1, 4, 7", "tokenizer_multiscale", COARSE),
    Variant(
        "multiscale_vq of 1,024 codes on 1, 4, 7, no restarts",
        "tokenizer_multiscale",
        COARSE | NO_RESTARTS,
    ),
    Variant("multiscale_vq of width 32", "tokenizer_multiscale", WIDE),
    Variant("multiscale_vq of width 32, no restarts", "tokenizer_multiscale", WIDE | NO_RESTARTS),
    Variant("multiscale_vq, ema", "tokenizer_multiscale", EMA),
    Variant("multiscale_vq, ema, no restarts", "tokenizer_multiscale", EMA | NO_RESTARTS),
    Variant("fsq", "tokenizer_fsq"),
    Variant("lfq", "tokenizer_lfq"),
    Variant("bsq", "tokenizer_bsq"),
    Variant("multiscale_bitwise", "tokenizer_bitwise"),
    Variant("kl", "tokenizer_kl"),
)


def run(variant: Variant, seed: int, workdir: Path, mode: str) -> dict[str, Any]:
    """Trains and evaluates; the figures of `figures`."""
    config = runpy.run_path(str(CONFIGS / f"{variant.config}.py"))["get_config"](mode)
    config.update_from_flattened_dict({"seed": seed, **variant.changes})
    result = train_and_evaluate(config, workdir)
    if not result.finished:
        raise SystemExit("stopped: the same command goes on from here")
    report = evaluate_workdir(workdir, overwrite=True)
    return figures(read_config(workdir), report)


def figures(config: Any, report: Mapping[str, Any]) -> dict[str, Any]:
    """What the table shows of a report; 'bits' and 'scales' are None without a codebook."""
    tokenizer = build_tokenizer(config)
    codes = sum(height * width for height, width in tokenizer.grids)
    size, scales = tokenizer.codebook_size, None
    if "codebook" in report:
        (table,) = report["codebook"]["tables"].values()
        scales = [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]]
    values = {
        name: entry["value"]
        for section in ("reconstruction", "bound")
        for name, entry in report[section]["metrics"].items()
    }
    return {
        "bits": None if size is None else codes * math.log2(size),
        "scales": scales,
        "steps": config["train"]["steps"],
        **{name: values[name] for name in (*METRICS, "frechet_floor")},
    }


def markdown(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The table of all variants that have runs, with the floor of the Frechet distance below it."""
    heads = ["quantiser", "runs", "bits per image", *METRICS.values(), "usage", "perplexity"]
    lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
    floors = set()
    for variant in VARIANTS:
        found = of_variant(runs, variant.name)
        if not found:
            continue
        floors |= {round(run["frechet_floor"], 3) for run in found}
        bits = found[0]["bits"]
        cells = [variant.name, str(len(found)), "" if bits is None else f"{bits:,.0f}"]
        cells += [spread([run[name] for run in found]) for name in METRICS]
        cells += [by_scale(found, "usage", 2), by_scale(found, "perplexity", 0)]
        lines.append(f"| {' | '.join(cells)} |")
    floor = ", ".join(f"{value:.3f}" for value in sorted(floors))
    return "\n".join(lines) + f"\n\nFloor of the Frechet distance, real test images: {floor}.\n"


def by_scale(runs: Sequence[Mapping[str, Any]], name: str, digits: int) -> str:
    """The mean over runs at every scale, coarse to fine; empty without a codebook."""
    if runs[0]["scales"] is None:
        return ""
    scales = zip(*([scale[name] for scale in run["scales"]] for run in runs), strict=True)
    return ", ".join(spread(values, digits) for values in scales)


def jobs() -> Iterator[tuple[str, Variant, int]]:
    """(name, variant, seed) of every run that is asked for: all variants of a seed, then others."""
    for seed in SEEDS.value:
        for variant in VARIANTS:
            if re.search(ONLY.value, variant.name):
                yield f"{variant.name}: seed {int(seed)}", variant, int(seed)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    try:
        table = RunTable.open(OUT.value, MODE.value, markdown)
    except ValueError as error:
        raise app.UsageError(str(error)) from error
    wanted = list(jobs())
    for index, (name, variant, seed) in enumerate(wanted):
        if name in table.runs:
            continue
        print(f"\n{index + 1}/{len(wanted)} {name}", flush=True)
        folder = Path(WORKDIR.value) / re.sub(r"\W+", "_", name)
        table.add(name, run(variant, seed, folder, MODE.value))
    print(markdown(table.runs))


if __name__ == "__main__":
    app.run(main)
