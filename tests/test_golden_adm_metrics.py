"""The ADM evaluator's arithmetic: every recorded array, and what ours says beside it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert.parity import adm_metrics
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "adm_metrics"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(GOLDEN / "small")


@pytest.mark.slow
def test_parity(case):
    check(adm_metrics, case)


def of_one_manifold(case: Case) -> Case:
    """Everything but precision and recall, of which one comparison in blocks stays."""
    names = [n for n in case.io if not n.startswith("pr_") or n.startswith("pr_batched")]
    config = case.spec["config"]
    batched = [pr for pr in config["pr"] if pr["name"] == "batched"]
    return part_of(case, names, case.spec | {"config": config | {"pr": batched}})


def test_parity_of_distances_scores_and_one_manifold(case):
    lines = check(adm_metrics, of_one_manifold(case))
    # Far closer than the README asks: the same float64, but for the mean that ADM takes in float32.
    assert lines["fid_full_rank_eigh_f64mean"].relative < 1e-12
    assert (lines["fid_identical"].largest or 0) < 1e-12
    assert lines["pr_batched_f32"].largest == 0


def test_limits_can_fail(case):
    """Each beyond its own: a distance, equal sets, a flipped member, a lost count, other seeds."""
    part = of_one_manifold(case)
    changes = {
        "fid_wide": part.io["fid_wide"] * (1 + 1e-4),
        "fid_identical": part.io["fid_identical"] + 1e-8,
        "pr_batched_sample_inside": ~part.io["pr_batched_sample_inside"],
        "pr_batched": part.io["pr_batched"] - 0.03,
        "pr_batched_f32": part.io["pr_batched_f32"] - 0.03,
        "is_split37": part.io["is_split37"] + np.float64(1e-3),
    }
    broken = dataclasses.replace(part, io=part.io | changes)
    assert {line.name for line in check_case(adm_metrics, broken) if not line.ok} == set(changes)
    heads = {name: part.io[name] + 1 for name in ("fid_ref_head", "is_features_head")}
    broken = dataclasses.replace(part, io=part.io | heads)
    wrong = {line.name: line.origin for line in check_case(adm_metrics, broken) if not line.ok}
    assert {name.split("_")[0] for name in wrong} == {"fid", "is"}
    assert all("regenerated otherwise than recorded" in origin for origin in wrong.values())
