"""The objective of masked codes: what is hidden, what counts, and on how many devices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from ar_jax.mask_rule import MaskRule
from ar_jax.objectives.masked_codes import HidingDraws, MaskedCodes
from tests.objective_calls import close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked_codes import masked_codes_system
from tests.toy_systems import CLASSES

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, LENGTH = 16, 16
RNG = np.random.default_rng(1)
SYSTEM, PARAMS = masked_codes_system()
TRAINED = {name: PARAMS[name] for name in ("backbone", "head")}
FROZEN = {"tokenizer": PARAMS["tokenizer"]}
COND = {"label": jnp.arange(BATCH, dtype=jnp.int32) % CLASSES}
CODES = jnp.asarray(RNG.integers(0, 8, (BATCH, LENGTH)), jnp.int32)
LOGITS = jnp.asarray(RNG.standard_normal((BATCH, LENGTH, 8)), jnp.float32)
HIDDEN = jnp.asarray(RNG.random((BATCH, LENGTH)) < np.linspace(0.2, 0.9, BATCH)[:, None])
HIDDEN = HIDDEN.at[:, 3].set(True)
# -log p of the codes, and of the other codes on average: by numpy.
LOG_P = np.asarray(LOGITS - jax.nn.logsumexp(LOGITS, axis=-1, keepdims=True), np.float64)
NLL = -np.take_along_axis(LOG_P, np.asarray(CODES)[..., None], -1)[..., 0]


def batch(**more: Any) -> dict[str, jax.Array]:
    return {"codes": CODES, **COND, **more}


@pytest.mark.parametrize(("method", "least"), [("cosine", 0.0), ("arccos", 0.0), ("pow2", 0.5)])
def test_what_is_hidden(method, least):
    """max(1, round(L share)) codes of each image, all sets of a size alike."""
    objective = MaskedCodes(system=SYSTEM, method=method, rate_min=least)
    count = 4000
    draws = jax.jit(lambda key: objective.draw(key, (count, LENGTH)))(jax.random.key(0))
    assert stats.kstest(np.asarray(draws.rate), "uniform").pvalue > 1e-3
    hidden = np.asarray(jax.jit(objective.hide)(draws))
    share = MaskRule(method=method).share(np.asarray(draws.rate, np.float64), 1.0, LENGTH)
    wanted = np.maximum(1, np.round(LENGTH * np.maximum(share, least)))
    rounded = np.abs(LENGTH * share % 1 - 0.5) < 1e-4  # where float32 decides
    np.testing.assert_array_equal(hidden.sum(1)[~rounded], wanted[~rounded])
    assert hidden.sum(1).min() >= max(1, least * LENGTH)
    # Each place is hidden as often as the others.
    assert stats.chisquare(hidden.sum(0)).pvalue > 1e-3
    assert len(np.unique(hidden[hidden.sum(1) == 12], axis=0)) > 20


def test_a_half_is_rounded_to_the_even_number():
    objective = MaskedCodes(system=SYSTEM, method="uniform")
    rate = 1 - jnp.asarray([2.5, 3.5, 0.5, 15.5]) / LENGTH
    draws = HidingDraws(rate=rate, places=jnp.asarray(RNG.random((4, LENGTH)), jnp.float32))
    np.testing.assert_array_equal(objective.hide(draws).sum(1), [2, 4, 1, 16])


def score(weights: np.ndarray | None = None, **fields: Any) -> tuple[float, dict[str, float]]:
    objective = MaskedCodes(system=SYSTEM, **fields)
    given = None if weights is None else jnp.asarray(weights, jnp.float32)
    loss, aux = jax.jit(lambda: objective.score(LOGITS, CODES, HIDDEN, weights=given))()
    return float(loss), {name: float(value) for name, value in aux.metrics.items()}


@pytest.mark.parametrize("seen", [0.0, 0.1])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_by_numpy(seen, smoothing):
    smoothed = (1 - smoothing) * NLL - smoothing * LOG_P.mean(-1)
    shares = np.where(HIDDEN, 1.0, seen)
    images = np.where(np.arange(BATCH) < 11, 1.0, 0.0)  # the others are padding
    fields = dict(label_smoothing=smoothing, seen_weight=seen)
    each = (smoothed * shares).sum(1) / shares.sum(1)
    loss, metrics = score(images, per_image=True, **fields)
    assert loss == pytest.approx(each[:11].mean(), rel=1e-5)
    shares = shares * images[:, None]
    loss, _ = score(images, per_image=False, **fields)
    assert loss == pytest.approx((smoothed * shares).sum() / shares.sum(), rel=1e-5)
    hidden = np.asarray(HIDDEN, np.float64)
    nll = (NLL * hidden).sum(1) / hidden.sum(1)
    assert metrics["nll"] == pytest.approx(nll[:11].mean(), rel=1e-5)
    right = (LOG_P.argmax(-1) == np.asarray(CODES)) * hidden
    assert metrics["accuracy"] == pytest.approx(
        (right.sum(1) / hidden.sum(1))[:11].mean(), rel=1e-5
    )


def test_padding_rows_do_not_count():
    objective = MaskedCodes(system=SYSTEM)
    mask = jnp.ones(BATCH).at[10:].set(0.0)
    loss, aux = loss_of(objective, TRAINED, {}, FROZEN, batch(mask=mask))
    spoiled = batch(mask=mask)
    spoiled["codes"] = spoiled["codes"].at[10:].set(0)
    other, _ = loss_of(objective, TRAINED, {}, FROZEN, spoiled)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    np.testing.assert_allclose(aux.metrics["nll"], loss, rtol=1e-6)  # without smoothing


@pytest.mark.slow
def test_dropped_labels_are_null():
    """All dropped in training: nothing flows into the classes, all of it into the null class."""
    objective = MaskedCodes(system=SYSTEM, label_dropout=1.0)
    gradient, _ = gradient_of(objective, TRAINED, {}, FROZEN, batch())
    table = np.abs(gradient["backbone"]["condition"]["class_embed"]["embedding"]).max(1)
    np.testing.assert_array_equal(table[:CLASSES], 0.0)
    assert table[CLASSES] > 0
    mask = np.abs(gradient["backbone"]["token_embed"]["embedding"]).max(1)
    assert mask[8] > 0  # of hidden codes


@pytest.mark.slow  # compiles for eight devices
@pytest.mark.parametrize("per_image", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_eight_devices_train_as_one(per_image):
    objective = MaskedCodes(system=SYSTEM, label_smoothing=0.1, per_image=per_image)
    one, _ = gradient_of(objective, TRAINED, {}, FROZEN, batch())
    eight, _ = gradient_of(objective, replicated(TRAINED), {}, replicated(FROZEN), sharded(batch()))
    close(eight, one, rtol=1e-3, atol=1e-5)


def test_evaluation_has_no_chance_but_the_key_s():
    objective = MaskedCodes(system=SYSTEM, label_smoothing=0.3)
    first, _ = loss_of(objective, TRAINED, {}, FROZEN, batch())
    again, _ = loss_of(objective, TRAINED, {}, FROZEN, batch())
    other, _ = loss_of(objective, TRAINED, {}, FROZEN, batch(), jax.random.key(9))
    assert float(first) == float(again) != float(other)
