"""PAR: every array that the official code recorded, every released size, the way back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert import par
from ar_jax.convert.parity import par as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes, to_params, to_tensors
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import released_shapes, sizes_of

GOLDEN = Path(__file__).parent / "golden" / "par"
RELEASES = {"PAR-XL-4x": "XL", "PAR-XXL-4x": "XXL", "PAR-3B-4x": "3B", "PAR-3B-16x": "3B_16x"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


@pytest.fixture(scope="module")
def released() -> dict[str, dict[str, tuple[int, ...]]]:
    return released_shapes("par")


@pytest.mark.slow  # half a minute
def test_parity(tiny):
    check(parity, tiny)


def test_a_run_of_another_name_is_not_guessed(tiny):
    case = part_of(tiny, ("gen_seq_ids", "labels", "raster_ids"), tiny.spec)
    case.io["gen_odd_seq_ids"] = case.io.pop("gen_seq_ids")
    with pytest.raises(AssertionError, match="'gen_odd' is none of gen, gen_nocfg"):
        check(parity, case)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if "3B" in n else ()) for n in RELEASES]
)
def test_released_generators(released, name):
    shapes = released[name]
    counts = sum(math.prod(shape) for shape in shapes.values()), len(shapes)
    assert counts == sizes_of("par")[name].counts
    assert par.generator(shapes, {}).section["schedule"]["grid"] == 24
    # At 256 px the configuration is the file's, but for what is said of training.
    part = par.generator(shapes, {"image_size": 256})
    wanted = load("configs/imagenet256/par.py").get_config(RELEASES[name]).to_dict()
    config = {"dtype": "float32", "tokenizer": wanted["tokenizer"], **part.section}
    assert release_shapes(part, empty_params(config, "generator")) == shapes
    assert part.section["schedule"] == wanted["schedule"]
    assert part.section["head"] == wanted["head"]
    fields = {k: v for k, v in part.section["backbone"].items() if k != "condition"}
    assert fields == {k: v for k, v in wanted["backbone"].items() if k != "remat"}
    guidance = part.section["sampling"]["guidance"]
    assert guidance["scale"] == wanted["sampling"]["guidance"]["scale"]


def test_tensors_there_and_back(tiny):
    """Bit for bit."""
    model, tensors = (
        parity.ordered.load(tiny, par, tiny["raster_ids"]),
        tiny.state_dict("transformer"),
    )
    trained = {name: model.params[name] for name in ("backbone", "head")}
    again = par.generator_part(model.part.section)
    back = to_tensors(again, to_params(again, tensors, trained, "tiny"))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, key)


def test_options_must_agree_with_the_shapes(tiny):
    shapes, said = tiny.shapes("transformer"), dict(heads=4, grid=4)
    for options, words in (
        (dict(regions=16), "regions is 16, but .* says 4"),
        (dict(num_classes=8), "num_classes is 8, but .* says 10"),
    ):
        with pytest.raises(ValueError, match=words):
            par.generator(shapes, said | options)
    config = load("configs/imagenet256/llamagen.py").get_config("B").to_dict()
    with pytest.raises(ValueError, match="PAR's is 'distant_groups'"):
        par.generator_part(config)
