"""EAR: every array that the official code recorded, the official sizes, the way back."""

from __future__ import annotations

import math
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert import ear
from ar_jax.convert.parity import ear as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes, to_params, to_tensors
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import sizes_of

GOLDEN = Path(__file__).parent / "golden" / "ear"
SAID = dict(decoder_heads=6, buffer=4)  # what the case's tensors do not say

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


@pytest.mark.slow  # half a minute
def test_parity(tiny):
    check(parity, tiny)


def test_the_head_by_itself(tiny):
    names = ("head_output_eval_temp0.7", "head_loss_masked_alpha1.5_tt0.99", "head_noise")
    check(parity, part_of(tiny, (*names, "head_z", "head_target", "head_loss_mask"), tiny.spec))


def test_the_case_shows_what_it_should(tiny):
    """A dropped label, codes to see, a temperature that changes samples but none in training."""
    dropped = tiny["train_class_drop_uniform"] < tiny.spec["config"]["ear"]["label_drop_prob"]
    assert 0 < dropped.sum() < len(dropped) and 0 < tiny["mask"].sum() < tiny["mask"].size
    warm, cold = (tiny[f"head_output_eval_temp{temperature}"] for temperature in ("1", "0.7"))
    assert np.abs(warm - cold).max() > 0.01
    np.testing.assert_array_equal(
        *(tiny[f"head_output_train_temp{temperature}"] for temperature in ("1", "0.7"))
    )


@pytest.mark.parametrize(
    "size", ["base", *(pytest.param(size, marks=pytest.mark.slow) for size in ("large", "huge"))]
)
def test_official_sizes(size):
    """The shapes of a config are the official classes', and are read as that config."""
    config = load("configs/imagenet256/ear.py").get_config(size).to_dict()
    part = ear.generator_part(config)
    shapes = release_shapes(part, empty_params(config, "generator"))
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == sizes_of("ear")[size].counts
    said = dict(guidance=3.0, temperature=0.7)
    read = ear.generator(shapes, said).section
    for section in ("schedule", "backbone", "head", "objective", "sampling"):
        found = {name: config[section][name] for name in read[section]}
        assert read[section] == found, section


def test_tensors_there_and_back(tiny):
    """Bit for bit."""
    tensors, part = tiny.state_dict("ear"), ear.generator(tiny.shapes("ear"), SAID)
    model = parity.load(tiny)
    trained = {name: model.params[name] for name in ("backbone", "head")}
    back = to_tensors(part, to_params(part, tensors, trained, "tiny"))
    assert back.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, key)
    assert ear.unwrap_generator({"model": {}, "model_ema": tensors}) is tensors


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buffer": 5}, "buffer is 5, which leaves 15 of the 20 rows"),
        ({"buffer": None}, "has 20 rows, and the tensors do not say how many are the buffer's"),
        ({"num_classes": 9}, r"num_classes is 9, but .*class_emb\.weight.* 10"),
        ({"noise_width": 9}, r"noise_width is 9, but .*noise_embed\.weight.* 16"),
        ({"decoder_heads": None}, r"do not say decoder_heads.*--option=decoder_heads=N"),
        ({"mlp_ratio": 3.0}, r"mlp_ratio is 3\.0, but for blocks of width 48 .* has 192 rows"),
    ],
)
def test_options_must_agree_with_the_shapes(tiny, changes, words):
    options = {name: value for name, value in (SAID | changes).items() if value is not None}
    with pytest.raises(ValueError, match=words):
        ear.generator(tiny.shapes("ear"), options)


def test_other_models_are_refused():
    config = load("configs/imagenet256/mar.py").get_config("base").to_dict()
    with pytest.raises(ValueError, match=r"depth 12 and head.name 'diffusion'; EAR's are"):
        ear.generator_part(config)


@pytest.mark.slow
def test_hidden_codes_have_no_influence(tiny):
    model = parity.load(tiny)
    known = jnp.asarray(tiny["mask"]) == 0
    other = model.codes + 100.0 * ~known[..., None]
    hidden = [
        model.ask("backbone", None, codes, model.cond, known) for codes in (model.codes, other)
    ]
    np.testing.assert_array_equal(*hidden)
