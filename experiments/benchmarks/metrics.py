"""Measures what each metric costs on this machine, beside the network that gives its features.

    python experiments/benchmarks/metrics.py --out=metrics.json

Images and features are random: no number but the time is of interest. "CPU" is this
process's CPU seconds, all cores together, to which other programs on the machine add little; "peak"
is the most memory that the process has held so far, in MiB.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from ar_jax.evaluation.frechet import FeatureAccumulator, frechet_distance
from ar_jax.evaluation.inception_score import inception_score
from ar_jax.evaluation.manifold import precision_recall
from ar_jax.evaluation.reconstruction import ReconstructionMeter
from ar_jax.nn.inception import LOGITS, POOL

SIZE = flags.DEFINE_integer("size", 256, "Height and width of images.")
SAMPLES = flags.DEFINE_integer("samples", 2048, "Features of samples.")
REFERENCE = flags.DEFINE_integer("reference", 10_000, "Features of the reference.")
WIDTH = flags.DEFINE_integer("width", POOL, "Of the features.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Images or features at a time.")
OUT = flags.DEFINE_string("out", None, "JSON file; default prints the table only.")

Row = dict[str, Any]


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    rows = list(measure_all())
    if OUT.value is not None:
        Path(OUT.value).write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


def measure_all() -> list[Row]:
    """One row for each metric, printed as they come."""
    rng, batch, width = np.random.default_rng(0), BATCH_SIZE.value, WIDTH.value
    rows: list[Row] = []

    def timed(name: str, count: int, work: Callable[[], Any]) -> Any:
        cpu, wall = time.process_time(), time.monotonic()
        result = work()
        cpu, wall = time.process_time() - cpu, time.monotonic() - wall
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append(dict(metric=name, count=count, cpu=cpu, wall=wall, peak=peak))
        rate = count / max(cpu, 1e-9)
        said = f"CPU {cpu:8.2f} s  {rate:10.1f} a second  wall {wall:8.2f} s  peak {peak:6.0f} MiB"
        print(f"{name:<34} {count:>7,}  {said}", flush=True)
        return result

    pixels = rng.integers(0, 256, (batch, SIZE.value, SIZE.value, 3), dtype=np.uint8)

    def features(count: int) -> np.ndarray:
        return np.abs(rng.normal(0.4, 0.3, (count, width))).astype(np.float32)

    samples, reference = features(SAMPLES.value), features(REFERENCE.value)

    def accumulate(rows: np.ndarray) -> FeatureAccumulator:
        accumulator = FeatureAccumulator()
        for start in range(0, len(rows), batch):
            accumulator.add(rows[start : start + batch])
        return accumulator

    count = SAMPLES.value
    stats = timed("mean and covariance", count, lambda: accumulate(samples)).stats()
    other = accumulate(reference[:count]).stats()
    timed("FID of statistics", 1, lambda: frechet_distance(stats, other))
    logits = rng.normal(size=(count, LOGITS)).astype(np.float32)
    timed("inception score", count, lambda: inception_score(logits))
    pair = f"precision, recall; {REFERENCE.value:,} real"
    timed(pair, count, lambda: precision_recall(reference, samples))
    meter = ReconstructionMeter()
    timed("MSE, PSNR, SSIM", batch, lambda: meter.add(pixels, pixels[::-1]))
    return rows


if __name__ == "__main__":
    app.run(main)
