"""Confidence decoding: what stays, what is known, how many at a time, and the law of the draws."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.build import create_sampler
from ar_jax.evaluation.samples import describe_sampling, formation
from ar_jax.sampling.confidence import (
    ConfidenceNoise,
    ConfidenceSampler,
    draw_steps,
    least_confident,
)
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.objective_calls import replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked_codes import given_system, masked_codes_system
from tests.toy_systems import toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

KNOBS, GUIDANCE = Knobs(choice_temperature=2.0), Guidance(scale=2.0, kind="linear_known")
LABELS = jnp.asarray([0, 1, 2, 0, 1, 2, 0, 1], jnp.int32)
KEYS = image_keys(0, 0, len(LABELS))
LENGTH = 16
RNG = np.random.default_rng(3)
# From none of the codes to all of them.
KNOWN = RNG.random((8, LENGTH)) < np.linspace(0, 1.2, 8)[:, None]
GIVEN = RNG.integers(0, 8, (8, LENGTH)).astype(np.int32)
EDIT: dict[str, Any] = dict(given=jnp.asarray(GIVEN), keep=jnp.asarray(KNOWN))


@pytest.fixture(scope="module")
def sampler(quick_compilation) -> ConfidenceSampler:  # noqa: F811
    made = create_sampler(*masked_codes_system())
    assert isinstance(made, ConfidenceSampler)
    return made


@pytest.fixture(scope="module")
def drawn(sampler) -> Any:
    return sampler({"label": LABELS}, KEYS, knobs=KNOBS, guidance=GUIDANCE)


@pytest.fixture(scope="module")
def edited(sampler) -> Any:
    """(samples, what the iterations did) of an edit."""
    options: Any = dict(knobs=KNOBS, guidance=GUIDANCE, **EDIT)
    arguments, static = sampler._arguments({"label": LABELS}, KEYS, noise=None, **options)
    steps = draw_steps(sampler.system, *arguments, **static)
    return sampler({"label": LABELS}, KEYS, **options), steps


def test_known_codes_are_never_changed(edited):
    samples, steps = edited
    np.testing.assert_array_equal(np.asarray(samples.codes)[KNOWN], GIVEN[KNOWN])
    for step in range(steps.drawn.shape[1]):
        np.testing.assert_array_equal(np.asarray(steps.drawn[:, step])[KNOWN], GIVEN[KNOWN])
        assert np.asarray(steps.known[:, step])[KNOWN].all()
    # What was hidden was drawn.
    assert (np.asarray(samples.codes) != GIVEN)[~KNOWN].mean() > 0.5


def test_as_many_are_kept_as_the_schedule_says(sampler, edited):
    schedule, (_, steps) = sampler.system.schedule, edited
    hidden = (~np.asarray(steps.known)).sum(2)  # [B, S], before each iteration
    count = (~KNOWN).sum(1)
    np.testing.assert_array_equal(hidden[:, 0], count)
    wanted = schedule.mask.lengths(count, schedule.num_steps)[:, :-1]
    np.testing.assert_array_equal(hidden[:, 1:], np.minimum(wanted, count[:, None]))
    assert count[0] == LENGTH and count[-1] == 0
    np.testing.assert_array_equal(-np.diff(hidden[0]), schedule.sizes[:-1])


def test_a_code_that_was_kept_stays(edited):
    _, steps = edited
    known, codes = np.asarray(steps.known), np.asarray(steps.drawn)
    assert (known[:, 1:] >= known[:, :-1]).all()
    for step in range(1, codes.shape[1]):
        kept = known[:, step]
        np.testing.assert_array_equal(codes[:, step][kept], codes[:, step - 1][kept])
        assert (codes[:, step] != codes[:, step - 1])[~kept].any()


def test_the_order_of_becoming_known(edited):
    samples, steps = edited
    order = np.asarray(samples.order)
    np.testing.assert_array_equal(np.sort(order, axis=1), [np.arange(LENGTH)] * 8)
    for image, known in enumerate(np.asarray(steps.known)):
        for now in known:
            assert set(order[image, : now.sum()]) == set(np.flatnonzero(now))


def test_an_image_depends_on_its_own_key_and_label(sampler, drawn):
    turned = np.array([3, 6, 1, 0, 2, 5, 4, 7])
    labels = LABELS[turned].at[0].set(2)
    other = sampler({"label": labels}, KEYS[turned], knobs=KNOBS, guidance=GUIDANCE)
    np.testing.assert_array_equal(other.codes[1:], np.asarray(drawn.codes)[turned[1:]])
    assert (np.asarray(other.codes[0]) != np.asarray(drawn.codes)[turned[0]]).any()
    assert len(np.unique(drawn.codes, axis=0)) == len(np.unique(drawn.order, axis=0)) == 8


def test_eight_devices_draw_as_one(sampler, drawn):
    spread = dataclasses.replace(sampler, params=replicated(sampler.params))
    where: Any = ({"label": sharded(LABELS)}, sharded(KEYS))
    other = spread(*where, knobs=KNOBS, guidance=GUIDANCE)
    assert len(other.codes.sharding.device_set) == 8
    np.testing.assert_array_equal(other.codes, drawn.codes)


def test_images_as_they_form(sampler, drawn):
    assert drawn.images.shape == (8, 8, 8, 1)
    np.testing.assert_array_equal(sampler.decode(drawn.codes), drawn.images)
    stages = formation(sampler, np.asarray(drawn.codes), np.asarray(drawn.order))
    assert stages.shape == (3, 8, 8, 8, 1)
    whole = np.asarray(jnp.clip(jnp.round((drawn.images + 1) * 127.5), 0, 255))
    np.testing.assert_allclose(stages[-1], whole, atol=1)
    assert (stages[0] != stages[-1]).any()


def test_the_program_is_given_to_benchmarks(sampler):
    lower, arguments = sampler.program({"label": LABELS}, KEYS, guidance=GUIDANCE)
    assert jax.tree.leaves(lower().out_info)[0].shape == (8, 3, LENGTH) and len(arguments) == 8


def test_what_does_not_fit_is_refused(sampler):
    cond = {"label": LABELS}
    with pytest.raises(ValueError, match="7 keys for 8 conditions"):
        sampler(cond, KEYS[:7])
    with pytest.raises(ValueError, match="neither keys nor noise are given"):
        sampler(cond, knobs=Knobs(temperature=0.0, choice_temperature=1.0))
    with pytest.raises(ValueError, match=r"sampling\.smooth is True, which means nothing"):
        sampler(cond, KEYS, knobs=Knobs(smooth=True))
    with pytest.raises(ValueError, match=r"sampling\.confidence is 'rank'"):
        sampler(cond, KEYS, knobs=Knobs(confidence="rank"))
    with pytest.raises(ValueError, match="step_temperatures has 2 numbers; .* 3 steps"):
        sampler(cond, KEYS, knobs=Knobs(step_temperatures=(1.0, 2.0)))
    with pytest.raises(ValueError, match="keep is given without given"):
        sampler(cond, KEYS, keep=EDIT["keep"])
    with pytest.raises(ValueError, match="keep is int32 .* it must be bool"):
        sampler(cond, KEYS, given=EDIT["given"], keep=EDIT["given"])
    with pytest.raises(ValueError, match="start is 3; the schedule has the iterations 0 to 2"):
        sampler(cond, KEYS, start=3)
    noise = ConfidenceNoise(jnp.zeros((2, 8, LENGTH, 8)), jnp.zeros((3, 8, LENGTH)))
    with pytest.raises(ValueError, match="codes and choice of the noise begin with"):
        sampler(cond, noise=noise)


def test_other_samplers_refuse_its_knobs():
    sampler: Any = CachedSampler.create(*toy_system("raster"))
    for field, knobs in (
        ("choice_temperature", Knobs(choice_temperature=4.5)),
        ("confidence", Knobs(confidence="logit")),
    ):
        with pytest.raises(
            ValueError, match=rf"sampling\.{field} is .* means nothing for codes dr"
        ):
            sampler({"label": LABELS}, KEYS, knobs=knobs)
    said = describe_sampling(Knobs(choice_temperature=4.5, confidence="logit"), Guidance())
    assert said.endswith("choice temperature 4.5, confidence by logit")


def test_the_least_confident():
    sure = jnp.asarray([[3.0, 1, jnp.inf, 2, 1], [0, jnp.inf, jnp.inf, 0, 0]])
    noise = jnp.asarray([[-9.0, 0, -99, 0, 0], [0, 0, 0, 0, 0]])
    chosen = least_confident(sure, noise, jnp.float32(0), jnp.asarray([2, 4]))
    # Equal ones by their place, known ones never.
    expected = [[False, True, False, False, True], [True, False, False, True, True]]
    np.testing.assert_array_equal(chosen, expected)
    chosen = least_confident(sure, noise, jnp.float32(1), jnp.asarray([1, 1]))
    assert np.argmax(chosen, axis=1).tolist() == [0, 0] and chosen.sum() == 2


# Logits that are given, of classes 0 and null: the laws are known.
V, PLACES, COUNT = 3, 2, 6000
TABLE = np.random.default_rng(5).standard_normal((2, PLACES, V)).astype(np.float32)
SYSTEM, TABLES = given_system(TABLE)


def run(
    knobs: Knobs, scale: float = 1.0, shared: bool = False, steps: int = 1, count: int = COUNT
) -> Any:
    keys = image_keys(7, 0, count)
    noise = None
    if shared:  # a broken draw: one noise for all places
        one = jax.vmap(lambda key: jax.random.gumbel(key, (1, V)))(keys)
        shape = (steps, count, PLACES)
        noise = ConfidenceNoise(jnp.broadcast_to(one[None], (*shape, V)), jnp.zeros(shape))
    lengths = SYSTEM.schedule.mask.lengths(np.full(count, PLACES), steps).T  # type: ignore[union-attr]
    return draw_steps(
        SYSTEM,
        TABLES,
        {"label": jnp.zeros(count, jnp.int32)},
        None if shared else keys,
        knobs.as_arrays(),
        jnp.full(steps, scale, jnp.float32),
        jnp.asarray(lengths),
        noise,
        guided=scale != 1.0,
    )


def p_value(codes: Any, logits: np.ndarray) -> float:
    """Of the hypothesis that each place is drawn for itself by softmax(logits [L, V])."""
    codes = np.asarray(codes)
    counts = np.bincount(codes[:, 0] * V + codes[:, 1], minlength=V * V)
    weights = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    weights /= weights.sum(-1, keepdims=True)
    joint = np.outer(weights[0], weights[1]).ravel()
    return float(stats.chisquare(counts, len(codes) * joint / joint.sum()).pvalue)


def test_one_iteration_draws_each_code_for_itself():
    assert p_value(run(Knobs(choice_temperature=4.5)).drawn[:, -1], TABLE[0]) > 1e-3


def test_a_draw_that_is_not_independent_is_found():
    assert p_value(run(Knobs(), shared=True).drawn[:, -1], TABLE[0]) < 1e-9
    assert p_value(run(Knobs(temperature=1.35)).drawn[:, -1], TABLE[0]) < 1e-9


def test_guided_logits_are_null_plus_scale_times_the_difference():
    guided = TABLE[1] + 2.5 * (TABLE[0] - TABLE[1])
    assert p_value(run(Knobs(), scale=2.5).drawn[:, -1], guided) > 1e-3
    assert p_value(run(Knobs(), scale=1.5).drawn[:, -1], guided) < 1e-9


def test_the_temperature_divides_the_logits():
    assert p_value(run(Knobs(temperature=0.6)).drawn[:, -1], TABLE[0] / 0.6) > 1e-3
    greedy = run(Knobs(temperature=0.0), count=4).drawn[:, -1]
    np.testing.assert_array_equal(greedy, [TABLE[0].argmax(-1)] * 4)


def test_the_last_iteration_by_logit_is_greedy():
    """Noise on codes and confidences has the strength choice_temperature (1 - r)."""
    knobs = Knobs(choice_temperature=3.0, confidence="logit")
    last = run(knobs, count=50).drawn[:, -1]
    np.testing.assert_array_equal(last, [TABLE[0].argmax(-1)] * 50)
    # The first of two: half of it, so that draws are those of logits divided by 1.5.
    first = run(knobs, steps=2).drawn[:, 0]
    assert p_value(first, TABLE[0] / 1.5) > 1e-3
    assert p_value(first, TABLE[0] / 3.0) < 1e-9


def test_without_choice_temperature_the_surest_stays():
    for confidence in ("probability", "logit"):
        steps = run(Knobs(confidence=confidence), steps=2, count=200)
        drawn, kept = np.asarray(steps.drawn[:, 0]), np.asarray(steps.known[:, 1])
        table = TABLE[0] - np.log(np.exp(TABLE[0]).sum(-1, keepdims=True))
        values = (table if confidence == "probability" else TABLE[0])[np.arange(PLACES), drawn]
        np.testing.assert_array_equal(kept.argmax(1), values.argmax(1))
        assert (kept.sum(1) == 1).all()
