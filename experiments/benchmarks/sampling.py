"""Times two settings of a sampler against each other, and both against what the machine allows.

    python experiments/benchmarks/sampling.py --repeats=3 --out=var_d16.json \
        --base='configs/imagenet256/var.py:d16 dtype=float32' \
        --other='configs/imagenet256/var.py:d16 dtype=float32 plain=True plain_steps=1'
    python experiments/benchmarks/sampling.py --steps_too \
        --base='configs/fashion_mnist/llamagen.py:demo batch=8 weights=int8' \
        --against='python other.py --images={images} --threads={threads}'

A setting is a config file with its argument and words NAME=VALUE: fields of the config, or one of

    batch=1            images at a time
    weights=float32    or bfloat16 or int8, see `ar_jax.sampling.weights`; the distance is printed
    plain=False        `ar_jax.sampling.plain`: no cache, layers scanned
    plain_steps=0      of which only so many are run and the time of all is told from; 0: all

Parameters are random and nothing is read. What is timed draws codes, compiled before, and waits for
them; --decode adds their images. All settings take turns --repeats times in one process, the rates
of the machine with them (see `ar_jax.compilation.floors`), so that what else runs on it meets all
alike: trust the ratios, each of one turn, more than the times. 'gap' is a time over the floor of
its turn. --steps_too times the steps of the base one by one, without draws, each compiled
for itself: for next-scale prediction. A step of raster is an image's time over their number.

--against runs a command with {images} replaced by --batch of the base and by its double: the
difference is its time for a batch, whatever it takes to start. It is told the number of threads by
{threads} and by OMP_NUM_THREADS, MKL_NUM_THREADS and OPENBLAS_NUM_THREADS.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shlex
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from ar_jax.build import build_objective, build_sampling, create_sampler
from ar_jax.compilation.floors import (
    Rates,
    Step,
    cache_bytes,
    measure_rates,
    sampling_step,
    sampling_work,
)
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import environment
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.sampling.plain import PlainSampler
from ar_jax.sampling.weights import CONTRACTED, distance, with_weights
from ar_jax.train.fields import matmul_precision

BASE = flags.DEFINE_string("base", None, "The setting that ratios are of.", required=True)
OTHER = flags.DEFINE_string("other", None, "Another setting.")
AGAINST = flags.DEFINE_string("against", None, "A command that draws {images} images.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Turns; medians and extremes count.", lower_bound=1)
WARMUP = flags.DEFINE_bool("warmup", True, "Begin with a turn that does not count.")
DECODE = flags.DEFINE_bool("decode", False, "Make images of the codes too.")
STEPS_TOO = flags.DEFINE_bool("steps_too", False, "Time the steps of the base one by one.")
OUT = flags.DEFINE_string("out", None, "JSON file of the figures.")

WORDS = {"batch": 1, "weights": "float32", "plain": False, "plain_steps": 0}


@dataclasses.dataclass
class Timed:
    """A setting, ready to be run."""

    call: Callable[[], Any]
    batch: int
    share: float  # of an image's steps that a call runs
    about: dict[str, Any]
    sampler: CachedSampler
    guided: bool
    cond: Any
    guidance: Any

    def seconds_an_image(self) -> float:
        """Of one call, waited for."""
        start = time.perf_counter()
        jax.block_until_ready(self.call())
        return (time.perf_counter() - start) / (self.batch * self.share)


def read_setting(text: str) -> tuple[Any, dict[str, Any]]:
    """(config, words); UsageError where the text is wrong."""
    place, *rest = text.split()
    path, _, argument = place.partition(":")
    spec = importlib.util.spec_from_file_location("setting", path)
    if spec is None or spec.loader is None or not Path(path).exists():
        raise app.UsageError(f"{path!r} is no config file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
    words = dict(WORDS)
    for word in rest:
        name, found, value = word.partition("=")
        if not found:
            raise app.UsageError(f"{word!r} of {text!r} must be NAME=VALUE")
        with contextlib.suppress(ValueError, SyntaxError):  # of a plain string
            value = ast.literal_eval(value)
        if name in WORDS:
            words[name] = value
            continue
        try:
            config.update_from_flattened_dict({name: value})
        except (KeyError, TypeError) as error:
            raise app.UsageError(f"{word!r} of {text!r}: {error}") from error
    return config, words


def prepare(text: str, config: Any, words: Mapping[str, Any]) -> Timed:
    """Builds a setting and compiles it."""
    objective: Any = build_objective(config)
    system, batch = objective.system, words["batch"]
    params = random_params(objective)
    sampler = create_sampler(system, params)
    if not isinstance(sampler, CachedSampler):
        raise app.UsageError(f"{text!r} has no cached sampler")
    knobs, guidance = build_sampling(config)
    cond, keys = system.backbone.conditioner.empty(batch), image_keys(0, 0, batch)
    schedule, share, about = system.schedule, 1.0, {"setting": text, **words}
    guided = bool(np.any(guidance.scales(schedule.num_steps, schedule.known) != 1.0))
    narrow = with_weights(sampler, words["weights"])
    if words["plain"]:
        steps = words["plain_steps"] or schedule.num_steps
        share = steps / schedule.num_steps
        shape = (batch, schedule.length, system.head.vocab_size)
        noise = jnp.asarray(np.random.default_rng(0).gumbel(size=shape), jnp.float32)
        plain = PlainSampler(system, params)
        call: Any = lambda: plain(cond, noise, knobs=knobs, guidance=guidance, steps=steps)  # noqa: E731
        call()
    else:
        lower, arguments = narrow.program(cond, keys, knobs=knobs, guidance=guidance)
        start = time.perf_counter()
        compiled = lower().compile()
        about["compile_seconds"] = time.perf_counter() - start
        plan = compiled.memory_analysis()
        if plan is not None:
            about["temp_bytes"] = int(plan.temp_size_in_bytes)
        call = lambda: compiled(*arguments)  # noqa: E731
    if DECODE.value:
        codes, draw = jax.block_until_ready(call()), call
        sampler.decode(codes)
        call = lambda: sampler.decode(draw())  # noqa: E731
    if words["weights"] != "float32":
        about["distance"] = distance(sampler, narrow, cond, guidance)
    return Timed(call, batch, share, about, narrow, guided, cond, guidance)


def random_params(objective: Any) -> dict[str, Any]:
    """Normal draws over the root of what is summed; compiling the true initial ones takes longer.

    Heads that begin at zero speak too, and so do kernels behind gates.
    """
    rng = np.random.default_rng(0)

    def init(key: jax.Array) -> dict[str, Any]:
        return {"tokenizer": init_tokenizer(objective.system, key), **objective.init(key)}

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = rng.standard_normal(leaf.shape, dtype=np.float32)
        names = [getattr(key, "key", "") for key in path]
        shape = leaf.shape["blocks" in names :]  # of one layer
        if len(shape) < 2:
            values = 0.02 * values + (names[-1] == "scale")
        else:
            summed = CONTRACTED.get(names[-2], 1) if len(shape) > 2 else 1
            values *= math.prod(shape[:summed]) ** -0.5
        return jnp.asarray(values, leaf.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(init, jax.random.key(0)))


def time_steps(timed: Timed) -> Iterator[tuple[int, Step, float]]:
    """(number, step, seconds) of each."""
    cond = jax.tree.map(lambda leaf: jnp.concatenate([leaf] * (1 + timed.guided)), timed.cond)
    for number in range(timed.sampler.system.schedule.num_steps):
        step = sampling_step(timed.sampler, timed.cond, number, guided=timed.guided)
        shape = step.context
        context = None if shape is None else jnp.zeros(shape.shape, shape.dtype)
        cache = jax.tree.map(lambda rows: jnp.zeros(rows.shape, rows.dtype), step.cache)
        run = jax.jit(step.run, donate_argnums=3)
        _, cache = jax.block_until_ready(run(timed.sampler.params, context, cond, cache))
        times = []
        for _ in range(REPEATS.value):
            start = time.perf_counter()
            _, cache = jax.block_until_ready(run(timed.sampler.params, context, cond, cache))
            times.append(time.perf_counter() - start)
        yield number, step, min(times)


def run_command(command: str, batch: int) -> float:
    """Seconds an image of it."""
    threads = str(len(os.sched_getaffinity(0)))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    taken = []
    for images in (batch, 2 * batch):
        text = command.replace("{images}", str(images)).replace("{threads}", threads)
        start = time.perf_counter()
        result = subprocess.run(
            shlex.split(text), env=os.environ | dict.fromkeys(names, threads), check=False
        )
        taken.append(time.perf_counter() - start)
        if result.returncode:
            raise SystemExit(f"{text} ended with {result.returncode}")
    return (taken[1] - taken[0]) / batch


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def say(name: str, values: Mapping[str, float], unit: str = "") -> None:
    """One line of a spread."""
    print(
        f"  {name:28} {values['median']:10.4g}{unit} ({values['least']:.4g} to "
        f"{values['most']:.4g})"
    )


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    if AGAINST.value and "{images}" not in AGAINST.value:
        raise app.UsageError(f"--against={AGAINST.value!r} must say {{images}} somewhere")
    configure_logging()
    texts = {"base": BASE.value} | ({"other": OTHER.value} if OTHER.value else {})
    settings = {}
    for name, text in texts.items():
        config, words = read_setting(text)
        try:
            with jax.default_matmul_precision(matmul_precision(config)):
                settings[name] = prepare(text, config, words)
        except ValueError as error:
            raise app.UsageError(f"{text!r}: {error}") from error
    turns: list[dict[str, float]] = []
    rates: list[Rates] = []
    for turn in range(-1 if WARMUP.value else 0, REPEATS.value):
        times = {name: timed.seconds_an_image() for name, timed in settings.items()}
        if turn < 0:
            continue
        if AGAINST.value:
            times["against"] = run_command(AGAINST.value, settings["base"].batch)
        turns.append(times)
        rates.append(measure_rates())
    result: dict[str, Any] = {
        "environment": environment(),
        "threads": len(os.sched_getaffinity(0)),
        "gflop_per_second": spread([rate.flops / 1e9 for rate in rates]),
        "gb_per_second": spread([rate.bytes / 1e9 for rate in rates]),
    }
    print(f"{result['threads']} threads")
    say("float32 product", result["gflop_per_second"], " GFLOP/s")
    say("memory, read", result["gb_per_second"], " GB/s")
    for name in turns[0]:
        seconds = [times[name] for times in turns]
        row = {"seconds_an_image": spread(seconds)}
        row["over_base"] = spread([times[name] / times["base"] for times in turns])
        print(f"{name}: {texts.get(name, AGAINST.value)}")
        say("seconds an image", row["seconds_an_image"])
        if name in settings:
            steps = settings[name].sampler.system.schedule.num_steps
            row["seconds_a_step"] = spread([s * settings[name].batch / steps for s in seconds])
            say("seconds a step of a batch", row["seconds_a_step"])
        if name != "base":
            say("times the base's", row["over_base"])
        if name in settings:
            row |= settings[name].about | gaps(settings[name], seconds, rates)
            for key in ("gap", "gap_flops", "gap_bytes"):
                say(key, row[key])
            print("  " + ", ".join(f"{k} {v}" for k, v in settings[name].about.items()))
        result[name] = row
    if STEPS_TOO.value:
        result["steps"] = table_of_steps(settings["base"], measure_rates())
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def gaps(timed: Timed, seconds: Sequence[float], rates: Sequence[Rates]) -> dict[str, Any]:
    """Of every turn the time over the floors of the cached sampler, whichever was timed."""
    work = sampling_work(timed.sampler, timed.cond, guided=timed.guided)
    floors = [rate.floors(work) for rate in rates]
    batches = [one * timed.batch for one in seconds]
    found: dict[str, Any] = {"flops": work.flops, "bytes": work.bytes}
    cache = jax.eval_shape(
        lambda: timed.sampler.system.backbone.init_cache(timed.batch * (1 + timed.guided))
    )
    found["cache_bytes"] = cache_bytes(cache)
    for name, key in (("gap", "floor"), ("gap_flops", "flops"), ("gap_bytes", "bytes")):
        found[name] = spread([b / f[key] for b, f in zip(batches, floors, strict=True)])
    return found


def table_of_steps(timed: Timed, rates: Rates) -> list[dict[str, float]]:
    """Prints and gives each timed step beside its floors."""
    rows = []
    print("step     codes         ms   flops' ms   bytes' ms    gap")
    for number, step, seconds in time_steps(timed):
        floors = rates.floors(step.work)
        size, gap = timed.sampler.system.schedule.sizes[number], seconds / floors["floor"]
        rows.append({"step": number, "codes": size, "seconds": seconds, "gap": gap, **floors})
        print(
            f"{number:4} {size:9} {1e3 * seconds:10.2f} {1e3 * floors['flops']:11.2f} "
            f"{1e3 * floors['bytes']:11.2f} {gap:6.2f}"
        )
    return rows


if __name__ == "__main__":
    app.run(main)
