"""VAR: every array that the official code recorded, and what ours says beside them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.parity import var
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.stepwise import stepwise_logits
from ar_jax.objectives.likelihood import empty_cond
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "var"

pytestmark = pytest.mark.usefixtures("quick_compilation")


FIRST, *OTHERS = sorted(path.parent.name for path in GOLDEN.glob("*/spec.json"))


@pytest.fixture(
    scope="module", params=[FIRST, *(pytest.param(name, marks=pytest.mark.slow) for name in OTHERS)]
)
def case(request) -> Case:
    return Case.load(GOLDEN / request.param)


@pytest.mark.slow  # a minute a case; test_convert_directory.py samples as the case does
def test_parity(case):
    check(var, case)


@pytest.mark.slow  # beside the parity of both
@pytest.mark.parametrize("name", ["tiny_a", pytest.param("tiny_b", marks=pytest.mark.slow)])
def test_cached_greedy_logits_equal_teacher_forced_ones(name):
    case = Case.load(GOLDEN / name)
    with jax.default_matmul_precision("highest"):
        model = var.load(case)
        drawn = [case[f"greedy.idx_{k}"] for k in range(model.system.schedule.num_steps)]
        codes = jnp.asarray(np.concatenate(drawn, axis=1), jnp.int32)
        cached, _ = stepwise_logits(model.system, model.params, model.cond, codes, None)
        whole = model.teacher_forced(model.cond, codes)
    np.testing.assert_allclose(cached, whole, atol=2e-4)
    difference = np.linalg.norm(np.asarray(cached - whole))
    assert difference <= 1e-5 * np.linalg.norm(np.asarray(whole))
    shapes = jax.tree.map(jnp.shape, empty_cond(model.system, len(codes)))
    assert shapes == jax.tree.map(jnp.shape, model.cond)


def test_filters_without_their_neighbours():
    """Each by itself; the k of the ties is the README's where no filtered logits were recorded."""
    tiny = Case.load(GOLDEN / "tiny_a")
    for names in (
        ("filter.logits", "filter.kp", "filter.out"),
        ("filter.tie_logits", "filter.tie_kept"),
        ("unit.T16.full", "unit.T16.bicubic_2"),
    ):
        check(var, part_of(tiny, names, {"family": "var"}))
