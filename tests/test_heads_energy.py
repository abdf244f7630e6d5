"""The energy head: its score is strictly proper, and its samples get the law of the codes."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from ar_jax.heads.energy import EnergyHead
from tests.modules import init
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Scaled(EnergyHead):
    """Samples hidden * noise: a family of laws whose scale is the hidden state."""

    def setup(self) -> None:
        pass

    def __call__(self, hidden: Any, noise: Any, temperature: Any = 1.0) -> Any:
        return hidden * noise


@pytest.mark.parametrize(("factor", "best"), [(1.0, 1.0), (0.99, 0.9803), (0.9, 0.825), (0.0, 0.5)])
def test_the_score_is_least_at_the_scale_of_the_codes(factor, best):
    """Normal codes: least at sqrt(T^2 / (2 - T^2)); distances alone make samples collapse."""
    head = Scaled(code_width=1, width=1, depth=0, train_temperature=factor)
    code_key, noise_key = jax.random.split(jax.random.key(0))
    codes = jax.random.normal(code_key, (100_000, 1))
    draws = jax.random.normal(noise_key, (100_000, 2, 1))

    def mean(scale: jax.Array) -> jax.Array:
        return head.apply({}, scale[None, None], codes, draws, method="loss")[0].mean()

    scales = jnp.linspace(0.5, 1.3, 41)
    found = jax.jit(lambda scales: jax.lax.map(mean, scales))(scales)
    np.testing.assert_allclose(scales[jnp.argmin(found)], best, atol=0.03)


def head_of(**fields: Any) -> tuple[EnergyHead, Any]:
    """A head of two hidden numbers with parameters that let every part speak."""
    head = EnergyHead(**(dict(code_width=2, width=8, depth=2, noise_width=4) | fields))
    shapes = init(head, jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros((1, 4)))
    rng = np.random.default_rng(0)
    return head, jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), shapes)


def test_a_new_head_loses_twice_the_length_of_the_code():
    """All samples are zero; where they are equal nothing pulls them apart, and nothing is NaN."""
    head = EnergyHead(code_width=2, width=8, depth=1, noise_width=4, alpha=1.5)
    hidden, codes = jnp.ones((3, 2)), jnp.asarray([[3.0, 4.0], [0.0, 0.0], [0.0, -1.0]])
    draws = head.draws(jax.random.split(jax.random.key(1)), (3,))
    params = init(head, jax.random.key(0), hidden, draws[:, 0])

    def loss(params: Any) -> Any:
        return head.apply({"params": params}, hidden, codes, draws, method="loss")[0]

    np.testing.assert_allclose(jax.jit(loss)(params), [2 * 5**1.5, 0.0, 2.0], rtol=1e-6)
    gradient = jax.jit(jax.grad(lambda params: loss(params).sum()))(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert np.abs(gradient["output"]["bias"]).max() > 0


def test_noise_is_uniform_around_zero():
    head, _ = head_of()
    draws = head.draws(jax.random.split(jax.random.key(3)), (5000,))
    assert draws.shape == (5000, 2, 4)
    codes = jax.vmap(head.noise)(jax.random.split(jax.random.key(4), 5000))
    for drawn in (draws[:, 0, 0], draws[:, 1, 3], codes[:, 2]):
        assert stats.kstest(np.asarray(drawn), stats.uniform(-0.5, 1.0).cdf).pvalue > 1e-3
    assert abs(np.corrcoef(draws[:, 0, 0], draws[:, 1, 0])[0, 1]) < 0.06


def test_guidance_mixes_hidden_states():
    head, params = head_of()
    keys = jax.random.split(jax.random.key(5), 6)
    noise = jax.vmap(head.noise)(keys)
    cond, null = jax.random.normal(jax.random.key(6), (2, 6, 2))
    run = jax.jit(lambda hidden, **more: head.draw(params, hidden, noise, **more))
    guided = run(cond, null=null, scale=3.0)
    np.testing.assert_allclose(guided, run(3.0 * cond - 2.0 * null), rtol=1e-5, atol=1e-5)
    assert np.abs(guided - run(cond)).max() > 0.1
    np.testing.assert_allclose(run(cond, null=null, scale=1.0), run(cond), rtol=1e-6)


def test_temperature_is_a_factor_on_the_shifts_of_the_blocks_alone():
    head, params = head_of()
    hidden, noise = jax.random.normal(jax.random.key(7), (2, 6, 4))

    def without_shifts(path: Any, leaf: Any) -> Any:
        """Kernels [W, n, W] and biases [n, W], the first of the n vectors."""
        if any("blocks" in str(key) for key in path) and "modulation" in str(path[1]):
            return leaf.at[..., 0, :].multiply(0.25)
        return leaf

    less = jax.tree.map_with_path(without_shifts, params)
    run = jax.jit(lambda params, temperature: head.draw(
        params, hidden[:, :2], noise, temperature=temperature
    ))  # fmt: skip
    np.testing.assert_allclose(run(params, 0.25), run(less, 1.0), rtol=1e-5, atol=1e-5)
    assert np.abs(run(params, 0.25) - run(params, 1.0)).max() > 0.1


def trained_samples(train_temperature: float) -> np.ndarray:
    """5,000 draws of a head that has seen two modes, at -1 and, twice as often, at 1."""
    head = EnergyHead(
        code_width=1, width=48, depth=2, noise_width=4, train_temperature=train_temperature
    )
    hidden = jnp.ones((1024, 1))
    params = init(head, jax.random.key(0), hidden, jnp.zeros((1024, 4)))
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 2000))

    def loss(params: Any, key: Any) -> Any:
        code_key, *keys = jax.random.split(key, 3)
        draws = head.draws(jnp.stack(keys), (1024,))
        codes = two_modes(code_key, 1024)
        return head.apply({"params": params}, hidden, codes, draws, method="loss")[0].mean()

    def step(carry: Any, i: Any) -> Any:
        params, state = carry
        gradient = jax.grad(loss)(params, jax.random.fold_in(jax.random.key(1), i))
        updates, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda carry: jax.lax.scan(step, carry, jnp.arange(2000))[0][0])
    params = run((params, optimizer.init(params)))
    noise = jax.vmap(head.noise)(jax.random.split(jax.random.key(2), 5000))
    return np.asarray(head.draw(params, jnp.ones((5000, 1)), noise))[:, 0]


def two_modes(key: Any, count: int) -> jax.Array:
    side_key, key = jax.random.split(key)
    side = jnp.where(jax.random.uniform(side_key, (count, 1)) < 2 / 3, 1.0, -1.0)
    return side + 0.3 * jax.random.normal(key, (count, 1))


def law(x: np.ndarray) -> np.ndarray:
    return (2 * stats.norm(1.0, 0.3).cdf(x) + stats.norm(-1.0, 0.3).cdf(x)) / 3


@pytest.mark.slow  # trains for a minute
@pytest.mark.parametrize(("train_temperature", "right"), [(1.0, True), (0.0, False)])
def test_a_trained_head_draws_both_modes(train_temperature, right):
    found = stats.kstest(trained_samples(train_temperature), law)
    assert found.statistic < 0.05 if right else found.statistic > 0.3, found
