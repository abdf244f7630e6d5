"""MAR: every array that the official code recorded, the released sizes, the way back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert import mar, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import export_directory, write_directory
from ar_jax.convert.parity import mar as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.masked_sets import guidance_of
from ar_jax.convert.part import empty_params, release_shapes
from ar_jax.evaluation.samples import sample_workdir
from tests.config_files import load
from tests.golden_lines import check, part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import sizes_of

GOLDEN = Path(__file__).parent / "golden" / "mar"

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module", params=sorted(path.parent.name for path in GOLDEN.glob("*/spec.json"))
)
def case(request) -> Case:
    return Case.load(GOLDEN / request.param)


@pytest.mark.slow
def test_parity(case):
    check(parity, case)


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


def test_tables_by_themselves(tiny):
    """More iterations than codes too, of which the last find nothing to do."""
    case = part_of(tiny, ("mask_len_L16_iter4", "timestep_map_8", "f64_betas_ddim8"), {})
    case.io["mask_len_L3_iter5"] = np.array([2, 1, 1, 1, 1])
    check(parity, case)


def test_schedules_of_guidance_that_are_none(tiny):
    sampler = tiny.spec["config"]["samplers"][0]
    for kind, ours in (("linear", "linear_known"), ("constant", "constant")):
        assert guidance_of("", sampler | {"cfg_schedule": kind}).kind == ours
    with pytest.raises(ValueError, match="of the sampler 'sa' is 'cosine'.*linear and constant"):
        guidance_of("", sampler | {"cfg_schedule": "cosine"})


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory) -> dict[str, Path]:
    """As they are released: with discriminators and raw weights that nobody reads."""
    folder = tmp_path_factory.mktemp("mar")
    paths = {"vae": folder / "kl16.ckpt", "mar": folder / "checkpoint-last.pth"}
    logvar = {"loss.logvar": np.zeros((), np.float32)}
    weight_file.write(paths["vae"], {"model": tiny.state_dict("vae") | logvar})
    ema = tiny.state_dict("mar")
    raw = {key: np.zeros_like(tensor) for key, tensor in ema.items()}
    weight_file.write(paths["mar"], {"model": raw, "model_ema": ema, "epoch": 7})
    return paths


def options(case: Case) -> dict[str, Any]:
    net = case.spec["config"]["mar"]
    heads = dict(heads=net["encoder_num_heads"], decoder_heads=net["decoder_num_heads"])
    return heads | dict(image_size=32, iterations=4, sampling_steps="ddim4", scale=0.5)


@pytest.mark.slow
def test_files_to_a_directory_that_samples_and_back(tiny, files, tmp_path):
    converted = convert_files(mar, files["vae"], files["mar"], options(tiny))
    write_directory(converted, tmp_path / "ours")
    drawn = sample_workdir(
        tmp_path / "ours",
        tmp_path / "samples.png",
        labels=[3, 1],
        sampling={"guidance.scale": 2.0},
        batch_size=2,
        progress=False,
    )
    assert drawn.images.shape == (2, 32, 32, 3)
    assert drawn.codes.shape == (2, 16, 4) and np.isfinite(drawn.codes).all()
    assert drawn.order is not None
    np.testing.assert_array_equal(np.sort(drawn.order, axis=1), [np.arange(16)] * 2)
    outs = {"mar": tmp_path / "back.pth", "vae": tmp_path / "back.safetensors"}
    export_directory(mar, tmp_path / "ours", list(outs.values()))
    for name, path in outs.items():
        found, wanted = weight_file.read(path), tiny.state_dict(name)
        found = found.get("model_ema", found)  # in a file of torch
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert found[key].dtype == tensor.dtype
            np.testing.assert_array_equal(found[key], tensor, key)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_released_generators(size):
    """The official shapes of a config are the release's, and are read as that config."""
    config = load("configs/imagenet256/mar.py").get_config(size).to_dict()
    part = mar.generator_part(config)
    shapes = release_shapes(part, empty_params(config, "generator"))
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == sizes_of("mar")[size].counts
    width = config["backbone"]["width"]
    assert shapes["fake_latent"] == (1, width)
    assert shapes["encoder_pos_embed_learned"] == (1, 320, width)
    assert shapes["mask_token"] == (1, 1, width)
    assert shapes["diffloss.net.final_layer.linear.weight"] == (32, config["head"]["width"])
    read = mar.generator(shapes, {"iterations": 256, "guidance": mar_guidance(config)}).section
    for section in ("schedule", "backbone", "head", "objective", "sampling"):
        found = {name: config[section][name] for name in read[section]}
        assert read[section] == found, section


