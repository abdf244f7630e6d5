"""Throughput of a config on this machine: the train step and the sampler, on synthetic data.

What is timed is what training and sampling run, ahead of time compiled, each call waited for. The
host's part (reading and decoding of data, writing of checkpoints) is not in it.
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ar_jax.api import Params
from ar_jax.build import build_objective, build_sampling, create_sampler, trains_tokenizer
from ar_jax.io.run_info import environment
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.objectives.perceptual import frozen_shapes
from ar_jax.parallel.mesh import put_batch, use_mesh
from ar_jax.parallel.rules import shardings
from ar_jax.sampling.loop import image_keys
from ar_jax.tokenizers.tokenizer import to_float
from ar_jax.train.fields import matmul_precision, read_settings
from ar_jax.train.program import build_program

INPUTS = ("images", "codes")


def benchmark(
    config: ml_collections.ConfigDict,
    *,
    batch_size: int | None = None,
    sample_batch_size: int | None = None,
    steps: int = 10,
    warmup: int = 2,
    inputs: str = "images",
    sample: bool = True,
) -> dict[str, Any]:
    """Measures a tokenizer's train step, encoder and decoder, or a generator's step and sampler.

    Args:
        config: of any system; the sections data and tokenizer_checkpoint are not read.
        batch_size: of a train step; None: the config's.
        sample_batch_size: images sampled, encoded or decoded at a time, on one device; None: as
            ``batch_size``.
        steps: calls that are timed; the median counts.
        warmup: calls before them.
        inputs: what a generator trains on: 'images' (its tokenizer encodes them at every step) or
            'codes' (cached).
        sample: whether to measure more than the train step.

    Returns:
        {'environment', 'parameters', 'train', and 'sample' or 'encode' and 'decode'}: plain
        numbers. 'train' and the rest hold compile_seconds, call_seconds (median), fastest and
        slowest call, images and (where there are codes) tokens per second, and memory; see
        `program_memory` and `peak_memory`.

    Raises:
        ValueError: a bad field or argument.
    """
    if inputs not in INPUTS:
        raise ValueError(f"--inputs={inputs!r} is none of {INPUTS}")
    for name, value, least in (("steps", steps, 1), ("warmup", warmup, 0)):
        if value < least:
            raise ValueError(f"--{name}={value} must be at least {least}")
    config = ml_collections.ConfigDict(config.to_dict())
    if batch_size is not None:
        config.train.batch_size = batch_size
    count = config.train.batch_size if sample_batch_size is None else sample_batch_size
    if count < 1:
        raise ValueError(f"--sample_batch_size={count} must be at least 1")
    clock = Clock(steps, warmup)
    result: dict[str, Any] = {"environment": environment()}
    result |= measure_training(config, clock, inputs)
    if sample:
        with jax.default_matmul_precision(matmul_precision(config)):
            measure = measure_tokenizer if trains_tokenizer(config) else measure_sampling
            result |= measure(config, clock, count)
    return result


class Clock:
    """Times calls of compiled programs."""

    def __init__(self, steps: int, warmup: int) -> None:
        self._steps = steps
        self._warmup = warmup

    def time(
        self, lower: Callable[[], Any], call: Callable[[Any], Any], images: int, tokens: int
    ) -> dict[str, Any]:
        """Compiles and times one program.

        Args:
            lower: () -> what `jax.jit(f).lower(...)` returns.
            call: runs the compiled program and returns its result.
            images: made or used by a call.
            tokens: of one image, 0 if there are none.
        """
        start = time.perf_counter()
        compiled = lower().compile()
        compile_seconds = time.perf_counter() - start
        seconds = []
        for _ in range(self._warmup + self._steps):
            start = time.perf_counter()
            jax.block_until_ready(call(compiled))
            seconds.append(time.perf_counter() - start)
        timed = seconds[self._warmup :]
        median = statistics.median(timed)
        rates = {"images_per_second": images / median}
        if tokens:
            rates["tokens_per_second"] = images * tokens / median
        return {
            "batch_size": images,
            "compile_seconds": compile_seconds,
            "call_seconds": median,
            "fastest_call_seconds": min(timed),
            "slowest_call_seconds": max(timed),
            **rates,
            "program": program_memory(compiled),
            **peak_memory(),
        }


def measure_training(
    config: ml_collections.ConfigDict, clock: Clock, inputs: str
) -> dict[str, Any]:
    """{'parameters', 'train'}: the train step over the config's mesh."""
    settings = read_settings(config)
    objective: Any = build_objective(config)
    rows, tokens = settings.train.batch_size, objective.tokens_per_image
    rng = np.random.default_rng(0)
    batch: dict[str, np.ndarray] = {"label": np.zeros(rows, np.int32)}
    frozen: Params = {}
    tokenizer = getattr(objective, "tokenizer", None)
    if tokenizer is None:
        system = objective.system
        tokenizer = system.tokenizer
        batch |= jax.device_get(system.backbone.conditioner.empty(rows))
        frozen = {"tokenizer": fresh_tokenizer(system)}
        tokens = system.schedule.length
    elif inputs == "codes":
        raise ValueError("--inputs='codes': a tokenizer trains on images")
    else:
        frozen = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), frozen_shapes(objective))
    if inputs == "codes":
        shape = (rows, *tokenizer.encoding_shape)
        if tokenizer.codebook_size is None:
            batch["codes"] = rng.standard_normal(shape, dtype=np.float32)
        else:
            size = 2 if tokenizer.bits else tokenizer.codebook_size
            batch["codes"] = rng.integers(0, size, shape, dtype=tokenizer.codes_dtype)
    else:
        shape = (rows, *tokenizer.image_shape)
        batch["image"] = rng.integers(0, 256, shape, dtype=np.uint8)
    with use_mesh(settings.mesh), jax.default_matmul_precision(settings.precision):
        program = build_program(
            objective,
            settings.optimizer,
            settings.mesh,
            seed=settings.seed,
            accumulation=settings.train.accumulation,
            ema_decay=settings.ema.decay,
            ema_warmup=settings.ema.warmup,
            adversary_optimizer=settings.discriminator_optimizer,
        )
        placed = put_batch(batch, program.rows)
        frozen = jax.device_put(frozen, shardings(frozen, settings.mesh))
        state = program.init()

        def call(compiled: Any) -> Any:
            nonlocal state
            state, metrics = compiled(state, frozen, placed, program.key)
            return metrics

        measured = clock.time(
            lambda: program.train_step.lower(state, frozen, placed, program.key),  # type: ignore[attr-defined]
            call,
            rows,
            tokens,
        )
    return {
        "parameters": count_parameters(program.abstract.params),
        "train": {**measured, "inputs": inputs, "mesh": dict(settings.mesh.shape)},
    }


