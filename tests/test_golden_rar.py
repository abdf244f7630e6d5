"""RAR: every array that the official code recorded, every released size, the way back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.build import build_system
from ar_jax.convert import rar, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import export_directory, write_directory
from ar_jax.convert.parity import rar as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import Part, empty_params, release_shapes, to_params
from ar_jax.evaluation.samples import sample_workdir
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import released_shapes, sizes_of

GOLDEN = Path(__file__).parent / "golden" / "rar"
RELEASES = {"RAR-B": "b", "RAR-L": "l", "RAR-XL": "xl", "RAR-XXL": "xxl"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module", params=sorted(path.parent.name for path in GOLDEN.glob("*/spec.json"))
)
def case(request) -> Case:
    return Case.load(GOLDEN / request.param)


@pytest.fixture(scope="module")
def released() -> dict[str, dict[str, tuple[int, ...]]]:
    return released_shapes("rar")


@pytest.mark.slow  # half a minute
def test_parity(case):
    check(parity, case)


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


def test_the_case_shows_what_it_should(tiny):
    """A dropped label, orders that are not raster ones, and all stretches of the annealing."""
    assert 0 < np.sum(tiny["drop_u"] < parity.LABEL_DROPOUT) < len(tiny["drop_u"])
    assert (tiny["orders"] != np.arange(tiny["orders"].shape[1])).any(axis=1).all()
    ratio = tiny["anneal_ratio"]
    assert ratio.max() == 1 and ratio.min() == 0 and ((ratio > 0) & (ratio < 1)).any()


def parts(case: Case) -> dict[str, tuple[Part, Any]]:
    """Sub-model -> (part, shapes of our parameters)."""
    model = parity.load(case)
    tokenizer = parity.tokenizer_part(case, case["gen_pow_image"].shape[2:])
    config = {"dtype": "float32", **tokenizer.section, **model.generator.section}
    return {
        name: (part, empty_params(config, name))
        for name, part in (("tokenizer", tokenizer), ("generator", model.generator))
    }


@pytest.mark.slow
def test_files_to_a_directory_that_samples_and_back(tiny, tmp_path):
    """As the official code samples, and bit for bit what it was."""
    case = tiny
    files = {"tokenizer": tmp_path / "tokenizer.bin", "generator": tmp_path / "rar.bin"}
    for name, path in files.items():
        weight_file.write(path, case.state_dict(name))
    image_size = case["gen_pow_image"].shape[-1]
    converted = convert_files(
        rar, files["tokenizer"], files["generator"], {"image_size": image_size}
    )
    write_directory(converted, tmp_path / "ours")
    settings, labels = case.spec["sampling"], case["labels"].tolist()
    said = {"guidance.scale": settings["scale"], "guidance.power": settings["pow"]}
    samples = sample_workdir(
        tmp_path / "ours",
        tmp_path / "samples.png",
        labels=labels,
        sampling={"temperature": 0.0, **said},
        batch_size=len(labels),
        progress=False,
    )
    np.testing.assert_array_equal(samples.codes, case["gen_pow_ids"])
    outs = {"generator": tmp_path / "back.bin", "tokenizer": tmp_path / "back.safetensors"}
    export_directory(rar, tmp_path / "ours", list(outs.values()))
    for name, path in outs.items():
        found, wanted = weight_file.read(path), case.state_dict(name)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():  # rows of the tables that nothing reads too
            assert found[key].dtype == tensor.dtype
            np.testing.assert_array_equal(found[key], tensor, key)


def test_schedules_without_their_neighbours(tiny):
    """No guidance of the runs, no images: the grid is square, and each table stands by itself."""
    spec = copy.deepcopy(tiny.spec) | {"sampling": {"anneal": [3, 3]}}
    case = part_of(tiny, ("cfg_schedule_rar_b_256",), spec)
    case.io["cfg_schedule_rar_xl_9"] = parity._guidance(6.9, 1.5).scales(9)
    case.io["anneal_steps"] = np.array([0, 2, 4, 10**6])
    case.io["anneal_ratio"] = np.array([1, 1, 0, 0], np.float32)
    check(parity, case)
    assert parity._grid(case) == (4, 4)
    case.spec["config"]["generator"]["image_seq_len"] = 15
    with pytest.raises(ValueError, match="image_seq_len is 15, which is no 3 x 3 codes"):
        parity._grid(case)


@pytest.mark.parametrize("name", RELEASES)
def test_released_generators(released, name):
    size, shapes = RELEASES[name], released[name]
    counts = sum(math.prod(shape) for shape in shapes.values()), len(shapes)
    assert counts == sizes_of("rar")[name].counts
    part = rar.generator(shapes, {})
    tokenizer = rar.tokenizer(released["MaskGIT-VQGAN"], {})
    config = {"dtype": "float32", **tokenizer.section, **part.section}
    assert release_shapes(part, empty_params(config, "generator")) == shapes
    # The configuration is the file's, but for what is said of training.
    wanted = load("configs/imagenet256/rar.py").get_config(size).to_dict()
    for section in ("schedule", "head", "objective"):
        assert part.section[section] == wanted[section], section
    fields = part.section["backbone"]
    assert fields == {k: v for k, v in wanted["backbone"].items() if k != "remat"}
    assert part.section["sampling"]["guidance"] == wanted["sampling"]["guidance"]
    assert part.section["sampling"]["temperature"] == wanted["sampling"]["temperature"]
    ours = tokenizer.section["tokenizer"]
    assert ours["autoencoder"] == wanted["tokenizer"]["autoencoder"]
    build_system(config)


def test_released_tokenizer(released):
    shapes = released["MaskGIT-VQGAN"]
    part = rar.tokenizer(shapes, {})
    config = {"dtype": "float32", **part.section}
    assert release_shapes(part, empty_params(config, "tokenizer")) == shapes
    counts = sum(math.prod(shape) for shape in shapes.values()), len(shapes)
    assert counts == sizes_of("rar")["MaskGIT-VQGAN"].counts
    assert not part.buffers


def made(net: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """(our config, official shapes) of a small generator with these fields."""
    config = load("configs/imagenet256/rar.py").get_config("b").to_dict()
    config["backbone"] |= net
    part = rar.generator_part(config)
    return config, release_shapes(part, empty_params(config, "generator"))


@pytest.mark.parametrize(
    "net",
    [
        dict(width=36, heads=3, depth=2, mlp_hidden=50, num_classes=7),
        dict(width=32, heads=1, depth=1, mlp_hidden=32, num_classes=1),
    ],
    ids=["three heads", "one head"],
)
def test_sizes_are_read_from_the_shapes(net):
    config, shapes = made(net)
    read = rar.generator(shapes, {}).section
    assert read["schedule"] == config["schedule"]
    assert read["backbone"] == {k: v for k, v in config["backbone"].items() if k != "remat"}
    assert read["sampling"]["guidance"]["scale"] == 4.0  # of no release


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (dict(grid=17), ["grid is 17", "1280"]),
        (dict(heads=4), ["heads is 4", "q_norm", "3"]),
        (dict(num_classes=8), ["num_classes is 8", "embeddings.weight", "7"]),
        (dict(mlp_hidden=51), ["mlp_hidden is 51", "50"]),
    ],
)
def test_options_must_agree_with_the_shapes(options, words):
    _, shapes = made(dict(width=36, heads=3, depth=1, mlp_hidden=50, num_classes=7))
    if "grid" in options:
        shapes = shapes | {"timesteps_embeddings": (1, 280, 36)}
    with pytest.raises(ValueError) as error:
        rar.generator(shapes, options)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_an_unclear_grid_must_be_given():
    _, shapes = made(dict(width=36, heads=3, depth=1, mlp_hidden=50, num_classes=7))
    shapes |= {
        "pos_embed": (1, 12 + 1024, 36),
        "target_aware_pos_embed": (1, 12 + 1024, 36),
        "timesteps_embeddings": (1, 12 + 100, 36),
    }
    with pytest.raises(ValueError, match="give the option grid"):
        rar.generator(shapes, {})
    part = rar.generator(shapes, {"grid": (3, 4)})
    assert part.section["schedule"]["grid"] == (3, 4)
    assert part.section["backbone"]["spare_positions"] == 1022


@pytest.mark.parametrize("field", ["positions", "qk_norm", "norm", "shared_embedding"])
def test_other_decoders_are_refused(field):
    config = load("configs/imagenet256/rar.py").get_config("b").to_dict()
    config["backbone"][field] = "none"
    with pytest.raises(ValueError, match=f"backbone.{field} is 'none'"):
        rar.generator_part(config)


def test_other_tokenizers_are_refused():
    config = load("configs/imagenet256/tokenizer_vq.py").get_config().to_dict()
    with pytest.raises(ValueError, match="tokenizer.autoencoder.name are .*'pooled'"):
        rar.tokenizer_part(config)
    config = load("configs/imagenet256/tokenizer_maskgit.py").get_config().to_dict()
    config["tokenizer"]["l2_norm"] = True
    with pytest.raises(ValueError, match="without l2_norm"):
        rar.tokenizer_part(config)


def test_the_adaptive_norms_vectors_are_moved(tiny):
    """shift, scale, gate (attention, then MLP) -> gates, scales, shifts."""
    part, expected = parts(tiny)["generator"]
    key = "blocks.0.adaLN_modulation.1.bias"
    tensors = tiny.state_dict("generator")
    params = to_params(part, tensors, expected, "generator")
    ours = params["backbone"]["stack"]["blocks"]["modulation"]["bias"][0]
    shift1, scale1, gate1, shift2, scale2, gate2 = np.split(tensors[key], 6)
    wanted = np.stack([gate1, gate2, scale1, scale2, shift1, shift2])
    np.testing.assert_array_equal(ours, wanted)
    assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, expected)
