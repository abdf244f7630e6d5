"""The mixture head: a density that integrates to one, draws and guidance that follow it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.build import build_objective, build_system
from ar_jax.heads.mixture import Mixture, MixtureHead
from ar_jax.sampling.set_likelihood import has_likelihood
from tests.modules import init
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import ENERGY, MIXTURE, masked_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Of one number: the conditional and, wider, the unconditional law.
COND = Mixture(jnp.log(jnp.asarray([[0.3, 0.7]])), jnp.asarray([[[-1.0], [0.5]]]),
               jnp.asarray([[[0.4], [0.6]]]))  # fmt: skip
NULL = Mixture(jnp.zeros((1, 1)), jnp.asarray([[[0.0]]]), jnp.asarray([[[1.5]]]))
GRID = np.linspace(-6, 6, 4001)


def density(law: Mixture, x: np.ndarray = GRID) -> np.ndarray:
    return np.exp(np.asarray(law.log_prob(jnp.asarray(x, jnp.float32)[None, :, None]))[0])


class Fixed(MixtureHead):
    """The conditional law where the hidden state is positive, else the unconditional one."""

    def __call__(self, hidden: Any) -> Mixture:
        wide = Mixture(jnp.tile(NULL.log_weights - jnp.log(2.0), (1, 2)),
                       jnp.tile(NULL.mean, (1, 2, 1)), jnp.tile(NULL.std, (1, 2, 1)))  # fmt: skip
        first = hidden[:, 0] > 0

        def pick(a: Any, b: Any) -> Any:
            return jnp.where(first.reshape(-1, *(1,) * (a.ndim - 1)), a, b)

        return jax.tree.map(pick, COND, wide)


def drawn(count: int, candidates: int, guided: bool, temperature: float = 1.0, **how: Any) -> Any:
    head = Fixed(code_width=1, components=2, candidates=candidates)
    ones = jnp.ones((count, 1))
    null = -ones if guided else None

    @jax.jit
    def draw(keys: jax.Array) -> jax.Array:
        noise = jax.vmap(head.noise)(keys)
        return head.draw({}, ones, noise, null=null, temperature=temperature, **how)

    return np.asarray(draw(jax.random.split(jax.random.key(0), count)))[:, 0]


def distance(x: np.ndarray, target: np.ndarray) -> float:
    """Kolmogorov's, of draws to a density on the grid."""
    cdf = np.cumsum(target) / target.sum()
    return stats.kstest(x, lambda at: np.interp(at, GRID, cdf)).statistic


def test_the_density_integrates_to_one():
    """Of a new head, over two numbers."""
    head = MixtureHead(code_width=2, components=3)
    hidden = jnp.ones((1, 4))
    params = init(head, jax.random.key(0), hidden)
    law = jax.jit(head.apply)({"params": params}, hidden)
    side = np.linspace(-9, 9, 181)
    points = jnp.asarray(np.stack(np.meshgrid(side, side), -1).reshape(1, -1, 2), jnp.float32)
    total = np.exp(np.asarray(law.log_prob(points), np.float64)).sum() * (side[1] - side[0]) ** 2
    np.testing.assert_allclose(total, 1.0, atol=1e-3)
    assert len(np.unique(law.mean)) == 6  # no two Gaussians start as one
    assert (law.std > 0).all()
    each: Any = head.apply({"params": params}, hidden, points[:, 7], method="log_prob")
    np.testing.assert_allclose(each, law.log_prob(points[:, 7:8])[:, 0], rtol=1e-6)


def test_draws_have_the_density():
    assert distance(drawn(20_000, 1, guided=False), density(COND)) < 0.012
    assert distance(drawn(20_000, 1, guided=False), density(NULL)) > 0.1
    cold = drawn(20_000, 1, guided=False, temperature=0.5)
    assert distance(cold, density(COND._replace(std=0.5 * COND.std))) < 0.012


@pytest.mark.slow  # many draws
def test_guided_draws_have_the_guided_density():
    """p_cond (p_cond / p_null)^(w - 1), the nearer the more candidates."""
    target = density(COND) * (density(COND) / density(NULL)) ** 2
    many, few = (drawn(4_000, n, guided=True, scale=3.0) for n in (256, 2))
    assert distance(many, target) < 0.03
    assert distance(few, target) > 0.06
    assert distance(drawn(4_000, 8, guided=True, scale=1.0), density(COND)) < 0.03


def test_nothing_of_its_loss_is_drawn_twice():
    config = masked_config(**MIXTURE, objective=dict(repeats=2))
    with pytest.raises(ValueError, match=r"objective.repeats is 2, but nothing in the loss"):
        build_objective(config)


def test_which_systems_have_a_likelihood():
    assert has_likelihood(build_system(masked_config(**MIXTURE)))
    assert not has_likelihood(build_system(masked_config(**ENERGY)))
