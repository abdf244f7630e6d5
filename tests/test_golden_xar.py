"""xAR: every array that the official code recorded, the released sizes, the way back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert import weight_file, xar
from ar_jax.convert.parity import xar as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes, to_params, to_tensors
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import sizes_of

GOLDEN = Path(__file__).parent / "golden" / "xar"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module", params=sorted(path.parent.name for path in GOLDEN.glob("*/spec.json"))
)
def case(request) -> Case:
    return Case.load(GOLDEN / request.param)


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


@pytest.mark.slow
def test_parity(case):
    check(parity, case)


def test_what_training_computes(tiny):
    """What the slow run compares beside it: gradients and samples."""
    names = ["latent", "labels", "train_t", "train_class_drop_uniform", "train_noise", "cells"]
    names += ["attn_mask_allowed", "rope_cos", "time_index_steps40", "train_condition"]
    check(parity, part_of(tiny, [*names, "train_encoder_features", "train_velocity"], tiny.spec))


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_released_generators(size):
    """The official shapes of a config are the release's, and are read as that config."""
    config = load("configs/imagenet256/xar.py").get_config(size).to_dict()
    part = xar.generator_part(config)
    expected = empty_params(config, "generator")
    shapes = release_shapes(part, expected)
    held = shapes | {key: buffer.shape or () for key, buffer in part.buffers.items()}
    assert sum(map(math.prod, shapes.values())) == sizes_of("xar")[size].parameters
    assert len(held) == sizes_of("xar")[size].tensors
    buffers = {"base": 590_080, "large": 1_114_624, "huge": 1_704_736}[size]
    assert sum(math.prod(buffer.shape or ()) for buffer in part.buffers.values()) == buffers
    width = config["backbone"]["width"]
    assert shapes["class_emb.weight"] == (1001, width) and shapes["pred.weight"] == (16, width)
    read = xar.generator(held, {}).section
    assert read == xar.generator(shapes, {}).section  # an official size says its heads
    for section in ("schedule", "backbone", "head", "objective", "sampling"):
        found = {name: config[section][name] for name in read[section]}
        assert read[section] == found, section


def official(case: Case) -> dict[str, np.ndarray]:
    """A whole state_dict; buffers are zeros."""
    buffers = {t["key"]: np.zeros(t["shape"], t["dtype"]) for t in case.tensors("xar")}
    return buffers | case.state_dict("xar")


def converted(case: Case) -> tuple[Any, Any]:
    part = xar.generator(case.shapes("xar"), {})
    params = parity.load(case).params
    return part, {name: params[name] for name in ("backbone", "head")}


def test_a_file_comes_back_with_its_buffers(tiny, tmp_path):
    part, params = converted(tiny)
    path = tmp_path / "back.pth"
    weight_file.write(path, to_tensors(part, params))
    back = weight_file.read(path)
    wanted = official(tiny)
    assert back.keys() == wanted.keys()
    for key, tensor in tiny.state_dict("xar").items():
        np.testing.assert_array_equal(back[key], tensor, key)
    for tensor in tiny.tensors("xar"):
        assert back[tensor["key"]].shape == tuple(tensor["shape"]), tensor["key"]
        assert back[tensor["key"]].dtype == np.float32
    seen = (back["mask"][0, 0] == 0).reshape(4, 64, 4, 64)
    np.testing.assert_array_equal(seen.all((1, 3)), tiny["attn_mask_allowed"])
    assert np.isneginf(back["mask"]).sum() == 6 * 64 * 64
    rope = "encoder_blocks.0.attn.rope"
    np.testing.assert_allclose(back[f"{rope}.freqs_sin"], tiny["rope_sin"], atol=1e-6)
    np.testing.assert_allclose(back[f"{rope}.freqs"], 10_000 ** (-np.arange(4) / 4), rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "options", "words"),
    [
        ({}, {"heads": 4}, ["heads is 4", "rope.freqs_cos"]),
        ({"decoder_embed.weight": (48, 32)}, {}, ["decoder_embed.weight", "one condition"]),
        ({"encoder_pos_embed_learned": (1, 200, 32)}, {}, ["200 positions", "no square"]),
        ({"encoder_blocks.0.attn.rope.freqs_cos": None}, {}, ["no official size", "--heads=N"]),
    ],
)
def test_files_and_options_that_do_not_fit(tiny, changes, options, words):
    shapes = {**tiny.shapes("xar"), **changes}
    shapes = {key: shape for key, shape in shapes.items() if shape is not None}
    with pytest.raises(ValueError) as error:
        xar.generator(shapes, options)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_another_mask_is_another_model(tiny):
    part, generator = converted(tiny)
    tensors = official(tiny) | {"mask": np.ones((1, 1, 256, 256), np.float32)}
    with pytest.raises(ValueError, match="'mask' holds other numbers"):
        to_params(part, tensors, generator, "file")


def test_containers(tiny):
    tensors = tiny.state_dict("xar")
    raw = {key: np.zeros_like(tensor) for key, tensor in tensors.items()}
    assert xar.unwrap_generator(tensors) is tensors
    assert xar.unwrap_generator({"model": raw, "model_ema": tensors, "epoch": 1}) is tensors


def test_other_models_are_refused():
    config = load("configs/imagenet256/mar.py").get_config().to_dict()
    with pytest.raises(ValueError, match="backbone.name is 'encoder_decoder'"):
        xar.generator_part(config)


def test_the_case_shows_what_it_should(tiny):
    """Some labels are dropped and some kept; a cell's noise moves its own cell and later ones."""
    dropped = tiny["train_class_drop_uniform"] < tiny.spec["config"]["xar"]["label_drop_prob"]
    assert 0 < dropped.sum() < len(dropped)
    model = parity.load(tiny)
    times = jnp.asarray(tiny["train_t"].reshape(4, -1).T)
    codes = jnp.asarray(model.by_cell(model.codes).reshape(model.codes.shape))
    hidden, _ = model.ask("backbone", None, codes, model.cond, times)
    other, _ = model.ask("backbone", None, codes.at[:, 64].add(1.0), model.cond, times)
    moved = np.abs(np.asarray(other - hidden)).max(-1) > 0
    np.testing.assert_array_equal(moved.any(0), np.arange(256) >= 64)
