"""Flow matching as an objective: draws, weights, dropped labels, other orders, devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.objectives.flow_matching import FlowDraws, FlowMatching
from tests.objective_calls import BATCH, close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_flow import flow_system
from tests.toy_systems import CLASSES, toy_labels

pytestmark = pytest.mark.usefixtures("quick_compilation")

SYSTEM, PARAMS = flow_system(schedule=dict(parts=3))  # of unequal cells
TRAINED = {name: PARAMS[name] for name in ("backbone", "head")}
FROZEN = {"tokenizer": PARAMS["tokenizer"]}
RNG = np.random.default_rng(1)
CODES = jnp.asarray(RNG.standard_normal((BATCH, 16, 2)), jnp.float32)


def batch(**more: Any) -> dict[str, jax.Array]:
    encoding = jnp.concatenate([CODES, jnp.full_like(CODES, -30.0)], axis=-1)
    return {"codes": encoding, **toy_labels(BATCH), **more}


def test_draws():
    objective = FlowMatching(system=SYSTEM, time_mean=0.5, time_std=2.0)
    draws = jax.jit(lambda key: objective.draw(key, (2000, 16, 2)))(jax.random.key(0))
    assert draws.times.shape == (2000, 9) and draws.noise.shape == (2000, 16, 2)
    logits = np.log(draws.times / (1 - draws.times)).reshape(-1)
    assert stats.kstest(logits, stats.norm(0.5, 2.0).cdf).pvalue > 1e-3
    assert stats.kstest(np.ravel(draws.noise), stats.norm.cdf).pvalue > 1e-3
    each = np.corrcoef(np.asarray(draws.times).T) - np.eye(9)
    assert np.abs(each).max() < 0.1  # every step has its own


@pytest.mark.parametrize("by_step", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_loss_is_the_error_of_the_velocity(by_step):
    """Codes count where the schedule has them; each alike, or each step."""
    objective = FlowMatching(system=SYSTEM, by_step=by_step)
    cond, schedule = toy_labels(BATCH), SYSTEM.schedule
    draws = objective.draw(jax.random.key(3), CODES.shape)
    codes = np.asarray(CODES)[:, np.asarray(schedule.cells)]

    @jax.jit
    def run(trained: Any) -> Any:
        ordered = jnp.asarray(codes)
        return (
            objective.loss_of(trained, CODES, cond, draws),
            objective.velocity(trained, ordered, cond, draws),
        )

    loss, velocity = run(TRAINED)
    error = np.square(velocity - (draws.noise - codes)).mean((0, 2))  # [L]
    steps = np.split(error, np.cumsum(schedule.sizes)[:-1])
    expected = np.mean([step.mean() for step in steps]) if by_step else error.mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_clean_steps_teach_nothing_of_noise():
    """At time 0 the network is fed the codes themselves: noise then has no influence."""
    objective, cond = FlowMatching(system=SYSTEM), toy_labels(BATCH)
    noise = jnp.asarray(RNG.standard_normal((2, *CODES.shape)), jnp.float32)
    run = jax.jit(lambda draws: objective.velocity(TRAINED, CODES, cond, draws))
    for t, same in ((0.0, True), (0.5, False)):
        times = jnp.full((BATCH, 9), t)
        a, b = (run(FlowDraws(times=times, noise=one)) for one in noise)
        assert bool((a == b).all()) == same


def test_padding_rows_do_not_count():
    objective = FlowMatching(system=SYSTEM)
    mask = jnp.ones(BATCH).at[10:].set(0.0)
    loss, _ = loss_of(objective, TRAINED, {}, FROZEN, batch(mask=mask))
    spoiled = batch(mask=mask)
    spoiled["codes"] = spoiled["codes"].at[10:].add(7.0)
    other, _ = loss_of(objective, TRAINED, {}, FROZEN, spoiled)
    np.testing.assert_allclose(other, loss, rtol=1e-6)


@pytest.mark.slow
def test_dropped_labels_are_null():
    """All dropped in training: nothing flows into the classes but into the null one."""
    objective = FlowMatching(system=SYSTEM, label_dropout=1.0)
    gradient, _ = gradient_of(objective, TRAINED, {}, FROZEN, batch())
    table = np.asarray(gradient["backbone"]["condition"]["class_embed"]["embedding"])
    assert not table[:CLASSES].any() and table[CLASSES].any()


@pytest.mark.slow  # compiles for eight devices
def test_eight_devices_train_as_one():
    objective = FlowMatching(system=SYSTEM)
    one, _ = gradient_of(objective, TRAINED, {}, FROZEN, batch())
    eight, _ = gradient_of(objective, replicated(TRAINED), {}, replicated(FROZEN), sharded(batch()))
    close(eight, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fields", [{"label_dropout": 1.5}, {"time_std": 0.0}])
def test_bad_fields_are_errors(fields):
    with pytest.raises(ValueError, match=f"objective.{next(iter(fields))}"):
        FlowMatching(system=SYSTEM, **fields)
