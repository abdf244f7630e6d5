"""The masked objective and its backbone: what is hidden has no influence, draws have their law."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.objectives.masked import Masked, hidden_count, hide
from tests.modules import apply
from tests.objective_calls import close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import CLASSES, ENERGY, MIXTURE, masked_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, LENGTH = 16, 16
RNG = np.random.default_rng(1)
SYSTEM, PARAMS = masked_system()
BACKBONE, WEIGHTS = SYSTEM.backbone, PARAMS["backbone"]
TRAINED = {name: PARAMS[name] for name in ("backbone", "head")}
FROZEN = {"tokenizer": PARAMS["tokenizer"]}
COND = {"label": jnp.arange(BATCH, dtype=jnp.int32) % CLASSES}
CODES = jnp.asarray(RNG.standard_normal((BATCH, LENGTH, 2)), jnp.float32)
ORDER = jnp.asarray(np.stack([RNG.permutation(LENGTH) for _ in range(BATCH)]), jnp.int32)
SEEN = 4


@pytest.fixture(scope="module")
def hidden() -> Any:
    known = jnp.argsort(ORDER, axis=1) >= LENGTH - SEEN
    return apply(BACKBONE, WEIGHTS, CODES, COND, known)


def test_hiding_equals_leaving_out(hidden):
    """Attention masks over all rows, against an encoder that is given the known rows alone."""
    positions = ORDER[:, LENGTH - SEEN :]
    rows = jnp.take_along_axis(CODES, positions[..., None], axis=1)

    def alone(module: Any, codes: Any, cond: Any, positions: Any) -> Any:
        return module.decode(module.encode(codes, cond, None, positions), None, positions)

    out = apply(BACKBONE, WEIGHTS, rows, COND, positions, method=alone)
    np.testing.assert_allclose(out, hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("most", [SEEN, SEEN + 3, LENGTH])
def test_revealing_part_of_an_order_equals_hiding_the_rest(hidden, most):
    def reveal(module: Any, codes: Any, cond: Any, order: Any) -> Any:
        return module.reveal(codes, cond, order, jnp.int32(SEEN), most=most)

    out = apply(BACKBONE, WEIGHTS, CODES, COND, ORDER, method=reveal)
    np.testing.assert_allclose(out, hidden, rtol=1e-4, atol=1e-5)


def test_every_known_code_has_influence(hidden):
    other = CODES.at[:, 0].add(1.0)
    known = jnp.argsort(ORDER, axis=1) >= LENGTH - SEEN
    moved = np.abs(np.asarray(apply(BACKBONE, WEIGHTS, other, COND, known) - hidden)).max((1, 2))
    np.testing.assert_array_equal(moved > 0, np.asarray(known[:, 0]))
    assert known[:, 0].any() and not known[:, 0].all()


def test_draws():
    objective = Masked(system=SYSTEM, repeats=2)
    draws = jax.jit(jax.vmap(lambda key: objective.draw(key, (3, LENGTH, 2))))(
        jax.random.split(jax.random.key(0), 2000)
    )
    rate = np.asarray(draws.rate)  # one of a batch
    law = stats.truncnorm(-1.2, 0.0, loc=1.0, scale=0.25)
    assert rate.shape == (2000,) and stats.kstest(rate, law.cdf).pvalue > 1e-3
    np.testing.assert_array_equal(np.sort(draws.order[:50], -1), np.tile(np.arange(16), (50, 3, 1)))
    times, noise = draws.head["times"], draws.head["noise"]
    assert times.shape == (2000, 3, 2, LENGTH) and noise.shape == (2000, 3, 2, 16, 2)
    assert times.min() == 0 and times.max() == SYSTEM.head.steps - 1
    masked = jax.vmap(hide)(draws.order, draws.rate)
    counts = np.ceil(LENGTH * rate)
    np.testing.assert_array_equal(masked.sum(-1), np.tile(counts[:, None], 3))


def test_without_an_encoder_the_decoder_sees_embedded_codes():
    """Known codes, the class and the positions speak; hidden codes and their order do not."""
    system, params = masked_system(**ENERGY)
    backbone, weights = system.backbone, params["backbone"]
    assert not {name for name in weights if name.startswith(("encoder", "hidden"))}
    known = jnp.argsort(ORDER, axis=1) >= LENGTH - SEEN
    out = apply(backbone, weights, CODES, COND, known)
    hidden = jnp.where(known[..., None], CODES, 7.0)
    np.testing.assert_array_equal(apply(backbone, weights, hidden, COND, known), out)

    def reveal(module: Any, codes: Any, cond: Any, order: Any) -> Any:
        return module.reveal(codes, cond, order, jnp.int32(SEEN), most=SEEN + 3)

    again = apply(backbone, weights, CODES, COND, ORDER, method=reveal)
    np.testing.assert_allclose(again, out, rtol=1e-4, atol=1e-5)
    other = {"label": (COND["label"] + 1) % CLASSES}
    assert np.abs(apply(backbone, weights, CODES, other, known) - out).min(axis=(1, 2)).max() > 0
    moved = np.abs(apply(backbone, weights, CODES + 1.0, COND, known) - out).max((1, 2))
    assert (moved > 0).all()


def batch(**more: Any) -> dict[str, jax.Array]:
    encoding = jnp.concatenate([CODES, jnp.full_like(CODES, -3.0)], axis=-1)
    return {"codes": encoding, **COND, **more}


def test_codes_are_drawn_from_their_moments():
    """Anew at every visit: scale * (mean + std * noise)."""
    objective = Masked(system=SYSTEM)
    draw = jax.jit(jax.vmap(lambda key: objective._codes(FROZEN, batch(), key)))
    codes = np.asarray(draw(jax.random.split(jax.random.key(4), 2000)))
    np.testing.assert_allclose(codes.mean(0), 0.5 * CODES, atol=0.02)
    np.testing.assert_allclose(codes.std(0), 0.5 * np.exp(-1.5), rtol=0.12)


def test_padding_rows_do_not_count():
    objective = Masked(system=SYSTEM)
    mask = jnp.ones(BATCH).at[10:].set(0.0)
    loss, aux = loss_of(objective, TRAINED, {}, FROZEN, batch(mask=mask))
    spoiled = batch(mask=mask)
    spoiled["codes"] = spoiled["codes"].at[10:].add(7.0)
    other, _ = loss_of(objective, TRAINED, {}, FROZEN, spoiled)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    np.testing.assert_allclose(
        aux.metrics["noise_error"] + aux.metrics["bound_bits"], loss, rtol=1e-6
    )
    fewer, _ = loss_of(objective, TRAINED, {}, FROZEN, batch(mask=mask.at[:5].set(0.0)))
    assert float(fewer) != float(loss)


@pytest.mark.slow
def test_dropped_labels_are_null():
    """All dropped in training: no class matters, and nothing flows into the table of classes."""
    objective = Masked(system=SYSTEM, label_dropout=1.0)
    gradient, _ = gradient_of(objective, TRAINED, {}, FROZEN, batch())
    condition = gradient["backbone"]["condition"]
    np.testing.assert_array_equal(condition["class_embed"]["embedding"], 0.0)
    assert np.abs(condition["null_embed"]).max() > 0


@pytest.mark.slow  # compiles for eight devices
@pytest.mark.parametrize("changes", [{}, ENERGY, MIXTURE], ids=["diffusion", "energy", "mixture"])
def test_eight_devices_train_as_one(changes):
    system, params = masked_system(**changes)
    trained = {name: params[name] for name in ("backbone", "head")}
    objective = Masked(system=system, repeats=1 if changes is MIXTURE else 2)
    one, _ = gradient_of(objective, trained, {}, FROZEN, batch())
    eight, _ = gradient_of(objective, replicated(trained), {}, replicated(FROZEN), sharded(batch()))
    close(eight, one, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("length", "rate"), [(25, 0.6), (100, 0.55), (7, 1.0), (10, 0.7)])
def test_hidden_codes_are_counted_in_float64(length, rate):
    assert hidden_count(length, rate) == np.ceil(length * rate)
    # A rate that was drawn stays inside the range whatever float32 rounds it to.
    for drawn in (rate - 1e-7, 1 + 1e-6):
        assert np.ceil(length * rate) <= hidden_count(length, jnp.float32(drawn), rate) <= length


@pytest.mark.parametrize("rate_min", [0.0, 1.0])
def test_the_ends_of_the_range_are_rates_too(rate_min):
    objective = Masked(system=SYSTEM, rate_min=rate_min)
    key = jax.random.key(3)
    rate = jax.jit(lambda key: objective.draw(key, CODES.shape).rate)(key)
    assert rate_min <= float(rate) <= 1

    def loss(params: Any, key: jax.Array) -> jax.Array:
        return objective.loss_of(params, CODES, COND, objective.draw(key, CODES.shape))[0]

    assert jax.eval_shape(loss, TRAINED, key).shape == ()


@pytest.mark.parametrize(
    "fields", [{"rate_min": 1.5}, {"rate_min": -0.1}, {"rate_std": 0.0}, {"repeats": 0}]
)
def test_bad_fields_are_errors(fields):
    with pytest.raises(ValueError, match=f"objective.*{next(iter(fields))}"):
        Masked(system=SYSTEM, **fields)
