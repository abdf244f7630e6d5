"""Bad configs: an error when the system is built, with the field, its value and what is right."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import pytest

from ar_jax.api import System
from ar_jax.build import (
    build_objective,
    build_sampling,
    build_schedule,
    build_system,
    check_trained_tokenizer,
)
from ar_jax.objectives.likelihood import Likelihood, init_tokenizer
from ar_jax.objectives.tokenizer import TokenizerObjective
from tests.toy_systems import AUTOENCODER, toy_config


def changed(name: str, path: str, value: Any) -> dict[str, Any]:
    """The config with one field set (or, for value `KeyError`, deleted)."""
    config = copy.deepcopy(toy_config(name))
    config["sampling"] = dict(temperature=1.0, guidance=dict(scale=1.0))
    *folders, field = path.split(".")
    section = config
    for folder in folders:
        section = section[folder]
    if value is KeyError:
        del section[field]
    else:
        section[field] = value
    return config


def build_all(config: Any) -> None:
    build_objective(config)
    build_sampling(config)


@pytest.mark.parametrize("name", ["next_scale", "raster"])
def test_sound_configs_build(name):
    config = ml_collections.ConfigDict(changed(name, "sampling.temperature", 0.5))
    objective = build_objective(config)
    assert isinstance(objective, Likelihood)
    assert isinstance(objective.system, System)
    assert build_schedule(config) == objective.system.schedule
    hash(objective.system)  # a static argument of jitted code
    config.objective = dict(name="tokenizer")
    assert isinstance(build_objective(config), TokenizerObjective)
    knobs, guidance = build_sampling(config)
    assert (knobs.temperature, guidance.scale) == (0.5, 1.0)


# (system, field, value, words of the message)
CASES: list[tuple[str, str, Any, list[str]]] = [
    # A misspelt key in every section: the key, its value, and the keys there are.
    ("raster", "tokenizer.codebok_size", 8, ["tokenizer.codebok_size", "8", "'codebook_size'"]),
    (
        "raster",
        "tokenizer.autoencoder.chanels",
        4,
        ["tokenizer.autoencoder.chanels", "4", "'channels'"],
    ),
    ("next_scale", "tokenizer.phi", 2, ["tokenizer.phi", "2", "'phis'"]),
    ("raster", "schedule.grids", 4, ["schedule.grids", "4", "'grid'"]),
    ("next_scale", "schedule.scale", (1,), ["schedule.scale", "(1,)", "'scales'"]),
    ("raster", "backbone.with", 16, ["backbone.with", "16", "'width'"]),
    ("raster", "head.vocab", 8, ["head.vocab", "8", "'vocab_size'"]),
    ("raster", "objective.label_drop", 0.1, ["objective.label_drop", "0.1", "'label_dropout'"]),
    ("raster", "sampling.topk", 5, ["sampling.topk", "5", "'top_k'"]),
    (
        "raster",
        "sampling.guidance.weight",
        2.0,
        ["sampling.guidance.weight", "2.0", "'scale'"],
    ),
    (
        "raster",
        "objective.self_correction",
        0.5,
        ["objective.self_correction", "0.5", "'multiscale_vq'"],
    ),
    # Fields that a config may not set, because something else decides them.
    ("raster", "tokenizer.grid", (4, 4), ["tokenizer.grid", "(4, 4)"]),
    ("raster", "backbone.parent", None, ["backbone.parent"]),
    # A missing one.
    ("raster", "backbone.width", KeyError, ["backbone.width", "missing"]),
    ("next_scale", "tokenizer.scales", KeyError, ["tokenizer.scales", "missing"]),
    ("raster", "schedule.grid", KeyError, ["schedule.grid", "missing"]),
    ("raster", "tokenizer.autoencoder.latent", KeyError, ["autoencoder.latent", "missing"]),
    ("raster", "tokenizer.autoencoder", KeyError, ["tokenizer.autoencoder", "missing"]),
    # Wrong choices.
    ("raster", "tokenizer.name", "vqgan", ["tokenizer.name", "'vqgan'", "'vq'", "multiscale_vq"]),
    ("raster", "schedule.name", "snake", ["schedule.name", "'snake'", "'raster'"]),
    ("raster", "backbone.name", "encoder", ["backbone.name", "'encoder'", "'decoder'"]),
    ("raster", "head.name", "gmm", ["head.name", "'gmm'", "'categorical'"]),
    ("raster", "objective.name", "mle", ["objective.name", "'mle'", "'likelihood'"]),
    ("raster", "objective.name", KeyError, ["objective.name", "None", "'likelihood'"]),
    ("raster", "dtype", "float16", ["dtype", "'float16'", "'bfloat16'"]),
    ("raster", "backbone.norm", "batchnorm", ["backbone.norm", "'batchnorm'", "'rmsnorm'"]),
    ("raster", "backbone.positions", "sine", ["backbone.positions", "'sine'", "'rope'"]),
    ("raster", "backbone.activation", "swish", ["backbone.activation", "'swish'", "'silu'"]),
    ("raster", "backbone.remat", "all", ["backbone.remat", "'all'", "'block'"]),
    ("raster", "backbone.modulation", "film", ["backbone.modulation", "'film'", "'shared'"]),
    ("raster", "backbone.condition", "image", ["backbone.condition", "'image'", "'class'"]),
    (
        "raster",
        "tokenizer.codebook_update",
        "kmeans",
        ["tokenizer.codebook_update", "'kmeans'", "'ema'"],
    ),
    ("raster", "sampling.guidance.kind", "cos", ["guidance.kind", "'cos'", "'power_cosine'"]),
    ("raster", "sampling.temperature", -1.0, ["sampling.temperature", "-1.0", ">= 0"]),
    # Sizes that do not fit each other.
    (
        "next_scale",
        "tokenizer.scales",
        (1, 2, 3),
        ["tokenizer.scales", "(3, 3)", "image_size 8", "(4, 4)"],
    ),
    ("next_scale", "tokenizer.scales", 4, ["scales", "4", "list"]),
    ("next_scale", "tokenizer.scales", (1, 0, 4), ["scales", "0", "positive"]),
    (
        "next_scale",
        "schedule.scales",
        (1, 4),
        ["schedule", "((1, 1), (4, 4))", "((1, 1), (2, 2), (4, 4))"],
    ),
    ("raster", "schedule.grid", 5, ["schedule", "((5, 5),)", "((4, 4),)"]),
    (
        "next_scale",
        "schedule",
        dict(name="raster", grid=4),
        ["schedule", "((4, 4),)", "((1, 1), (2, 2), (4, 4))"],
    ),
    ("raster", "backbone.vocab_size", 9, ["backbone.vocab_size", "9", "codebook_size", "8"]),
    ("raster", "head.vocab_size", 7, ["head.vocab_size", "7", "codebook_size", "8"]),
    ("next_scale", "head.vocab_size", 16, ["head.vocab_size", "16", "codebook_size", "8"]),
    ("next_scale", "backbone.feature_width", 5, ["backbone.feature_width", "5", "code_width", "4"]),
    ("next_scale", "backbone.context", "codes", ["backbone.context", "'codes'", "'features'"]),
    ("raster", "backbone.context", "features", ["backbone.context", "'features'", "'codes'"]),
    ("raster", "backbone.heads", 3, ["backbone.width", "16", "backbone.heads", "3"]),
    ("raster", "backbone.num_classes", 0, ["backbone.num_classes", "0", "positive"]),
    (
        "raster",
        "tokenizer.autoencoder.image_size",
        9,
        ["tokenizer.autoencoder.image_size", "9", "multiple", "2"],
    ),
    ("random", "backbone.positions", "rope", ["backbone.positions", "'rope'", "target_aware"]),
    (
        "next_scale",
        "backbone.positions",
        "target_aware",
        ["backbone.positions", "codes of one grid", "(1, 4, 16)"],
    ),
    ("random", "schedule.anneal", (7, 6), ["schedule.anneal", "(7, 6)", "start <= end"]),
    ("random", "backbone.condition", "text", ["backbone.shared_embedding", "'text'"]),
    ("random", "backbone.modulation", "none", ["backbone.step_embedding", "'none'", "'own'"]),
    ("raster", "tokenizer.autoencoder.name", "unet", ["autoencoder.name", "'unet'", "'pooled'"]),
    (
        "raster",
        "tokenizer.autoencoder",
        dict(name="pooled", image_size=9, image_channels=1, code_width=4, channels=4)
        | dict(multipliers=(1, 2), groups=2),
        ["tokenizer.autoencoder.image_size", "9", "multiple", "2"],
    ),
    (
        "raster",
        "tokenizer.autoencoder.decoder_multipliers",
        (1,),
        ["autoencoder.decoder_multipliers", "(1,)", "(1, 2)"],
    ),
    (
        "raster",
        "objective",
        dict(name="tokenizer", entropy=0.1),
        ["objective.entropy", "0.1", "tokenizer.entropy=True"],
    ),
    (
        "raster",
        "objective",
        dict(name="tokenizer", kmeans_vectors=7),
        ["objective.kmeans_vectors", "7", "8 centres", "tokenizer.codebook_size"],
    ),
]

# (tokenizer's fields, objective's, words of the message) of quantisers without a codebook.
WITHOUT_CODEBOOK: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    (
        dict(name="fsq", levels=(5, 5)),
        {},
        ["tokenizer.levels", "2 numbers", "code_width is 4"],
    ),
    (dict(name="fsq", levels=(5, 5, 1, 5)), {}, ["tokenizer.levels", "(5, 5, 1, 5)", "2 levels"]),
    (dict(name="fsq", levels=(99,) * 4), {}, ["tokenizer.levels", "96059601 codes", "2^24"]),
    (dict(name="fsq", levels=(5,) * 4, entropy=True), {}, ["tokenizer.entropy", "'levels'"]),
    (
        dict(name="fsq", levels=(5,) * 4),
        dict(commitment=0.25),
        ["objective.commitment", "0.25", "'fsq'", "[]"],
    ),
    (dict(name="lfq"), dict(codebook=1.0), ["objective.codebook", "1.0", "'commitment'"]),
    (dict(name="bsq"), dict(restart_below=0.1), ["objective.restart_below", "0.1", "no codebook"]),
    (dict(name="bsq"), dict(entropy=0.1), ["objective.entropy", "0.1", "tokenizer.entropy=True"]),
    (dict(name="lfq", entropy_group=3), {}, ["tokenizer.entropy_group is 3", "code_width 4"]),
    (
        dict(name="bsq", autoencoder=AUTOENCODER | dict(projection=0, latent=8)),
        {},
        ["tokenizer.autoencoder.latent is 8", "code_width 4", "projection=0"],
    ),
    (
        dict(name="lfq", autoencoder=AUTOENCODER | dict(code_width=25)),
        {},
        ["tokenizer.autoencoder.code_width is 25", "2^24", "'multiscale_bitwise'"],
    ),
    (dict(name="lfq", temperature=0.0), {}, ["tokenizer.temperature", "0.0", "positive"]),
    (
        dict(name="multiscale_bitwise", scales=(1, 2)),
        {},
        ["tokenizer.scales", "(2, 2)", "(4, 4)"],
    ),
]


@pytest.mark.parametrize(("tokenizer", "objective", "words"), WITHOUT_CODEBOOK)
def test_quantisers_without_a_codebook(tokenizer, objective, words):
    config = toy_config("raster")
    config["tokenizer"] = {"autoencoder": AUTOENCODER} | tokenizer
    config["objective"] = dict(name="tokenizer", **objective)
    with pytest.raises(ValueError) as error:
        build_objective(config)
    for word in words:
        assert word in str(error.value), str(error.value)


def test_kmeans_replace_no_codebook_that_a_run_starts_from():
    config = toy_config("raster", objective=dict(name="tokenizer", kmeans_vectors=50))
    config["init_from"] = dict(workdir="")
    build_objective(config)
    config["init_from"] = dict(workdir="runs/other")
    with pytest.raises(ValueError, match=r"kmeans_vectors is 50, but init_from.workdir='runs/oth"):
        build_objective(config)


def test_codes_of_bits_have_no_categorical_head():
    config = toy_config("next_scale")
    fields = dict(name="multiscale_bitwise", scales=(1, 2, 4))
    config["tokenizer"] = fields | {"autoencoder": config["tokenizer"]["autoencoder"]}
    with pytest.raises(ValueError, match=r"head.name is 'categorical'.*codes of 4 bits"):
        build_system(config)


@pytest.mark.parametrize("name", ["bsq", "fsq"])
def test_numbers_of_implicit_codebooks_go_with_categorical_heads(name):
    config = toy_config("raster", vocab_size=16)
    fields = dict(name=name) | (dict(levels=(2, 2, 2, 2)) if name == "fsq" else {})
    config["tokenizer"] = fields | {"autoencoder": config["tokenizer"]["autoencoder"]}
    objective: Any = build_objective(config)
    assert objective.system.tokenizer.codebook_size == 16
    batch = {"image": jnp.zeros((2, 8, 8, 1), jnp.uint8), "label": jnp.zeros(2, jnp.int32)}

    def loss(key: jax.Array) -> Any:
        frozen = {"tokenizer": init_tokenizer(objective.system, key)}
        return objective.loss(objective.init(key), {}, frozen, batch, key, True)[0]

    assert jax.eval_shape(loss, jax.random.key(0)).shape == ()
    config["head"]["vocab_size"] = 15
    with pytest.raises(ValueError, match=r"head.vocab_size is 15.*codebook_size is 16"):
        build_system(config)


@pytest.mark.parametrize(
    ("name", "path", "value", "words"), CASES, ids=[f"{c[1]}={c[2]}"[:50] for c in CASES]
)
def test_errors(name, path, value, words):
    with pytest.raises(ValueError) as error:
        build_all(changed(name, path, value))
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            dict(backbone=dict(condition="text", caption_length=3, caption_features=2)),
            ["positions", "caption", "'rope'"],
        ),
        (
            dict(
                tokenizer=dict(scales=(2, 4)),
                schedule=dict(scales=(2, 4)),
                backbone=dict(positions="rope"),
            ),
            ["backbone.positions", "'rope'", "4 codes", "'learned'"],
        ),
    ],
)
def test_positions_that_cannot_tell_rows_apart(changes, words):
    with pytest.raises(ValueError) as error:
        build_system(toy_config("next_scale", **changes))
    for word in words:
        assert word in str(error.value), str(error.value)


def test_a_trained_tokenizer_must_be_the_configured_one():
    config = ml_collections.ConfigDict(toy_config("next_scale"))
    check_trained_tokenizer(config, toy_config("next_scale")["tokenizer"])
    other = toy_config("next_scale", autoencoder=dict(channels=6))["tokenizer"]
    with pytest.raises(ValueError, match="tokenizer.autoencoder.channels is 4.*has 6"):
        check_trained_tokenizer(config, other)
    more = toy_config("next_scale", tokenizer=dict(phis=1))["tokenizer"]
    with pytest.raises(ValueError, match="tokenizer.phis"):
        check_trained_tokenizer(config, more)
    # What is left out has its default: the same tokenizer.
    check_trained_tokenizer(config, toy_config("next_scale", tokenizer=dict(phis=4))["tokenizer"])
