"""Temperature, top-k, top-p and min-p against plain numpy, ties included."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.sampling.filters import Knobs, truncate


def reference(row: np.ndarray, temperature: float, k: int, p: float, m: float) -> np.ndarray:
    """One row [V] in float64, filter after filter; removed entries are -inf."""
    x = row.astype(np.float64) / max(temperature, 1e-5)
    if k:
        kth = sorted(x, reverse=True)[min(k, len(x)) - 1]
        x = np.where(x < kth, -np.inf, x)
    if 0 < p < 1:
        probability = np.exp(x - x.max()) / np.exp(x - x.max()).sum()
        kept, total = [], 0.0
        for value, q in sorted(zip(x, probability, strict=True), reverse=True):
            if total > p:
                break
            kept.append(value)
            total += q
        x = np.where(x < min(kept), -np.inf, x)
    if m:
        x = np.where(np.exp(x - x.max()) < m, -np.inf, x)
    return x


GRID = list(
    itertools.product([0.5, 1.0, 1.7], [0, 1, 4, 100], [0.0, 0.3, 0.85, 1.0], [0.0, 0.05, 0.5])
)


def test_all_knobs_against_numpy():
    rng = np.random.default_rng(0)
    smooth = 2 * rng.standard_normal((4, 3, 12))
    tied = rng.integers(-2, 3, (4, 3, 12)).astype(np.float64)  # many exact ties
    logits = np.concatenate([smooth, tied]).astype(np.float32)
    filtered: Any = jax.jit(lambda logits, knobs: truncate(logits, knobs))
    removed = 0
    for temperature, k, p, m in GRID:
        knobs = Knobs(temperature=temperature, top_k=k, top_p=p, min_p=m).as_arrays()
        ours = np.asarray(filtered(jnp.asarray(logits), knobs))
        for index in np.ndindex(logits.shape[:2]):
            expected = reference(logits[index], temperature, k, p, m)
            message = f"{temperature=} {k=} {p=} {m=} {logits[index]}"
            kept = np.isfinite(expected)
            np.testing.assert_array_equal(np.isfinite(ours[index]), kept, message)
            np.testing.assert_allclose(ours[index][kept], expected[kept], rtol=1e-5)
            removed += (~kept).sum()
    assert removed > 10_000
    assert filtered._cache_size() == 1


def test_order_temperature_before_top_p_before_min_p():
    logits = jnp.log(jnp.array([0.5, 0.3, 0.15, 0.05]))
    kept = lambda **knobs: np.isfinite(truncate(logits, Knobs(**knobs).as_arrays())).tolist()  # noqa: E731
    assert kept(top_p=0.6) == [True, True, False, False]
    # Sharpened, the largest alone holds more than 0.6.
    assert kept(top_p=0.6, temperature=0.4) == [True, False, False, False]
    # top-p of what top-k left: 0.5 / 0.8 and 0.3 / 0.8.
    assert kept(top_k=2, top_p=0.6) == [True, False, False, False]
    assert kept(top_k=2, top_p=0.65) == [True, True, False, False]
    assert kept(min_p=0.25) == [True, True, True, False]
    assert kept(min_p=0.25, temperature=0.5) == [True, True, False, False]


def test_ties_survive_together():
    logits = jnp.array([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    kept = np.isfinite(truncate(logits, Knobs(top_k=2).as_arrays()))
    assert kept.tolist() == [False, True, True, True, True, False]


@pytest.mark.parametrize("knobs", [Knobs(top_k=1), Knobs(top_p=1e-6), Knobs(min_p=1.0)])
def test_the_largest_always_survives(knobs):
    logits = jnp.asarray(np.random.default_rng(1).standard_normal((20, 9)), jnp.float32)
    kept = np.isfinite(truncate(logits, knobs.as_arrays()))
    np.testing.assert_array_equal(kept.sum(-1), 1)
    np.testing.assert_array_equal(kept.argmax(-1), logits.argmax(-1))


def test_nothing_on_changes_nothing():
    logits = jnp.asarray(np.random.default_rng(2).standard_normal((5, 9)), jnp.float32)
    for knobs in (Knobs(), Knobs(top_k=9), Knobs(top_k=1000), Knobs(top_p=1.0)):
        np.testing.assert_array_equal(truncate(logits, knobs.as_arrays()), logits)


@pytest.mark.parametrize(
    ("field", "value", "right"),
    [
        ("temperature", -0.1, ">= 0"),
        ("top_k", -1, ">= 0"),
        ("top_p", 1.5, "[0, 1]"),
        ("min_p", -0.2, "[0, 1]"),
    ],
)
def test_errors(field, value, right):
    with pytest.raises(ValueError) as error:
        Knobs(**{field: value}).as_arrays()
    for word in (f"sampling.{field}", str(value), right):
        assert word in str(error.value)


def test_knobs_of_every_step_are_those_of_one():
    given: dict[str, Any] = dict(temperature=0.8, top_k=3, top_p=0.9)
    by_step: dict[str, Any] = dict(
        step_temperatures=(1.0, 0.5), step_top_k=(0, 2), step_top_p=(0.3, 1.0)
    )
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((5, 6)), jnp.float32)
    for fields in (given | by_step, given | {"step_top_k": (0, 2)}, given):
        for knobs in (Knobs(**fields).as_arrays(), Knobs(**fields).spread(2)):
            for step in range(2):
                alone = Knobs(
                    temperature=0.8 * fields.get("step_temperatures", (1.0, 1.0))[step],
                    top_k=fields.get("step_top_k", (3, 3))[step],
                    top_p=fields.get("step_top_p", (0.9, 0.9))[step],
                ).as_arrays()
                ours = truncate(logits, knobs.at(step))
                np.testing.assert_array_equal(ours, truncate(logits, alone))
    spread: Any = [jax.tree.structure(Knobs(**f).spread(2)) for f in (given, given | by_step)]
    assert spread[0] == spread[1]  # one program for both


def test_the_temperature_follows_the_entropy():
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal((6, 9)) * np.array([0, 0.3, 1, 2, 4, 30])[:, None]).astype("f4")
    gain, width, floor = 2.5, 3.0, 0.6
    p = np.exp(logits - logits.max(-1, keepdims=True), dtype=np.float64)
    p /= p.sum(-1, keepdims=True)
    entropy = -(p * np.log(p + 1e-300)).sum(-1, keepdims=True)
    factor = gain * np.exp(-entropy / width) + floor
    knobs = Knobs(temperature=0.7, entropy_gain=gain, entropy_width=width, entropy_floor=floor)
    ours = truncate(jnp.asarray(logits), knobs.as_arrays())
    np.testing.assert_allclose(ours, logits / (0.7 * factor), rtol=1e-5, atol=1e-6)
    assert factor[0] < factor[-1]  # the unsure one is drawn colder
    removed = jnp.asarray(logits).at[:, 0].set(-jnp.inf)
    assert np.isfinite(truncate(removed, knobs.as_arrays())[:, 1:]).all()
    plain = truncate(jnp.asarray(logits), Knobs(temperature=0.7).as_arrays())
    np.testing.assert_array_equal(plain, jnp.asarray(logits) / jnp.float32(0.7))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(step_top_k=(1, -1)), "step_top_k is .*-1"),
        (dict(step_top_k=(1, 1.5)), "step_top_k is .*1.5.*whole numbers"),
        (dict(step_top_p=(0.5, 1.5)), r"step_top_p is .*1.5.*\[0, 1\]"),
        (dict(entropy_gain=-1.0), "entropy_gain is -1.0; it must be >= 0"),
        (dict(entropy_width=0.0), "entropy_width is 0.0; it must be > 0"),
        (dict(entropy_floor=-0.5), "entropy_floor is -0.5"),
    ],
)
def test_knobs_out_of_range(fields, words):
    with pytest.raises(ValueError, match=rf"sampling\.{words}"):
        Knobs(**fields).as_arrays()
