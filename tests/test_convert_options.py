"""What files cannot say is asked for, and what is said is taken or refused, never passed over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.convert import mar, var, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import to_params
from tests.converted_cases import GOLDEN, OPTIONS, convert, official, write_files

# As many positions on as many scales as tiny_a's (1, 2, 3, 4).
OTHER_SCALES = ((1, 1), (1, 2), (3, 3), (3, 6))


def test_heads_of_var_without_cosine_attention_are_official_or_asked_for():
    shapes = dict(Case.load(GOLDEN / "var/tiny_b").shapes("transformer"))
    options = {"scales": (1, 2, 4)}
    with pytest.raises(ValueError, match="3 blocks of width 192 are no official .*--heads=N"):
        var.generator(shapes, options)
    assert var.generator(shapes, options | {"heads": 6}).section["backbone"]["heads"] == 6
    shapes |= {f"blocks.{i}.ffn.fc1.weight": (4096, 1024) for i in range(16)}  # d16
    shapes["pos_1LC"] = (1, 21, 1024)
    assert var.generator(shapes, options).section["backbone"]["heads"] == 16


def test_heads_of_mar_are_official_or_asked_for():
    shapes = Case.load(GOLDEN / "mar/tiny").shapes("mar")
    with pytest.raises(ValueError, match="2 blocks of width 32 are no official .*--heads=N"):
        mar.generator(shapes, {})
    with pytest.raises(ValueError, match="2 blocks of width 48 .*--option=decoder_heads=N"):
        mar.generator(shapes, {"heads": 4})
    read = mar.generator(shapes, {"heads": 4, "decoder_heads": 6}).section["backbone"]
    assert (read["heads"], read["decoder_heads"]) == (4, 6)


def write_var(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """The files of VAR's case; changes: to buffers, under the ends of their keys."""
    case = Case.load(GOLDEN / "var/tiny_a")
    paths = folder / "tokenizer.pth", folder / "transformer.pth"
    for path, part in zip(paths, ("tokenizer", "transformer"), strict=True):
        tensors = official(case, part)
        for end, value in changes.items():
            tensors |= {key: value for key in tensors if key.endswith(end)}
        weight_file.write(path, tensors)
    return paths


def test_scales_are_read_from_the_numbering_of_the_positions(tmp_path):
    files = write_var(tmp_path)
    converted = convert_files(var, *files)
    assert converted.config["schedule"]["scales"] == (1, 2, 3, 4)
    assert converted.config["tokenizer"]["scales"] == (1, 2, 3, 4)
    assert converted.config["data"]["image_size"] == 64
    with pytest.raises(ValueError, match=r"image_size is 256, but the transformer makes 4x4 codes"):
        convert_files(var, *files, {"image_size": 256})
    files = write_var(tmp_path, lvl_1L=np.zeros((1, 30), np.int64))
    with pytest.raises(ValueError, match=r"transformer\.pth: .* give the option scales"):
        convert_files(var, *files)


def numbering(*counts: int) -> np.ndarray:
    return np.repeat(np.arange(len(counts)), counts)[None]


@pytest.mark.parametrize(
    ("level", "message"),
    [
        (numbering(1, 4, 9, 15), "does not number the 30 positions"),
        (numbering(1, 4, 25), "does not number the 30 .* by the 4 scales"),
        (numbering(1, 4, 9, 16)[:, ::-1], "does not number the 30"),
        (numbering(1, 2, 9, 18), r"\[1, 2, 9, 18\] positions .* no squares: give the option"),
    ],
)
def test_numberings_that_are_none(level, message):
    shapes = Case.load(GOLDEN / "var/tiny_a").shapes("transformer")
    with pytest.raises(ValueError, match=f"'lvl_1L' .*{message}"):
        var.generator(shapes, {}, {"lvl_1L": level})


def test_a_numbering_that_was_never_filled_says_nothing():
    shapes = Case.load(GOLDEN / "var/tiny_a").shapes("transformer")
    for scales in ((1, 2, 3, 4), OTHER_SCALES):
        part = var.generator(shapes, {"scales": scales}, {"lvl_1L": np.zeros((1, 30), np.int64)})
        assert part.section["schedule"]["scales"] == scales