def measure_sampling(config: ml_collections.ConfigDict, clock: Clock, count: int) -> dict[str, Any]:
    """{'sample', 'decode'}: drawing of codes with the config's guidance, and their images."""
    objective: Any = build_objective(config)
    system = objective.system
    params = {"tokenizer": fresh_tokenizer(system), **jax.jit(objective.init)(jax.random.key(0))}
    sampler = create_sampler(system, params)
    knobs, guidance = build_sampling(config)
    schedule = system.schedule
    cond, keys = system.backbone.conditioner.empty(count), image_keys(0, 0, count)
    lower, arguments = sampler.program(cond, keys, knobs=knobs, guidance=guidance)
    drawn = clock.time(lower, lambda compiled: compiled(*arguments), count, schedule.length)
    guided = bool(np.any(guidance.scales(schedule.num_steps, schedule.known) != 1.0))
    decoded = measure_decoding(system.tokenizer, params["tokenizer"], clock, count)
    return {"sample": {**drawn, "guided": guided}, "decode": decoded}


def measure_tokenizer(
    config: ml_collections.ConfigDict, clock: Clock, count: int
) -> dict[str, Any]:
    """{'encode', 'decode'}: of a tokenizer, on one device."""
    objective: Any = build_objective(config)
    tokenizer, tokens = objective.tokenizer, objective.tokens_per_image
    params = jax.jit(objective.init)(jax.random.key(0))
    images = jnp.zeros((count, *tokenizer.image_shape), jnp.uint8)

    @jax.jit
    def encode(params: Params, images: jax.Array) -> jax.Array:
        return tokenizer.apply({"params": params}, to_float(images), method="encode")

    encoded = clock.time(
        lambda: encode.lower(params, images),
        lambda compiled: compiled(params, images),
        count,
        tokens,
    )
    return {"encode": encoded, "decode": measure_decoding(tokenizer, params, clock, count)}


def measure_decoding(tokenizer: Any, params: Params, clock: Clock, count: int) -> dict[str, Any]:
    """The decoder of a tokenizer, on ``count`` images' codes."""
    codes = jnp.zeros((count, *tokenizer.codes_shape), tokenizer.codes_dtype)

    @jax.jit
    def decode(params: Params, codes: jax.Array) -> jax.Array:
        return tokenizer.apply({"params": params}, codes, method="decode")

    return clock.time(
        lambda: decode.lower(params, codes),
        lambda compiled: compiled(params, codes),
        count,
        tokenizer.codes_shape[0],
    )


def fresh_tokenizer(system: Any) -> Params:
    """Random parameters of a generator's tokenizer: their values cost no time."""
    return jax.jit(lambda key: init_tokenizer(system, key))(jax.random.key(1))


def count_parameters(params: Params) -> int:
    """Numbers in a pytree of arrays or their shapes."""
    return sum(int(np.prod(leaf.shape, dtype=np.int64)) for leaf in jax.tree.leaves(params))


def program_memory(compiled: Any) -> dict[str, int]:
    """What the compiler plans for one device, in bytes; {} where it does not say."""
    plan = compiled.memory_analysis()
    if plan is None:
        return {}
    names = ("argument", "output", "alias", "temp", "generated_code")
    return {f"{name}_bytes": int(getattr(plan, f"{name}_size_in_bytes")) for name in names}


def peak_memory() -> dict[str, int]:
    """Largest use so far, in bytes: of the process, and of one device where it keeps count."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = {"process_peak_bytes": peak if sys.platform == "darwin" else peak * 1024}
    counts = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in counts if "peak_bytes_in_use" in stats]
    return found | ({"device_peak_bytes": max(peaks)} if peaks else {})
