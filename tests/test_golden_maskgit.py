"""MaskGIT's decoding: every array that the official code recorded, and what must not pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert.parity import maskgit
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case, matches
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "maskgit"
# By default a loop of either kind: one that begins with known codes, and one that is annealed.
OTHERS = ("g_full_*", "g_pow3_*", "g_greedy_*", "t_constant_*", "t_linear_*")
# No array of the reference is passed over.
assert not maskgit.NOT_APPLICABLE

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(GOLDEN / "toy")


@pytest.mark.parametrize(
    "others", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["some", "other loops"]
)
def test_parity(case, others):
    tables = [name for name in case.io if name.startswith("tab_")]
    names = [name for name in case.io if matches(name, OTHERS) == others]
    check(maskgit, part_of(case, {*names, *tables}, case.spec))  # type: ignore[arg-type]


def changed(case: Case, name: str, place: tuple[int, ...], by: int) -> Case:
    schedules = [n for n in case.io if n.startswith("sched_")]
    part = part_of(case, schedules, case.spec)
    part.io[name] = part.io[name].copy()
    part.io[name][place] += by
    return part


@pytest.mark.parametrize(
    ("name", "place", "by"),
    [
        # Ours is no whole number there, so that float32 cannot have rounded it down,
        ("sched_cosine_masklen", (0, 1), -1),
        # and nothing is rounded up.
        ("sched_uniform_masklen", (0, 0), 1),
        ("sched_exp_ideal", (3, 2), -1),
        ("sched_disagreements", (0, 4), 1),
        ("sched_arccos_floor", (0, 1), 1),
    ],
)
def test_a_wrong_count_is_found(case, name, place, by):
    lines = {line.name: line for line in check_case(maskgit, changed(case, name, place, by))}
    assert not lines[name].ok


def test_a_disagreement_that_is_not_listed_is_found(case):
    part = changed(case, "sched_disagreements", (0, 0), 0)
    part.io["sched_disagreements"] = case["sched_disagreements"][1:]
    lines = {line.name: line for line in check_case(maskgit, part)}
    assert not lines["sched_disagreements"].ok


def test_the_counts_differ_where_the_case_says(case):
    """The reference's counts are ours but for its list of disagreements, one lower each."""
    config = case.spec["config"]
    for method in config["methods"]:
        index = config["methods"].index(method)
        differing = np.argwhere(case[f"sched_{method}_masklen"] != case[f"sched_{method}_ideal"])
        listed = case["sched_disagreements"]
        assert len(differing) == (listed[:, 0] == index).sum()
    assert (listed[:, 5] - listed[:, 4] == 1).all()


def test_an_unknown_decay_of_guidance_is_an_error(case):
    spec = case.spec | {"config": case.spec["config"] | {"google": {}}}
    spec["config"]["titok"] = {
        "linear": case.spec["config"]["titok"]["linear"] | {"guidance_decay": "step"}
    }
    lines = list(check_case(maskgit, part_of(case, ["t_linear_final"], spec)))
    assert [line.ok for line in lines] == [False]
    assert "'step'; the official code has constant, linear" in lines[0].origin