def test_scales_of_other_forms_are_checked_by_their_positions():
    shapes = Case.load(GOLDEN / "var/tiny_a").shapes("transformer")
    tensors = {"lvl_1L": numbering(1, 2, 9, 18)}
    part = var.generator(shapes, {"scales": OTHER_SCALES}, tensors)
    assert part.section["schedule"]["scales"] == OTHER_SCALES
    with pytest.raises(ValueError, match=r"scales is .* \[1, 4, 9, 16\].* numbers \[1, 2, 9, 18\]"):
        var.generator(shapes, {"scales": (1, 2, 3, 4)}, tensors)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (
            "quantize.ema_vocab_hit_SV",
            np.zeros((3, 64)),
            r"\(3, 64\), but by the scales \(1, 2, ",
        ),
        ("blocks.1.attn.zero_k_bias", np.zeros(64), r"\(64,\), but by the official .* is \(128,\)"),
        ("blocks.1.attn.zero_k_bias", np.ones(128), "holds other numbers than"),
        ("attn_bias_for_masking", np.ones((1, 1, 30, 30)), "other numbers .* by the scales"),
        ("lvl_1L", numbering(1, 2, 9, 18), "other numbers than it has by the scales"),
    ],
)
def test_buffers_of_another_model_are_refused(key, value, message):
    case = Case.load(GOLDEN / "var/tiny_a")
    name = "tokenizer" if key.startswith("quantize") else "transformer"
    make = var.tokenizer if name == "tokenizer" else var.generator
    part = make(case.shapes(name), {"scales": (1, 2, 3, 4)})
    tensors = official(case, name) | {key: value}
    with pytest.raises(ValueError, match=rf"^a\.pth: buffer '{key}' .*{message}"):
        to_params(part, tensors, {}, "a.pth")


def test_leftovers_of_training_are_named_and_nothing_else_is_passed_over(tmp_path, caplog):
    case = Case.load(GOLDEN / "mar/tiny")
    state = case.state_dict("vae")
    left = {"loss.logvar": np.zeros(()), "discriminator.main.0.weight": np.zeros((2, 2))}
    weight_file.write(tmp_path / "kl16.ckpt", {"model": state | left})
    caplog.set_level("INFO", "ar_jax")
    converted = convert_files(mar, tmp_path / "kl16.ckpt", None, {"image_size": 32})
    assert converted.unread == tuple(left)
    assert "kl16.ckpt: 2 tensors of training are not read: loss.logvar, disc" in caplog.text
    weight_file.write(tmp_path / "more.ckpt", {"model": state | {"teacher.w": np.zeros(3)}})
    with pytest.raises(ValueError, match=r"more\.ckpt: tensor 'teacher\.w' \(3,\) has no place"):
        convert_files(mar, tmp_path / "more.ckpt", None, {"image_size": 32})


@pytest.fixture(scope="module")
def mar_files(tmp_path_factory) -> tuple[Path, Path]:
    return write_files("mar", tmp_path_factory.mktemp("mar"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (dict(norm_epsilon=1e-5), "norm_epsilon=1e-05 cannot be taken: backbone.norm_.* is 1e-06"),
        (dict(downsample=16), "downsample=16 cannot be taken: the tokenizer's downsampling is 8"),
        (dict(grid=5), "grid=5 cannot be taken: schedule.grid is 4"),
        (dict(scales=(1, 4)), "scales=.* is unknown; there are .*'sampling_steps'"),
        (dict(decoder_depth=3), "decoder_depth=3 cannot be taken: backbone.decoder_depth is 2"),
    ],
)
def test_an_option_that_is_not_taken_is_an_error(mar_files, option, message):
    with pytest.raises(ValueError, match=f"option {message}"):
        convert("mar", mar_files, **option)


@pytest.fixture(scope="module")
def mar_config(mar_files) -> dict[str, Any]:
    said = dict(sampling_steps=50, grid=(4, 4), downsample=8, scale=0.5, guidance=2.5, groups=16)
    return convert("mar", mar_files, **said).config


def test_options_that_are_taken(mar_config):
    assert mar_config["head"]["sampling_steps"] == "50" and mar_config["tokenizer"]["scale"] == 0.5
    assert mar_config["sampling"]["guidance"]["scale"] == 2.5
    assert mar_config["tokenizer"]["autoencoder"]["groups"] == 16


def test_an_option_must_agree_with_the_configuration(mar_files, mar_config):
    with pytest.raises(ValueError, match=r"label_dropout=0.2 .*: objective.label_dropout is 0.1"):
        said = {**OPTIONS["mar"], "label_dropout": 0.2}
        convert_files(mar, mar_files[0], mar_files[1], said, mar_config)
