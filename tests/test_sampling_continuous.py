"""Continuous batching: what a request gets does not depend on who joins and leaves beside it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.sampling.continuous import ContinuousBatch, Request, admit, draw_next
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

KEYS = image_keys(5, 0, 8)
KNOBS = (
    Knobs(),
    Knobs(temperature=0.7, top_k=3),
    Knobs(temperature=0),
    Knobs(temperature=1.5, top_p=0.8, step_temperatures=tuple(np.linspace(0.5, 2, 9))),
)
GUIDANCE = (None, Guidance(scale=3.0, kind="linear"), Guidance(scale=0.5))
LENGTHS = (None, 4, 1, 7, None, 2, 9, 5)


@pytest.fixture(scope="module")
def sampler() -> CachedSampler:
    return CachedSampler.create(
        *toy_system("raster", schedule=dict(grid=3), autoencoder=dict(image_size=6))
    )


@pytest.fixture(scope="module")
def requests() -> list[Request]:
    return [
        Request(
            cond={"label": jnp.int32(i % 3)},
            key=KEYS[i],
            knobs=KNOBS[i % len(KNOBS)],
            guidance=GUIDANCE[i % len(GUIDANCE)],
            length=length,
        )
        for i, length in enumerate(LENGTHS)
    ]


@pytest.fixture(scope="module")
def expected(sampler, requests) -> list[np.ndarray]:
    return [alone(sampler, request) for request in requests]


def alone(sampler: CachedSampler, request: Request) -> np.ndarray:
    """The codes that `CachedSampler` draws, 0 behind the request's length."""
    cond = {"label": request.cond["label"][None]}
    codes = sampler(cond, request.key[None], knobs=request.knobs, guidance=request.guidance).codes
    length = request.length or codes.shape[1]
    return np.where(np.arange(codes.shape[1]) < length, np.asarray(codes[0]), 0)


@pytest.mark.parametrize(("slots", "codes_per_call"), [(3, 2), (1, 20)])
def test_a_request_gets_what_it_gets_alone(sampler, requests, expected, slots, codes_per_call):
    batch = ContinuousBatch(sampler, slots=slots, codes_per_call=codes_per_call)
    for number, codes in enumerate(batch.run(requests)):
        np.testing.assert_array_equal(codes, expected[number], str(requests[number]))


def test_requests_join_while_others_are_drawn(sampler, requests, expected):
    batch = ContinuousBatch(sampler, slots=3, codes_per_call=2)
    done: dict[int, jax.Array] = {}
    left = list(requests)
    assert not batch.busy and batch.step() == {}
    while left or batch.busy:
        if left:
            batch.submit(left.pop(0))
        done |= batch.step()
    assert sorted(done) == list(range(len(requests)))
    for number, codes in done.items():
        np.testing.assert_array_equal(codes, expected[number])


def test_two_programs_serve_all(sampler, requests):
    programs: list[Any] = [admit, draw_next]
    before = [program._cache_size() for program in programs]
    batch = ContinuousBatch(sampler, slots=4, codes_per_call=2)
    for _ in range(2):
        batch.run(requests)
    assert [program._cache_size() for program in programs] == [size + 1 for size in before]


def test_without_guidance_half_the_rows(sampler, requests, expected):
    plain = [n for n, request in enumerate(requests) if request.guidance is None]
    batch = ContinuousBatch(sampler, slots=2, guided=False)
    for number, codes in zip(plain, batch.run([requests[n] for n in plain]), strict=True):
        np.testing.assert_array_equal(codes, expected[number])
    assert batch._slots is not None and batch._slots.cache.k[0].shape[1] == 1
    with pytest.raises(ValueError, match="guided=False says that none has"):
        batch.submit(requests[1])


def test_what_cannot_be_drawn_is_refused(sampler):
    one = Request(cond={"label": jnp.int32(0)}, key=KEYS[0])
    with pytest.raises(ValueError, match="slots is 0; it must be at least 1"):
        ContinuousBatch(sampler, slots=0)
    with pytest.raises(ValueError, match="codes_per_call is 0; it must be at least 1"):
        ContinuousBatch(sampler, slots=1, codes_per_call=0)
    batch = ContinuousBatch(sampler, slots=1)
    for length in (0, 10):
        with pytest.raises(ValueError, match=f"length is {length}; it must be between 1 and 9"):
            batch.submit(Request(cond=one.cond, key=one.key, length=length))
    with pytest.raises(ValueError, match="choice_temperature is 1.0, which means nothing"):
        batch.submit(Request(cond=one.cond, key=one.key, knobs=Knobs(choice_temperature=1.0)))
    scales = CachedSampler.create(*toy_system("next_scale"))
    with pytest.raises(ValueError, match="continuous batching is of systems that draw one code"):
        ContinuousBatch(scales, slots=1)
    assert not batch.busy
