"""Guidance schedules against their closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ar_jax.sampling.guidance import Guidance

STEPS, W = 7, 3.5
FORMS = {
    "constant": lambda r: W,
    "linear": lambda r: 1 + (W - 1) * r,
    # Counts to the step after the last.
    "power_cosine": lambda r: (
        1 + (W - 1) * 0.5 * (1 - math.cos(math.pi * (r * (STEPS - 1) / STEPS) ** 2.5))
    ),
    "linear_excess": lambda r: 1 + W * r,
    "linear_below": lambda r: 1 + (W - 1) * r * (STEPS - 1) / STEPS,
}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize(("start", "stop"), [(0, -1), (2, -1), (0, 4), (2, 4), (5, 5), (0, 100)])
def test_closed_forms(kind, start, stop):
    scales = Guidance(scale=W, kind=kind, power=2.5, start=start, stop=stop).scales(STEPS)
    last = STEPS if stop < 0 else stop
    expected = [
        FORMS[kind](step / (STEPS - 1)) if start <= step < last else 1.0 for step in range(STEPS)
    ]
    np.testing.assert_allclose(scales, expected, rtol=1e-6)
    assert scales.dtype == np.float32


def test_default_is_no_guidance():
    np.testing.assert_array_equal(Guidance().scales(5), 1.0)
    np.testing.assert_array_equal(Guidance(kind="linear").scales(5), 1.0)


@pytest.mark.parametrize("kind", FORMS)
def test_a_single_step(kind):
    assert np.isfinite(Guidance(scale=2.0, kind=kind).scales(1)).all()


def test_vars_convention():
    """Official cfg 1.5: logits (1 + t) cond - t null with t = 1.5 k / (K - 1)."""
    scales = Guidance(scale=1.5, kind="linear_excess").scales(10)
    cond, null = 0.7, -0.2
    for k in range(10):
        t = 1.5 * k / 9
        mixed = null + scales[k] * (cond - null)
        assert mixed == pytest.approx((1 + t) * cond - t * null, rel=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(kind="cosine"), "guidance.kind is 'cosine'.*power_cosine"),
        (dict(scale=-1.0), "guidance.scale is -1.0.*>= 0"),
        (dict(scale=math.nan), "guidance.scale is nan.*>= 0"),
        (dict(power=-0.5), "guidance.power is -0.5.*>= 0"),
        (dict(start=-1), "guidance.start is -1.*>= 0"),
        (dict(stop=-2), "guidance.stop is -2.*>= -1"),
        (dict(kind="steps"), r"guidance.steps is \(\) and kind is 'steps'"),
        (dict(steps=(1.0, 2.0)), "kind is 'constant': kind 'steps' takes a scale for every step"),
        (dict(kind="steps", steps=(1.0, -2.0)), "guidance.steps is .*-2.0.*>= 0"),
    ],
)
def test_errors(fields, message):
    with pytest.raises(ValueError, match=message):
        Guidance(**fields)


def test_guidance_that_would_never_begin():
    assert Guidance(scale=2.0, start=STEPS - 1).scales(STEPS)[-1] == 2.0
    with pytest.raises(ValueError, match="guidance.start is 7, .* the steps 0 to 6"):
        Guidance(scale=2.0, start=STEPS).scales(STEPS)


def test_a_scale_for_every_step():
    given = (1.0, 3.0, 0.5, 2.0)
    np.testing.assert_array_equal(Guidance(kind="steps", steps=given).scales(4), given)
    later = Guidance(kind="steps", steps=given, start=2).scales(4)
    np.testing.assert_array_equal(later, (1.0, 1.0, 0.5, 2.0))
    with pytest.raises(ValueError, match="steps has 4 numbers; the schedule has 3 steps"):
        Guidance(kind="steps", steps=given).scales(3)
