"""Requests that arrive at random: continuous batching beside batches that start and end together.

    python experiments/benchmarks/serving.py --workdir=demo/llamagen/generator --slots=8

Every request is an image of a random class, a random length of its codes and a random strength of
guidance, and comes a random time after the one before it (a Poisson process). ``fixed`` waits until
--slots requests are there (or no more will come), draws whole images of all, and takes the next.
Both draw the same requests in one run. Times are of an arrival's clock that goes on by what the
work took, so that the load is the same for both. Printed: images per second, and the mean and the
95th percentile of the time from arrival to the end.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ar_jax.build import create_sampler
from ar_jax.evaluation.load import load_system
from ar_jax.evaluation.samples import check_class_conditional, sampling_of
from ar_jax.io.console import configure_logging
from ar_jax.sampling.continuous import ContinuousBatch, Request
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys

WORKDIR = flags.DEFINE_string("workdir", None, "Of a raster generator.", required=True)
SLOTS = flags.DEFINE_integer("slots", 8, "Requests that are drawn at a time.")
REQUESTS = flags.DEFINE_integer("requests", 64, "How many come.")
RATES = flags.DEFINE_list(
    "rates", ["0.5", "0.8", "2"], "Arrivals a second, in shares of what whole fixed batches draw."
)
SHORTEST = flags.DEFINE_float("shortest", 0.25, "Least length, a share of an image's codes.")
CODES_PER_CALL = flags.DEFINE_integer("codes_per_call", 4, "See `ContinuousBatch`.")
SEED = flags.DEFINE_integer("seed", 0, "Of the requests.")
OUT = flags.DEFINE_string("out", None, "JSON file of the figures.")

# Serves a batch of arrivals: takes them and a clock's start, gives each one's time of its end.
Serve = Callable[[Sequence[Request], np.ndarray], np.ndarray]


def random_requests(sampler: CachedSampler, knobs: Knobs) -> list[Request]:
    """--requests of them."""
    random = np.random.default_rng(SEED.value)
    length = sampler.system.schedule.length
    least = max(1, round(SHORTEST.value * length))
    keys = image_keys(SEED.value, 0, REQUESTS.value)
    return [
        Request(
            cond={"label": jnp.int32(random.integers(sampler.system.backbone.num_classes))},
            key=keys[number],
            knobs=knobs,
            guidance=Guidance(scale=float(random.uniform(1.5, 4.0))),
            length=int(random.integers(least, length + 1)),
        )
        for number in range(REQUESTS.value)
    ]


def serve_continuously(batch: ContinuousBatch) -> Serve:
    """By `ContinuousBatch`: who has arrived is submitted before every call."""

    def serve(requests: Sequence[Request], arrivals: np.ndarray) -> np.ndarray:
        ends, clock, sent = np.zeros(len(requests)), 0.0, 0
        numbers: dict[int, int] = {}
        while sent < len(requests) or batch.busy:
            if not batch.busy:
                clock = max(clock, arrivals[sent])
            while sent < len(requests) and arrivals[sent] <= clock:
                numbers[batch.submit(requests[sent])] = sent
                sent += 1
            start = time.perf_counter()
            done = jax.block_until_ready(batch.step())
            clock += time.perf_counter() - start
            ends[[numbers[number] for number in done]] = clock
        return ends

    return serve


def serve_fixed(sampler: CachedSampler, slots: int) -> Serve:
    """By whole batches; all images of one have the guidance of its first, which favours it."""

    def serve(requests: Sequence[Request], arrivals: np.ndarray) -> np.ndarray:
        ends, clock = np.zeros(len(requests)), 0.0
        for first in range(0, len(requests), slots):
            part = requests[first : first + slots]
            clock = max(clock, arrivals[first + len(part) - 1])
            filled = [part[min(i, len(part) - 1)] for i in range(slots)]
            labels = jnp.stack([request.cond["label"] for request in filled])
            keys = jnp.stack([request.key for request in filled])
            start = time.perf_counter()
            samples = sampler(
                {"label": labels}, keys, knobs=part[0].knobs, guidance=part[0].guidance
            )
            jax.block_until_ready(samples.codes)
            clock += time.perf_counter() - start
            ends[first : first + len(part)] = clock
        return ends

    return serve


def figures(serve: Serve, requests: Sequence[Request], arrivals: np.ndarray) -> dict[str, float]:
    """Of one way to serve."""
    ends = serve(requests, arrivals)
    waits = ends - arrivals
    return {
        "images_per_second": len(requests) / (ends.max() - arrivals[0]),
        "mean_seconds": float(waits.mean()),
        "seconds_of_95_percent": float(np.percentile(waits, 95)),
    }


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    config, system, params = load_system(WORKDIR.value)
    check_class_conditional(system)
    sampler, knobs = create_sampler(system, params), sampling_of(config)[0]
    if not isinstance(sampler, CachedSampler):
        raise app.UsageError(f"--workdir={WORKDIR.value} holds no raster generator")
    batch = ContinuousBatch(sampler, slots=SLOTS.value, codes_per_call=CODES_PER_CALL.value)
    requests = random_requests(sampler, knobs)
    ways = {
        "continuous": serve_continuously(batch),
        "fixed": serve_fixed(sampler, SLOTS.value),
    }
    at_once = np.zeros(len(requests))
    for serve in ways.values():
        serve(requests[: SLOTS.value], at_once[: SLOTS.value])  # compiles
    capacity = figures(ways["fixed"], requests, at_once)["images_per_second"]
    gaps = np.random.default_rng(SEED.value + 1).exponential(1.0, len(requests))
    found = {}
    print(f"whole fixed batches of {SLOTS.value}: {capacity:.1f} images/s")
    for rate in map(float, RATES.value):
        arrivals = np.cumsum(gaps) / (rate * capacity)
        found[f"{rate:g}"] = {name: figures(way, requests, arrivals) for name, way in ways.items()}
        print(f"arrivals at {rate:g} of that:")
        for name, values in found[f"{rate:g}"].items():
            print(f"  {name:10}", ", ".join(f"{key} {value:.3f}" for key, value in values.items()))
    if OUT.value:
        about = {"slots": SLOTS.value, "codes_per_call": CODES_PER_CALL.value}
        text = json.dumps({**about, "capacity": capacity, "rates": found}, indent=1)
        Path(OUT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    app.run(main)