def mar_guidance(config: dict[str, Any]) -> float:
    return config["sampling"]["guidance"]["scale"]


@pytest.mark.parametrize(
    ("inner", "options", "ratio"),
    [
        ((128, 192), {}, 4.0),
        ((128, 192), {"mlp_ratio": 4.01}, 4.01),
        ((85, 128), {}, 2.67),  # of 8 / 3
        ((85, 128), {"mlp_ratio": 8 / 3}, 8 / 3),
    ],
)
def test_the_feed_forward_ratio_is_cut_as_officially(inner, options, ratio):
    """int(width * ratio), in the converter and in the module that it builds."""
    keys = (f"{side}_blocks.0.mlp.fc1.weight" for side in ("encoder", "decoder"))
    shapes = {key: (rows, 1) for key, rows in zip(keys, inner, strict=True)}
    assert mar._mlp_ratio(shapes, (32, 48), options) == ratio


def test_a_feed_forward_ratio_that_does_not_fit():
    keys = [f"{side}_blocks.0.mlp.fc1.weight" for side in ("encoder", "decoder")]
    shapes = {keys[0]: (128, 32), keys[1]: (192, 48)}
    with pytest.raises(ValueError, match=r"mlp_ratio is 2\.0, but .* 'encoder_blocks.* has 128"):
        mar._mlp_ratio(shapes, (32, 48), {"mlp_ratio": 2.0})
    with pytest.raises(ValueError, match="one ratio is for all feed-forward layers"):
        mar._mlp_ratio(shapes | {keys[1]: (96, 48)}, (32, 48), {})
    # 100 * 0.57 is a little less than 57: the official layer has 56, and so has ours.
    few = {keys[0]: (56, 100), keys[1]: (56, 100)}
    assert mar._mlp_ratio(few, (100, 100), {"mlp_ratio": 0.57}) == 0.57


def test_released_tokenizer():
    config = load("configs/imagenet256/tokenizer_kl.py").get_config().to_dict()
    part = mar.tokenizer_part(config)
    shapes = release_shapes(part, empty_params(config, "tokenizer"))
    assert (sum(map(math.prod, shapes.values())), len(shapes)) == sizes_of("mar")["KL-16"].counts
    read = mar.tokenizer(shapes, {}).section
    autoencoder = config["tokenizer"].pop("autoencoder")
    assert read["tokenizer"].pop("autoencoder") == autoencoder
    assert read["tokenizer"] == config["tokenizer"]
    said = read["objective"]
    assert said == {name: config["objective"][name] for name in said}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buffer": 5}, ["buffer is 5", "encoder_pos_embed_learned", "4"]),
        ({"num_classes": 9}, ["num_classes is 9", "class_emb.weight", "10"]),
        ({"heads": 5}, ["backbone.width 32", "backbone.heads 5"]),
    ],
)
def test_options_must_agree_with_the_files(tiny, files, changes, words):
    with pytest.raises(ValueError) as error:
        convert_files(mar, files["vae"], files["mar"], options(tiny) | changes)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_other_models_are_refused():
    config = load("configs/imagenet256/llamagen.py").get_config().to_dict()
    with pytest.raises(ValueError, match="backbone.name is 'decoder'"):
        mar.generator_part(config)
    with pytest.raises(ValueError, match="tokenizer.name is 'vq'"):
        mar.tokenizer_part(config)


def test_the_case_shows_what_it_should(tiny):
    """Some labels are dropped and some kept; a mask leaves codes to see."""
    dropped = tiny["train_class_drop_uniform"] < tiny.spec["config"]["mar"]["label_drop_prob"]
    assert 0 < dropped.sum() < len(dropped)
    assert 0 < tiny["mask"].sum() < tiny["mask"].size
    model = parity.load(tiny)
    known = jnp.asarray(tiny["mask"]) == 0
    other = model.codes + 100.0 * ~known[..., None]  # codes that are not known have no influence
    hidden = [
        model.ask("backbone", None, codes, model.cond, known) for codes in (model.codes, other)
    ]
    np.testing.assert_array_equal(*map(jax.device_get, hidden))
