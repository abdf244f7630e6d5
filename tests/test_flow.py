"""Flow matching: paths, time indices, and the law of both ways back by moments."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nn import flow
from ar_jax.nn.flow import Flow, interpolate, time_index
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")

MEAN, STD, COUNT = 0.7, 0.4, 40_000


def way(sampler: str, steps: int) -> Flow:
    return Flow(sampler=sampler, steps=steps, last=0.04)


def velocity(x: Any, t: Any, state: Any) -> Any:
    """E[noise - code | x_t] of codes that are normal."""
    variance = (1 - t) ** 2 * STD**2 + t**2
    share = (t - (1 - t) * STD**2) / variance
    return -MEAN + share * (x - (1 - t) * MEAN), state + 1


def moments(sampler: str, steps: int = 200, temperature: float = 1.0) -> tuple[float, float, int]:
    """(mean, deviation, evaluations)."""
    start, key = jax.random.normal(jax.random.key(0), (COUNT, 1)), jax.random.key(1)

    @jax.jit
    def run(start: jax.Array) -> Any:
        return way(sampler, steps).sample(
            velocity,
            start,
            lambda n: jax.random.normal(jax.random.fold_in(key, n), start.shape),
            jnp.int32(0),
            temperature,
        )

    codes, count = run(start)
    return float(codes.mean()), float(codes.std()), int(count)


@pytest.mark.parametrize("sampler", flow.SAMPLERS)
def test_codes_have_their_law(sampler):
    mean, std, count = moments(sampler)
    assert abs(mean - MEAN) < 0.01 and abs(std / STD - 1) < 0.025 and count == 200


def test_a_broken_drift_is_found(monkeypatch):
    """Noise without the score that pays for it."""
    whole = Flow.step

    def step(self: Flow, n: Any, x: Any, velocity: Any, noise: Any, temperature: Any) -> Any:
        plain = Flow(sampler="euler", steps=self.steps, last=self.last)
        still = whole(self, n, x, velocity, noise, temperature)
        drift = whole(self, n, x, velocity, 0.0 * noise, temperature)
        return whole(plain, n, x, velocity, noise, temperature) + still - drift

    monkeypatch.setattr(Flow, "step", step)
    _, std, _ = moments("euler_maruyama")
    assert abs(std / STD - 1) > 0.5


def test_temperature_acts_on_the_noise_of_the_steps():
    assert moments("euler_maruyama", temperature=0.5)[1] < 0.8 * STD
    assert moments("euler", temperature=0.5) == moments("euler")


def test_one_euler_step_from_a_straight_path_is_exact():
    """The conditional velocity of one code leads to it whatever the number of steps."""
    code, noise = jnp.float32([[2.0, -1.0]]), jnp.float32([[0.3, 0.9]])
    np.testing.assert_allclose(interpolate(code, noise, 0.0), code)
    np.testing.assert_allclose(interpolate(code, noise, 1.0), noise)
    for steps in (1, 5):
        found, _ = way("euler", steps).sample(lambda x, t, s: (noise - code, s), noise, noise)
        np.testing.assert_allclose(found, code, rtol=1e-5)


def test_times():
    np.testing.assert_allclose(way("euler", 4).times, [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(way("euler_maruyama", 3).times, [1, 0.52, 0.04, 0])
    index = time_index(np.array([0.0, 0.0009, 0.001, 0.5, 0.9999, 1.0], np.float32))
    np.testing.assert_array_equal(index, [0, 0, 1, 500, 999, 1000])


def test_the_last_step_has_no_noise():
    x, v = jnp.float32([[1.0]]), jnp.float32([[0.5]])
    steps = way("euler_maruyama", 3)
    for n, moves in ((0, True), (1, True), (2, False)):
        ends = [steps.step(jnp.int32(n), x, v, jnp.float32([[e]]), 1.0) for e in (0.0, 1.0)]
        assert (float(ends[0][0, 0]) != float(ends[1][0, 0])) == moves
    # w = 2 t, s = -((1 - t) v + x) / t: at t = 0.52 with dt = -0.48.
    score = -(0.48 * 0.5 + 1.0) / 0.52
    expected = 1.0 + (0.5 - 0.52 * score) * -0.48 + np.sqrt(2 * 0.52 * 0.48)
    np.testing.assert_allclose(steps.step(jnp.int32(1), x, v, x, 1.0), [[expected]], rtol=1e-6)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"sampler": "heun"}, "head.sampler is 'heun'"),
        ({"steps": 0}, "head.sampling_steps is 0"),
        ({"last": 1.0}, "head.last is 1.0"),
    ],
)
def test_bad_fields_are_errors(fields, words):
    with pytest.raises(ValueError, match=words):
        Flow(**{"sampler": "euler_maruyama", "steps": 4, "last": 0.04, **fields})
