"""ARPG: every array that the official code recorded, every released size, the way back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ar_jax.build import build_system
from ar_jax.convert import arpg
from ar_jax.convert.parity import arpg as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes, to_params, to_tensors
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import released_shapes, sizes_of

GOLDEN = Path(__file__).parent / "golden" / "arpg"
RELEASES = {"ARPG-L": "L", "ARPG-XL": "XL", "ARPG-XXL": "XXL"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


@pytest.fixture(scope="module")
def released() -> dict[str, dict[str, tuple[int, ...]]]:
    return released_shapes("arpg")


@pytest.mark.slow  # half a minute
def test_parity(tiny):
    check(parity, tiny)


def test_the_case_shows_what_it_should(tiny):
    """A dropped label, and groups of several codes, which see each other."""
    dropped = np.sum(tiny["drop_u"] < tiny.spec["config"]["class_dropout_prob"])
    assert 0 < dropped < len(tiny["drop_u"])
    assert min(tiny["gen_arccos_counts"]) > 1


def test_a_run_of_another_name_is_not_guessed(tiny):
    case = part_of(tiny, ("gen_cosine_ids", "labels", "ids", "gen_order"), tiny.spec)
    case.io["gen_odd_ids"] = case.io.pop("gen_cosine_ids")
    with pytest.raises(AssertionError, match="'odd' is none of arccos, cosine"):
        check(parity, case)


@pytest.mark.parametrize("name", RELEASES)
def test_released_generators(released, name):
    shapes = released[name]
    counts = sum(math.prod(shape) for shape in shapes.values()), len(shapes)
    assert counts == sizes_of("arpg")[name].counts
    part = arpg.generator(shapes, {})
    # The configuration is the file's, but for what is said of training.
    wanted = load("configs/imagenet256/arpg.py").get_config(RELEASES[name]).to_dict()
    config = {"dtype": "float32", "tokenizer": wanted["tokenizer"], **part.section}
    assert release_shapes(part, empty_params(config, "generator")) == shapes
    for section in ("schedule", "head", "objective"):
        assert part.section[section] == wanted[section], section
    fields = {k: v for k, v in wanted["backbone"].items() if k != "remat"}
    assert part.section["backbone"] == fields
    assert part.section["sampling"]["guidance"] == wanted["sampling"]["guidance"]
    build_system(config)


def test_tensors_there_and_back(tiny):
    """Bit for bit, the row that nothing reads too."""
    model, tensors = parity.ordered.load(tiny, arpg, tiny["ids"]), tiny.state_dict("transformer")
    trained = {name: model.params[name] for name in ("backbone", "head")}
    again = arpg.generator_part(model.part.section)
    back = to_tensors(again, to_params(again, tensors, trained, "tiny"))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, key)
    assert arpg.unwrap_generator({"model": tensors}) is tensors


def test_options_must_agree_with_the_shapes(tiny):
    shapes, said = tiny.shapes("transformer"), dict(heads=4, grid=4)
    for options, words in (
        (dict(num_classes=8), "num_classes is 8, but .* says 10"),
        (dict(codebook_size=99), "codebook_size is 99, but .* says 128"),
        (dict(depth=2), "depth is 2, but .* says 4"),
        (dict(heads=3), "heads is 3, .* give the option heads"),
    ):
        with pytest.raises(ValueError, match=words):
            arpg.generator(shapes, said | options)
    rest = {key: shape for key, shape in shapes.items() if "cross_dec.1" not in key}
    with pytest.raises(ValueError, match="2 layers of self_dec and 1 of cross_dec"):
        arpg.generator(rest, said)
    config = load("configs/imagenet256/llamagen.py").get_config("B").to_dict()
    with pytest.raises(ValueError, match="ARPG's is 'two_pass_decoder'"):
        arpg.generator_part(config)
