"""FractalGen: every array that the official code recorded, every released size, the way back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.convert import fractal
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import export_directory, write_directory
from ar_jax.convert.parity import fractal as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes
from ar_jax.convert.weight_file import read, write
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import sizes_of
from tests.toy_fractal import fractal_config

GOLDEN = Path(__file__).parent / "golden" / "fractal"
CASES = ("fractalar_tiny", "fractalmar_tiny")
RELEASES = {
    "FractalAR, 64": "ar_64",
    "FractalMAR, 64": "mar_64",
    "FractalMAR-B, 256": "base",
    "FractalMAR-L, 256": "large",
    "FractalMAR-H, 256": "huge",
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", params=CASES)
def tiny(request) -> Case:
    return Case.load(GOLDEN / request.param)


@pytest.mark.slow  # minutes: gradients, and samplers of every setting
def test_parity(tiny):
    check(parity, tiny)


def test_parity_of_the_first_level_and_of_pixels():
    """The part of the arrays that takes seconds."""
    tiny = Case.load(GOLDEN / CASES[0])
    names = [name for name in tiny.io if name.startswith(("eval_draw", "pixel_head_"))]
    names.append("eval_level0_conditions")
    check(parity, part_of(tiny, [*names, "pixels", "labels"], tiny.spec))


def test_the_cases_show_what_they_should(tiny):
    """A dropped label, and guidance that changes the samples."""
    assert (tiny["train_draw0_uniform"] < tiny.config("fractal")["label_drop_prob"]).any()
    assert (tiny["sa_pixels"] != tiny["sb_pixels"]).any()
    assert len(set(tiny["sb_cfg_per_step"])) > 1


@pytest.mark.parametrize("name", RELEASES)
def test_released_generators(name):
    """The official shapes of a config are the release's, and are read as that config."""
    config = load("configs/imagenet256/fractal.py").get_config(RELEASES[name]).to_dict()
    part = fractal.generator_part(config)
    shapes = release_shapes(part, empty_params(config, "generator"))
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == sizes_of("fractal")[name].counts
    read_again = fractal.generator(shapes, {}).section
    defaults: dict[str, Any] = dict(mlp_hidden=None, conditions=1, colour=False)
    defaults |= dict(colour_weights=(), filter_threshold=1e-4)
    for section in ("schedule", "backbone", "head", "objective", "sampling"):
        for field, value in read_again[section].items():
            assert value == config[section].get(field, defaults.get(field)), (section, field)


@pytest.mark.parametrize(
    ("sizes", "iterations", "conditions", "colour"),
    [
        ((8, 2, 1), (3, 0), 5, False),
        ((8, 2, 1), (3, 0), 2, False),
        ((8, 2, 1), (0, 2), 1, True),
        ((8, 2, 1), (4, 3), 3, True),
        ((16,), (), 1, False),
    ],
)
def test_levels_of_any_kind_are_read_from_shapes(sizes, iterations, conditions, colour):
    """Sizes, conditions and kinds of levels, where the last level is not like the first."""
    if not iterations:
        sizes, iterations = (16, 4, 2, 1), (5, 0, 0)
    count = len(iterations)
    config = fractal_config(
        sizes,
        iterations,
        channels=3,
        values=16,
        backbone=dict(
            conditions=conditions,
            colour=colour,
            widths=(16, 8, 8)[:count],
            depths=(2, 1, 1)[:count],
            heads=(2, 2, 1)[:count],
            mlp_hidden=(48, 32, 24)[:count],
        ),
    )
    part = fractal.generator_part(config)
    shapes = release_shapes(part, empty_params(config, "generator"))
    said = {"heads": config["backbone"]["heads"], "head.heads": 2, "iterations": iterations}
    found = fractal.generator(shapes, said).section
    assert found["schedule"] == config["schedule"]
    for field in ("widths", "depths", "heads", "mlp_hidden", "conditions", "colour", "values"):
        assert found["backbone"][field] == config["backbone"][field], field
    assert found["head"]["width"] == config["head"]["width"]


def test_files_there_and_back(tiny, tmp_path):
    """A file becomes a workdir without any tokenizer's file, and comes back bit for bit."""
    tensors = tiny.state_dict("fractal")
    write(tmp_path / "official.pth", {"model": tensors})
    *heads, pixels = tiny.config("fractal")["num_heads_list"]
    options = {"heads": tuple(heads), "head.heads": pixels}
    converted = convert_files(fractal, None, tmp_path / "official.pth", options)
    assert converted.config["data"]["image_size"] == tiny.config("fractal")["img_size_list"][0]
    write_directory(converted, tmp_path / "ours")
    export_directory(fractal, tmp_path / "ours", [tmp_path / "back.pth"])
    back = read(tmp_path / "back.pth")["model"]
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, key)


def test_options_must_agree_with_the_shapes(tiny):
    shapes = tiny.shapes("fractal")
    *heads, pixels = tiny.config("fractal")["num_heads_list"]
    said = {"heads": tuple(heads), "head.heads": pixels}
    for options, words in (
        ({}, "give both as options"),
        (said | {"head.heads": 5}, "head.heads 5, which must divide"),
        (said | {"num_classes": 9}, "num_classes is 9, but .* says 8"),
        (said | {"image_size": 32}, "image_size is 32, but"),
    ):
        with pytest.raises(ValueError, match=words):
            fractal.generator(shapes, options)
    with pytest.raises(ValueError, match="no tokenizer"):
        fractal.unwrap_tokenizer({})
    part = parity.load(tiny).part
    grey = dict(part.section, backbone=dict(part.section["backbone"], channels=1))
    with pytest.raises(ValueError, match="channels is 1"):
        fractal.generator_part(grey)
