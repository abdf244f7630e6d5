"""Floors of a sampling step: counted work against arithmetic by hand, and the memory planned."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.compilation.floors import (
    Rates,
    Work,
    activation_bytes,
    cache_bytes,
    measure_rates,
    sampling_step,
    sampling_work,
    weight_bytes,
)
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.toy_systems import toy_labels, toy_system

WIDTH, HIDDEN, DEPTH, HEADS, VOCAB = 32, 40, 2, 4, 16
BATCH = 3


def sampler_of(name: str, **changes) -> CachedSampler:
    backbone = dict(width=WIDTH, mlp_hidden=HIDDEN, depth=DEPTH, heads=HEADS)
    if name == "raster":
        backbone |= dict(vocab_size=VOCAB)
    backbone |= changes
    return CachedSampler.create(*toy_system(name, vocab_size=VOCAB, backbone=backbone))


def test_work_of_a_raster_step():
    sampler = sampler_of("raster", kv_heads=2)
    step = sampling_step(sampler, toy_labels(BATCH), 5, guided=True)
    rows, seen = 2 * BATCH, 6  # the class's row and five codes
    block = 3 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN  # q, k and v of half the heads, out; gated MLP
    kernels = DEPTH * block + WIDTH * VOCAB
    attention = 2 * 2 * rows * DEPTH * seen * WIDTH
    assert step.work.flops == 2 * rows * kernels + attention
    assert weight_bytes(sampler.params) == 4 * kernels
    cache = 2 * DEPTH * rows * 2 * 16 * (WIDTH // HEADS) * 4
    assert cache_bytes(sampler.system.backbone.init_cache(rows)) == cache
    assert step.work.bytes == pytest.approx(4 * kernels + cache * seen / 16)
    # The middle step stands for all sixteen.
    middle = sampling_step(sampler, toy_labels(BATCH), 8, guided=True).work
    assert sampling_work(sampler, toy_labels(BATCH), guided=True) == Work(
        16 * middle.flops, 16 * middle.bytes
    )


def test_work_of_all_scales():
    sampler, cond = sampler_of("next_scale"), toy_labels(BATCH)
    works = [sampling_step(sampler, cond, i, guided=False).work for i in range(3)]
    total = sampling_work(sampler, cond, guided=False)
    assert total.flops == sum(w.flops for w in works)
    cache = cache_bytes(jax.eval_shape(lambda: sampler.system.backbone.init_cache(BATCH)))
    assert cache == 2 * DEPTH * BATCH * 21 * WIDTH * 4
    weights = weight_bytes(sampler.params)
    assert total.bytes == pytest.approx(3 * weights + cache * (1 + 5 + 21) / 21)


def test_rates():
    rates = measure_rates(repeats=1)
    assert 1e8 < rates.flops < 1e14 and 1e8 < rates.bytes < 1e13
    floors = Rates(flops=10.0, bytes=4.0).floors(Work(flops=20.0, bytes=12.0))
    assert floors == {"flops": 2.0, "bytes": 3.0, "floor": 3.0}


@pytest.mark.parametrize("name", ["raster", "next_scale"])
def test_memory_of_the_program(name):
    """Weights, one cache, one step's activations, and little else."""
    sampler = sampler_of(name)
    rows, backbone = 2 * 16, sampler.system.backbone
    inputs = (toy_labels(16), image_keys(0, 0, 16))
    settings: dict[str, Any] = dict(knobs=Knobs(top_k=3), guidance=Guidance(scale=2.0))
    lower, arguments = sampler.program(*inputs, **settings)
    compiled = lower().compile()
    np.testing.assert_array_equal(compiled(*arguments), sampler(*inputs, **settings).codes)
    plan = compiled.memory_analysis()
    planned = plan.temp_size_in_bytes + plan.argument_size_in_bytes + plan.output_size_in_bytes
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(arguments[0]))
    cache = cache_bytes(jax.eval_shape(lambda: backbone.init_cache(rows)))
    bound = weights + cache + activation_bytes(sampler.system, rows)
    assert planned <= 1.2 * bound
    assert cache > 0.2 * bound  # a second cache would not fit
