"""LPIPS: every array that the official code recorded, of both backbones."""

from __future__ import annotations

from pathlib import Path

import pytest

from ar_jax.convert.parity import lpips
from ar_jax.convert.parity.case import Case
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "lpips"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(GOLDEN / "v01")


@pytest.mark.parametrize("network", ["alex", pytest.param("vgg", marks=pytest.mark.slow)])
def test_parity(case, network):
    names = [name for name in case.io if name.startswith((network, "norm"))]
    check(lpips, part_of(case, names, case.spec))
