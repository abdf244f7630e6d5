"""Schedules: the order of the codes, as numpy."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.schedules import Schedule, as_grids, next_scale, raster


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


@pytest.mark.parametrize(
    ("call", "words"),
    [
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
