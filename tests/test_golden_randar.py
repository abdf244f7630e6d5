"""RandAR: every array that the official code recorded, every released size, the way back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.build import build_system
from ar_jax.convert import llamagen, randar, rar, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import export_directory, write_directory
from ar_jax.convert.parity import randar as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import released_shapes, sizes_of

GOLDEN = Path(__file__).parent / "golden"
RELEASES = {"L llamagen": "L", "L maskgit": "L_maskgit", "XL llamagen": "XL"}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "randar" / "tiny")


@pytest.fixture(scope="module")
def released() -> dict[str, dict[str, tuple[int, ...]]]:
    return released_shapes("randar")


@pytest.mark.slow  # all arrays
def test_parity(tiny):
    check(parity, tiny)


def test_a_run_of_another_name_is_not_guessed(tiny):
    case = part_of(tiny, ("gen_par_ids", "labels", "ids", "order"), tiny.spec)
    case.io["gen_odd_ids"] = case.io.pop("gen_par_ids")
    with pytest.raises(AssertionError, match="'odd' is none of par, seq and nocfg"):
        check(parity, case)


@pytest.mark.parametrize("name", RELEASES)
def test_released_generators(released, name):
    shapes = released[name]
    counts = sum(math.prod(shape) for shape in shapes.values()), len(shapes)
    assert counts == sizes_of("randar")[name].counts
    part = randar.generator(shapes, {})
    # The configuration is the file's, but for what is said of training.
    wanted = load("configs/imagenet256/randar.py").get_config(RELEASES[name]).to_dict()
    config = {"dtype": "float32", "tokenizer": wanted["tokenizer"], **part.section}
    assert release_shapes(part, empty_params(config, "generator")) == shapes
    for section in ("schedule", "head", "objective"):
        assert part.section[section] == wanted[section], section
    fields = {k: v for k, v in wanted["backbone"].items() if k != "remat"}
    assert part.section["backbone"] == fields
    assert part.section["sampling"]["guidance"] == wanted["sampling"]["guidance"]
    build_system(config)


@pytest.mark.parametrize(
    ("family", "file", "size"),
    [(llamagen, "tokenizer_vq", "L"), (rar, "tokenizer_maskgit", "L_maskgit")],
    ids=["llamagen", "maskgit"],
)
def test_both_tokenizers(family, file, size):
    config = load(f"configs/imagenet256/{file}.py").get_config().to_dict()
    part = randar.tokenizer_part(config)
    assert part.places.keys() == family.tokenizer_part(config).places.keys()
    shapes = release_shapes(part, empty_params(config, "tokenizer"))
    read: Any = randar.tokenizer(shapes, {}).section["tokenizer"]
    wanted = load("configs/imagenet256/randar.py").get_config(size).to_dict()["tokenizer"]
    assert read["autoencoder"] == wanted["autoencoder"]


@pytest.mark.slow  # twelve seconds of converting
def test_files_there_and_back(tiny, tmp_path):
    """Bit for bit; the tokenizer is LlamaGen's case's, cut to as many codes."""
    codes = Case.load(GOLDEN / "llamagen" / "tiny").state_dict("tokenizer")
    vocabulary = tiny.spec["config"]["vocab_size"]
    codes["quantize.embedding.weight"] = codes["quantize.embedding.weight"][:vocabulary]
    files = {"tokenizer": tmp_path / "vq.pt", "transformer": tmp_path / "randar.safetensors"}
    tensors = {"tokenizer": codes, "transformer": tiny.state_dict("transformer")}
    weight_file.write(files["tokenizer"], {"model": codes})
    weight_file.write(files["transformer"], tensors["transformer"])
    options = dict(heads=4, image_size=16, steps=7)
    converted = convert_files(randar, files["tokenizer"], files["transformer"], options)
    assert converted.config["schedule"]["grid"] == 4
    write_directory(converted, tmp_path / "ours")
    outs = {name: tmp_path / f"{name}.safetensors" for name in ("transformer", "tokenizer")}
    export_directory(randar, tmp_path / "ours", list(outs.values()))
    for name, path in outs.items():
        found = weight_file.read(path)
        found = {key: found[key] for key in found if key != "quantize.codebook_used"}
        assert found.keys() == tensors[name].keys()
        for key, tensor in tensors[name].items():
            np.testing.assert_array_equal(found[key], tensor, key)


def test_options_must_agree_with_the_shapes(tiny):
    shapes, heads = tiny.shapes("transformer"), dict(heads=4, grid=4)
    for options, words in (
        (dict(num_classes=8), "num_classes is 8, but .* says 10"),
        (dict(codebook_size=99), "codebook_size is 99, but .* says 128"),
        (dict(depth=2), "depth is 2, but .* says 3"),
    ):
        with pytest.raises(ValueError, match=words):
            randar.generator(shapes, heads | options)
    with pytest.raises(ValueError, match="give the option heads"):
        randar.generator(shapes, {})
    rest = {key: shape for key, shape in shapes.items() if key != randar.INSTRUCTION}
    with pytest.raises(ValueError, match="'pos_instruct_embeddings' is missing"):
        randar.generator(rest, heads)
    # Without dropped labels the official table has no null class, and there is no guidance.
    section = randar.generator(shapes, heads | dict(label_dropout=0, num_classes=11)).section
    assert section["backbone"]["null_class"] is False
    assert section["sampling"]["guidance"]["scale"] == 1.0
    config = load("configs/imagenet256/llamagen.py").get_config("B").to_dict()
    with pytest.raises(ValueError, match="RandAR's is 'instructed_decoder'"):
        randar.generator_part(config)
