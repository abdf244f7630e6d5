"""LlamaGen: every array that the official code recorded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert.parity import llamagen
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "llamagen"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module", params=sorted(path.parent.name for path in GOLDEN.glob("*/spec.json"))
)
def case(request) -> Case:
    return Case.load(GOLDEN / request.param)


def test_parity(case):
    lines = list(check_case(llamagen, case))
    wrong = "\n".join(str(line) for line in lines if not line.ok)
    assert not wrong, f"\n{wrong}"
    assert len(lines) == 40


def test_the_case_drops_a_label_and_a_caption(case):
    """Else the dropped losses would show nothing."""
    for prefix, part in (("gpt", "gpt_c2i"), ("t2i", "gpt_t2i")):
        probability = case.spec["config"][part]["class_dropout_prob"]
        assert 0 < np.sum(case[f"{prefix}_drop_u"] < probability) < len(case[f"{prefix}_drop_u"])
