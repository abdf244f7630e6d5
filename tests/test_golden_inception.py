"""FID's Inception-v3: every array that the published code recorded, and its file's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ar_jax.convert import inception as converter
from ar_jax.convert.parity import inception
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import release_shapes
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "inception"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(GOLDEN / "full")


@pytest.mark.parametrize("batch", ["__a", ""])
@pytest.mark.slow
def test_parity(case, batch):
    check(inception, part_of(case, [n for n in case.io if n.endswith(batch)], case.spec))


def test_keys_of_the_release():
    (recorded,) = json.loads((GOLDEN / "release_keys.json").read_text()).values()
    part = converter.network({})
    shapes = release_shapes(part, converter.expected(part))
    assert {key: list(shape) for key, shape in shapes.items()} | {
        key: list(buffer.shape or ()) for key, buffer in part.buffers.items()
    } == recorded
