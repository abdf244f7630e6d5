"""Schedules: the order of the codes, as numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.mask_rule import MaskRule
from ar_jax.schedules import Schedule, as_grids, masked, next_scale, raster


def test_raster():
    schedule = raster(grid=(2, 3))
    assert (schedule.length, schedule.num_steps, schedule.equal_steps) == (6, 6, True)
    assert schedule.sizes == (1,) * 6
    assert schedule.starts == tuple(range(6))
    np.testing.assert_array_equal(schedule.step_id, np.arange(6))
    rows_first = [(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0), (0, 1, 1), (0, 1, 2)]
    np.testing.assert_array_equal(schedule.coords, rows_first)


def test_next_scale():
    schedule = next_scale(scales=[1, (1, 2), (2, 3)])
    assert schedule.grids == ((1, 1), (1, 2), (2, 3))
    assert (schedule.length, schedule.num_steps, schedule.equal_steps) == (9, 3, False)
    assert schedule.sizes == (1, 2, 6)
    assert schedule.starts == (0, 1, 3)
    np.testing.assert_array_equal(schedule.step_id, [0, 1, 1, 2, 2, 2, 2, 2, 2])
    np.testing.assert_array_equal(schedule.coords[:3], [(0, 0, 0), (1, 0, 0), (1, 0, 1)])
    np.testing.assert_array_equal(schedule.coords[3:], [(2, *cell) for cell in np.ndindex(2, 3)])
    assert schedule.step_id.dtype == schedule.coords.dtype == np.int32


def test_official_scales():
    schedule = next_scale(scales=(1, 2, 3, 4, 5, 6, 8, 10, 13, 16))
    assert schedule.length == 680
    assert schedule.starts[-1] == 680 - 256


def test_scales_of_equal_size_are_not_scanned():
    """A scan traces the step, and the multi-scale quantiser needs to know the scale."""
    assert not next_scale(scales=[(1, 4), (2, 2), (4, 1)]).equal_steps
    assert raster(grid=4).equal_steps


def test_hashable_and_comparable():
    assert hash(raster(grid=3)) == hash(raster(grid=(3, 3)))
    assert next_scale(scales=(1, 3)) == next_scale(scales=[1, (3, 3)])
    assert next_scale(scales=(1, 3)) != next_scale(scales=(2, 3))


# Of 64 codes in 4 iterations; the last one leaves one by rule.
HIDDEN = {
    "uniform": (48, 32, 16, 1),
    "pow2": (60, 48, 28, 1),
    "pow0.5": (32, 18, 8, 1),
    "cosine": (59, 45, 24, 1),
    "arccos": (53, 42, 29, 1),
    "log": (21, 10, 4, 1),  # log2(4 / i) / 6 of them
    "exp": (61, 56, 41, 1),  # all but a quarter of 6 bits, 64 - 64^(i / 4)
}


@pytest.mark.parametrize("method", HIDDEN)
def test_codes_that_are_still_hidden(method):
    rule = MaskRule(method=method, slack=1e-9)
    assert tuple(rule.lengths(64, 4)) == HIDDEN[method]
    np.testing.assert_array_equal(rule.lengths(np.array([64, 64]), 4, 2), [HIDDEN[method][2:]] * 2)
    sizes = masked(grid=8, iterations=4, method=method, slack=1e-9).sizes
    np.testing.assert_array_equal(64 - np.cumsum(sizes), [*HIDDEN[method][:3], 0])


def test_an_iteration_finds_a_code_while_there_are_any():
    for count in range(5):
        left = [count, *MaskRule(method="pow9").lengths(count, 6)]
        assert left[1:] == [max(1, n - 1) for n in left[:-1]]


def test_slack_makes_whole_numbers_whole():
    """The cosine at 2/3 is a half; numpy's, of 26 / 39, is a little less."""
    assert MaskRule().floors(64, 39)[25] == 31
    assert MaskRule(slack=1e-9).floors(64, 39)[25] == 32


def test_shares_of_one_code_are_finite():
    for method in HIDDEN:
        ratios = np.array([1e-30, 0.5, 1.0])
        share = MaskRule(method=method).share(ratios, 1.0, 1)
        assert ((share >= 1e-6) & (share <= 1)).all(), method


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: masked(grid=4, iterations=4, method="sine"),
            ["schedule.method", "'sine'", "powX"],
        ),
        (lambda: masked(grid=4, iterations=4, method="pow0"), ["schedule.method", "'pow0'"]),
        (lambda: masked(grid=4, iterations=4, method="pow-1"), ["schedule.method", "'pow-1'"]),
        (lambda: masked(grid=4, iterations=4, slack=1.0), ["schedule.slack", "1.0", "[0, 1)"]),
        (lambda: as_grids([]), ["scales", "empty"]),
        (lambda: as_grids([1, 0]), ["scales", "0", "positive"]),
        (lambda: as_grids([(2, -1)]), ["scales", "(2, -1)", "positive"]),
        (lambda: as_grids([(2, 3, 4)]), ["scales", "(2, 3, 4)"]),
        (lambda: as_grids([1.5]), ["scales", "1.5"]),  # type: ignore
        (lambda: as_grids(4), ["scales", "4", "list"]),  # type: ignore
        (lambda: raster(grid="7"), ["'7'"]),  # type: ignore
        (
            lambda: Schedule(name="x", grids=((2, 2),), sizes=(1, 2)),
            ["sizes", "(1, 2)", "3", "4"],
        ),
    ],
)
def test_errors(call, words):
    with pytest.raises(ValueError) as error:
        call()
    for word in words:
        assert word in str(error.value)
