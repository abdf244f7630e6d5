"""Losses of tokenizers: every array that the official code recorded, and what ours has not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ar_jax.convert.parity import vq_losses
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case, matches
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "vq_losses"
# By default the parts that need no large network.
QUICK = ("lf_*", "mg_*", "aw_*", "adopt_*", "lecam_ema", "kl_*", "vq_*")
ALONE: tuple[str, ...] = (
    "patch_*",
    "disc_x",
    "titok_disc_out",
    "titok_disc_grad_x",
    "titok_x",
    "titok_ct",
)
ALONE += ("titok_disc_param_grad_norms", "titok_block0", "titok_pool*")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(GOLDEN / "tiny")


@pytest.mark.parametrize(
    "patterns", [QUICK, pytest.param(ALONE, marks=pytest.mark.slow)], ids=["logits", "networks"]
)
def test_parity_of_parts(case, patterns):
    names = [name for name in case.io if matches(name, patterns)]
    names = [name for name in names if not matches(name, vq_losses.NOT_APPLICABLE)]
    check(vq_losses, part_of(case, names, case.spec))


@pytest.mark.slow
def test_parity(case):
    lines = {line.name: line for line in check_case(vq_losses, case)}
    assert lines.keys() == case.io.keys()
    wrong = "\n".join(str(line) for line in lines.values() if not line.ok)
    assert not wrong, f"\n{wrong}"
    left_out = {name for name, line in lines.items() if line.largest is None}
    inputs = {name for name in case.io if case.role_of(name) == "in"}
    absent = {name for name in case.io if matches(name, vq_losses.NOT_APPLICABLE)}
    assert left_out == inputs | absent and len(absent) == 8
