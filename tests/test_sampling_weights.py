"""Narrow weights and the plain sampler: how far they are from the cached sampler's own draws."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.sampling.plain import PlainSampler
from ar_jax.sampling.weights import Int8, distance, with_weights
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH = 4
GUIDED = Guidance(scale=2.0)


SLOW = pytest.param("next_scale", marks=pytest.mark.slow)


@pytest.fixture(scope="module", params=[SLOW, "raster"])
def toy(request):
    return toy_system(request.param)


def test_the_plain_sampler_draws_the_same_codes(toy):
    system, params = toy
    rng = np.random.default_rng(0)
    shape = (BATCH, system.schedule.length, system.head.vocab_size)
    noise = jnp.asarray(rng.gumbel(size=shape), jnp.float32)
    settings: Any = dict(knobs=Knobs(temperature=0.8, top_k=6, top_p=0.95), guidance=GUIDED)
    cached = CachedSampler.create(system, params)(toy_labels(BATCH), noise=noise, **settings)
    plain = PlainSampler(system, params)
    np.testing.assert_array_equal(plain(toy_labels(BATCH), noise, **settings), cached.codes)
    few = plain(toy_labels(BATCH), noise, steps=2, **settings)
    seen = system.schedule.starts[2]
    np.testing.assert_array_equal(few[:, :seen], cached.codes[:, :seen])
    assert not few[:, seen:].any()


def test_a_kernel_in_int8_is_off_by_half_a_scale_at_most():
    kernel = np.random.default_rng(1).standard_normal((6, 5, 7)).astype(np.float32)
    kernel[..., 0] = 0.0  # a channel of zeros
    for contracted, scales in ((1, (1, 5, 7)), (2, (1, 1, 7))):
        narrow = Int8.of(jnp.asarray(kernel), contracted)
        assert narrow.values.dtype == jnp.int8 and narrow.scale.shape == scales
        assert (np.abs(narrow.values).max(tuple(range(contracted)))[..., 1:] == 127).all()
        error = np.abs(narrow.widened() - kernel)
        assert (error <= 0.5001 * np.broadcast_to(narrow.scale, kernel.shape)).all()
        assert error.max() > 0


@pytest.mark.parametrize("weights", [pytest.param("bfloat16", marks=pytest.mark.slow), "int8"])
def test_narrow_weights_draw_nearly_the_same(toy, weights):
    sampler = CachedSampler.create(*toy)
    narrow = with_weights(sampler, weights)
    wide_bytes, bytes_ = (
        sum(leaf.nbytes for leaf in jax.tree.leaves(one.params["backbone"]["stack"]))
        for one in (sampler, narrow)
    )
    assert bytes_ < {"bfloat16": 0.65, "int8": 0.55}[weights] * wide_bytes
    found = distance(sampler, narrow, toy_labels(BATCH), GUIDED)
    assert 0 < found["mean_logit_error"] < 0.1 * found["logit_deviation"]
    assert found["mean_logit_error"] <= found["largest_logit_error"]
    assert 0.9 < found["same_next_code"] <= 1 and found["same_code"] > 0.5
    samples = narrow(toy_labels(BATCH), image_keys(0, 0, BATCH), guidance=GUIDED)
    assert samples.codes.shape == (BATCH, toy[0].schedule.length)
    # The measure tells the weights from themselves and from others.
    assert distance(sampler, sampler, toy_labels(BATCH))["largest_logit_error"] == 0
    broken = dict(narrow.params, head=jax.tree.map(jnp.zeros_like, narrow.params["head"]))
    broken = type(narrow)(narrow.system, broken)
    assert distance(sampler, broken, toy_labels(BATCH))["same_next_code"] < 0.5


def test_unknown_weights():
    with pytest.raises(ValueError, match="weights='int4' must be one of"):
        with_weights(None, "int4")
