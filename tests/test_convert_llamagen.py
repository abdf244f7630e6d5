"""LlamaGen's less common files: no null class, a shorter prefix; there and exactly back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.build import build_sampling
from ar_jax.convert import llamagen, weight_file
from ar_jax.convert.conversion import Converted, convert_files
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes, to_params, to_tensors
from tests.converted_cases import CASES, GOLDEN, official

Tensors = dict[str, np.ndarray]
TABLE = "cls_embedding.embedding_table.weight"
OPTIONS = dict(heads=4, image_size=32)


@pytest.fixture(scope="module")
def case() -> Case:
    return Case.load(GOLDEN / CASES["llamagen"])


def convert(folder: Path, tokenizer: Tensors, transformer: Tensors, **options: Any) -> Converted:
    paths = folder / "vq.pt", folder / "gpt.pt"
    for path, tensors in zip(paths, (tokenizer, transformer), strict=True):
        weight_file.write(path, {"model": tensors})
    return convert_files(llamagen, *paths, options)


def comes_back(converted: Converted, transformer: Tensors) -> None:
    params = {name: converted.params[name] for name in ("backbone", "head")}
    back = to_tensors(llamagen.generator_part(converted.config), params)
    assert back.keys() == transformer.keys()
    for key, tensor in transformer.items():
        np.testing.assert_array_equal(back[key], tensor, key)


def test_a_table_without_a_null_class(case, tmp_path):
    """As the official code makes it where no label is dropped."""
    transformer = official(case, "gpt_c2i")
    transformer[TABLE] = transformer[TABLE][:-1]
    converted = convert(
        tmp_path, official(case, "tokenizer"), transformer, **OPTIONS, label_dropout=0
    )
    config = converted.config
    assert (config["backbone"]["num_classes"], config["backbone"]["null_class"]) == (10, False)
    assert not config["objective"]["label_dropout"]
    assert build_sampling(config)[1].scale == 1.0
    assert config["data"]["num_classes"] == 10
    comes_back(converted, transformer)


def test_what_is_said_of_the_null_class_must_fit(case):
    shapes = case.shapes("gpt_c2i")  # of 10 classes and a null one
    for said, message in (
        (dict(num_classes=11, label_dropout=0.1), "label_dropout is 0.1, but .* says 0"),
        (dict(num_classes=9), "num_classes is 9, but .* less a null row says 10"),
        (dict(num_classes=10, null_class=False), "num_classes is 10, .* without a null row says"),
    ):
        with pytest.raises(ValueError, match=message):
            llamagen.generator(shapes, OPTIONS | said)
    section = llamagen.generator(shapes, OPTIONS | dict(num_classes=11)).section
    assert section["backbone"]["null_class"] is False
    assert section["objective"]["label_dropout"] == 0
    for said in ({}, dict(num_classes=10), dict(num_classes=10, label_dropout=0)):
        assert "null_class" not in llamagen.generator(shapes, OPTIONS | said).section["backbone"]


def test_a_prefix_shorter_than_the_null_caption(case, tmp_path):
    transformer = official(case, "gpt_t2i")
    vocabulary = len(transformer["tok_embeddings.weight"])
    tokenizer = official(case, "tokenizer")
    tokenizer["quantize.embedding.weight"] = tokenizer["quantize.embedding.weight"][:vocabulary]
    options = dict(heads=2, image_size=16, caption_length=8)
    converted = convert(tmp_path, tokenizer, transformer, **options)
    backbone = converted.config["backbone"]
    assert (backbone["caption_length"], backbone["caption_null_rows"]) == (8, 120)
    comes_back(converted, transformer)


def test_a_decoder_of_other_widths_than_the_encoder(case):
    read = llamagen.tokenizer(case.shapes("tokenizer"), {"image_size": 32}).section["tokenizer"]
    assert "decoder_multipliers" not in read["autoencoder"]
    fields = read["autoencoder"] | {"multipliers": (1, 2), "decoder_multipliers": (2, 1)}
    part = llamagen.tokenizer_part({"tokenizer": read | {"autoencoder": fields}})
    expected = empty_params({"dtype": "float32", **part.section}, "tokenizer")
    shapes = release_shapes(part, expected)
    assert shapes["decoder.conv_in.weight"][0] == shapes["decoder.conv_out.weight"][1] // 2 == 32
    again = llamagen.tokenizer(shapes, {"image_size": 32})
    assert again.section == part.section
    rng = np.random.default_rng(0)
    tensors = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    back = to_tensors(again, to_params(again, tensors, expected, "made up"))
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, key)
    with pytest.raises(ValueError, match=r"decoder_multipliers is \(1, 2\), but the file says"):
        llamagen.tokenizer(shapes, {"image_size": 32, "decoder_multipliers": (1, 2)})
