"""LlamaGen: every array that the official code recorded."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert.parity import llamagen
from ar_jax.convert.parity.case import Case
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401

GOLDEN = Path(__file__).parent / "golden" / "llamagen"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module", params=sorted(path.parent.name for path in GOLDEN.glob("*/spec.json"))
)
def case(request) -> Case:
    return Case.load(GOLDEN / request.param)


@pytest.mark.slow  # by default test_convert_directory.py compares what it draws
def test_parity(case):
    check(llamagen, case)


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


def test_the_case_drops_a_label_and_a_caption(tiny):
    """Else the dropped losses would show nothing."""
    for prefix, part in (("gpt", "gpt_c2i"), ("t2i", "gpt_t2i")):
        probability = tiny.spec["config"][part]["class_dropout_prob"]
        assert 0 < np.sum(tiny[f"{prefix}_drop_u"] < probability) < len(tiny[f"{prefix}_drop_u"])


@pytest.mark.slow  # converts and runs once more
def test_a_transformer_alone_without_a_null_class(tiny):
    """No tokenizer, no captions, some arrays: what has no null class has the same codes without.

    The first rows of a smaller table are regenerated as they were in the larger one.
    """
    net = tiny.spec["config"]["gpt_c2i"] | {"class_dropout_prob": 0}
    tensors = copy.deepcopy(tiny.spec["gpt_c2i"]["tensors"])
    table = next(t for t in tensors if t["key"] == "cls_embedding.embedding_table.weight")
    table["shape"][0] -= 1
    spec = {"config": {"gpt_c2i": net}, "gpt_c2i": {"tensors": tensors}}
    names = ("gpt_idx", "gpt_labels", "gpt_logits", "gpt_loss", "gen_nocfg_ids")
    case = part_of(tiny, names, spec)
    case.io["gpt_loss_drop"] = tiny["gpt_loss"]  # nothing is dropped
    check(llamagen, case)


def test_a_run_of_another_name_is_not_guessed(tiny):
    names = ("gen_cfg_ids", "gpt_labels")
    case = part_of(tiny, names, tiny.spec)
    case.io["gen_odd_ids"] = case.io.pop("gen_cfg_ids")
    with pytest.raises(AssertionError, match="'gen_odd' is none of cfg, nocfg"):
        check(llamagen, case)
