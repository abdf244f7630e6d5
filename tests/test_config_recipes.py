"""The recipes of configs/imagenet256: learning rates, weight decay and what it acts on."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from ar_jax.convert import ear, rar
from ar_jax.convert.part import empty_params, release_shapes
from ar_jax.train.fields import read_settings
from tests.config_files import Case, named, parameters

IMAGENET = "configs/imagenet256/"

# Iterations an epoch, epochs, first and highest learning rate, the last one, weight decay's end.
VAR_RECIPES = {
    "d16": (1669, 200, 1.5e-6, 3e-4, 3e-5, 0.05),
    "d20": (1669, 250, 1.5e-6, 3e-4, 3e-5, 0.05),
    "d24": (1669, 350, 1.2e-6, 2.4e-4, 2.4e-6, 0.05),
    "d30": (1252, 350, 1.6e-6, 3.2e-4, 3.2e-6, 0.08),
}


@pytest.mark.parametrize("size", VAR_RECIPES)
def test_var_recipe(size):
    case = Case(IMAGENET + "var.py", size)
    config, (iterations, epochs, *rates, decay) = case.config, VAR_RECIPES[size]
    images = 1_281_167
    assert iterations == -(-images // config.train.batch_size)
    steps, warmup = config.train.steps, epochs // 50 * iterations
    assert (steps, config.optimizer.warmup_steps) == (epochs * iterations, warmup)
    optimizer = read_settings(config).optimizer
    hold = warmup + int(0.049 * (steps - 1 - warmup))
    points = [optimizer.learning_rate(step) for step in (0, warmup, hold, steps - 1)]
    np.testing.assert_allclose(points, [rates[0], rates[1], rates[1], rates[2]], rtol=1e-6)
    assert float(optimizer.learning_rate(hold + steps // 100)) < 0.995 * rates[1]
    np.testing.assert_allclose(optimizer.weight_decay(0), 0.05, rtol=1e-6)
    np.testing.assert_allclose(optimizer.weight_decay(steps - 1), decay, rtol=1e-6)
    drop_path = {"d16": 0.066667, "d20": 0.083333, "d24": 0.1, "d30": 0.125}[size]
    assert config.backbone.drop_path == pytest.approx(drop_path, abs=1e-6)
    # As checked on the official models: these have weight decay, everything else has none.
    block = "backbone/stack/blocks"
    decayed = {f"{block}/attention/{name}/kernel" for name in ("query", "key", "value", "out")}
    decayed |= {f"{block}/mlp/{name}/kernel" for name in ("up", "down")}
    decayed |= {f"{block}/modulation/kernel", "backbone/final_modulation/kernel", "head/kernel"}
    decayed |= {"backbone/token_embed/kernel", "backbone/condition/class_embed/embedding"}
    tree = named(parameters(case))
    assert {name for name, leaf in tree.items() if optimizer.decays(name, leaf.shape)} == decayed


@pytest.mark.parametrize("size", ["b", "l", "xl", "xxl"])
def test_rar_recipe(size):
    config = Case(IMAGENET + "rar.py", size).config
    optimizer = read_settings(config).optimizer
    steps, warmup = config.train.steps, 62_500
    assert config.train.batch_size * steps == 512_000_000
    points = [optimizer.learning_rate(step) for step in (warmup // 2, warmup, steps - 1)]
    np.testing.assert_allclose(points, [2e-4, 4e-4, 1e-5], rtol=1e-5)
    assert float(optimizer.weight_decay(0)) == np.float32(0.03)
    # The official rule: tensors of two dimensions and more whose name has none of these in it.
    part = rar.generator_part(config.to_dict())
    tree = named(parameters(Case(IMAGENET + "rar.py", size)))
    spared = re.compile("ln|bias|latent_tokens|mask_token|embedding|norm|gamma|embed")
    for key, place in part.places.items():
        decays = not spared.search(key)
        for path in place.paths:
            assert optimizer.decays(path, tree[path].shape) == decays, (key, path)


@pytest.mark.parametrize("size", ["L", "L_maskgit", "XL"])
def test_randar_recipe(size):
    case = Case(IMAGENET + "randar.py", size)
    optimizer = read_settings(case.config).optimizer
    steps = case.config.train.steps
    points = [optimizer.learning_rate(step) for step in (25_000, 50_000, steps - 1)]
    np.testing.assert_allclose(points, [2e-4, 4e-4, 2e-5], rtol=1e-5)
    decayed_but_norms(case, optimizer)


@pytest.mark.parametrize("size", ["L", "XL", "XXL"])
def test_arpg_recipe(size):
    case = Case(IMAGENET + "arpg.py", size)
    optimizer = read_settings(case.config).optimizer
    steps, warmup = case.config.train.steps, 125_100
    assert steps == 400 * (1_281_167 // case.config.train.batch_size)
    points = [optimizer.learning_rate(step) for step in (warmup // 2, warmup, steps - 1)]
    np.testing.assert_allclose(points, [2e-4, 4e-4, 1e-5], rtol=1e-5)
    decayed_but_norms(case, optimizer)


def decayed_but_norms(case: Case, optimizer: Any) -> None:
    """Officially what has two dimensions: all but the norms' scales. The feed-forward's width."""
    tree = named(parameters(case))
    kept = {name for name, leaf in tree.items() if not optimizer.decays(name, leaf.shape)}
    assert kept == {name for name in tree if "norm" in name}
    assert float(optimizer.weight_decay(0)) == np.float32(0.05)
    # The official rounding: two thirds of four widths, up to a multiple of 256.
    width = case.config.backbone.width
    assert case.config.backbone.mlp_hidden == -(-int(8 * width / 3) // 256) * 256


LLAMAGEN = [("llamagen.py", size) for size in ("B", "L", "XL", "XXL", "3B")]
LLAMAGEN += [("par.py", size) for size in ("XL", "XXL", "3B", "3B_16x")]


@pytest.mark.parametrize(("file", "size"), LLAMAGEN)
def test_llamagen_recipe(file, size):
    case = Case(IMAGENET + file, size)
    config = case.config
    assert config.train.steps == 300 * (1_281_167 // config.train.batch_size)
    optimizer = read_settings(config).optimizer
    for step in (0, 1, config.train.steps - 1):
        assert float(optimizer.learning_rate(step)) == np.float32(1e-4)
        assert float(optimizer.weight_decay(step)) == np.float32(0.05)
    decayed_but_norms(case, optimizer)


@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_ear_recipe(size):
    """The head's matrices have a group of their own: no decay, a quarter of the rate."""
    case = Case(IMAGENET + "ear.py", size)
    config = case.config
    optimizer = read_settings(config).optimizer
    iterations = 1_281_167 // config.train.batch_size
    assert config.train.steps == 750 * iterations
    points = [optimizer.learning_rate(n * iterations) for n in (50, 100, 749)]
    np.testing.assert_allclose(points, [4e-4, 8e-4, 8e-4], rtol=1e-5)
    ((pattern, factor),) = config.optimizer.rate_factors
    assert factor == 0.25
    part = ear.generator_part(config.to_dict())
    tree = named(parameters(case))
    for key, shape in release_shapes(part, empty_params(config.to_dict(), "generator")).items():
        matrix, of_head = len(shape) > 1, key.startswith("scoreloss.")
        for path in part.places[key].paths:
            assert bool(re.search(pattern, path)) == (matrix and of_head), key
            assert optimizer.decays(path, tree[path].shape) == (matrix and not of_head), key
