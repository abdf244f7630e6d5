"""What the page on official weights says of the releases is what the tests check."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, to_params, to_tensors
from ar_jax.convert.release import choose
from tests.converted_cases import GOLDEN
from tests.released_sizes import CASES, table

PAGE = Path(__file__).resolve().parent.parent / "experiments" / "official_weights.md"


def test_the_page_has_the_table():
    wanted = table()
    found = PAGE.read_text(encoding="utf-8")
    assert wanted in found, "python -m tests.released_sizes prints the table for that page"


def test_every_golden_case_is_in_the_table():
    folders = {path.parent for path in GOLDEN.glob("*/*/spec.json")}
    named = {GOLDEN / name for names in CASES.values() for name in names}
    assert folders >= named
    models = {folder for folder in folders if "tiny" in folder.name}
    assert models - {GOLDEN / "vq_losses" / "tiny"} == named


SCALES = (1, 2, 4)


@pytest.mark.parametrize(
    ("folder", "name", "said", "options"),
    [
        ("var/tiny_b", "transformer", dict(scales=SCALES), dict(scales=SCALES, heads=3)),
        ("llamagen/tiny", "gpt_t2i", dict(image_size=16), dict(grid=4, heads=2)),
    ],
)
def test_the_way_back_of_other_sub_models(folder, name, said, options):
    """Those that no test of whole files takes there and back; said: of the tokenizer."""
    case, family = Case.load(GOLDEN / folder), choose(folder.split("/")[0])
    codes = family.tokenizer(case.shapes("tokenizer"), said)
    drawn = family.generator(case.shapes(name), options, None)
    config = {"dtype": "float32", **codes.section, **drawn.section}
    config["tokenizer"]["codebook_size"] = drawn.section["head"]["vocab_size"]  # t2i's is its own
    parts = [(name, drawn, "generator")]
    if folder == "var/tiny_b":
        parts.append(("tokenizer", codes, "tokenizer"))
    for key, part, kind in parts:
        tensors = case.state_dict(key)
        back = to_tensors(part, to_params(part, tensors, empty_params(config, kind), folder))
        assert back.keys() == case.shapes(key).keys()
        for official, tensor in tensors.items():
            np.testing.assert_array_equal(back[official], tensor, official)
