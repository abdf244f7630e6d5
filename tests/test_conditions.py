"""Conditions: tables without a null class, captions of another length than the prefix."""

from __future__ import annotations

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.backbones.conditions import ClassCondition, TextCondition
from ar_jax.build import build_objective
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import CLASSES, toy_config, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")

BATCH, FEATURES = 2, 6
RNG = np.random.default_rng(0)


def test_a_table_without_a_null_class():
    condition = ClassCondition(num_classes=CLASSES, width=4, init_std=1.0, null_class=False)
    cond = toy_labels(BATCH)
    shapes = jax.eval_shape(condition.init, jax.random.key(0), cond, None)["params"]
    assert shapes["class_embed"]["embedding"].shape == (CLASSES, 4)
    with pytest.raises(ValueError, match="backbone.null_class is False.*guidance scale of 1"):
        condition.null(cond)


def test_a_model_without_a_null_class_is_sampled_and_not_guided():
    system, params = toy_system("raster", backbone=dict(null_class=False, depth=1))
    sampler, cond = CachedSampler.create(system, params), toy_labels(BATCH)
    keys = image_keys(0, 0, BATCH)
    assert sampler.program(cond, keys)[0]().out_info.shape == (BATCH, 16)
    with pytest.raises(ValueError, match="backbone.null_class is False"):
        sampler(cond, keys, guidance=Guidance(scale=2.0))


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("raster", dict(null_class=False), ["objective.label_dropout is 0.1", "null_class"]),
        ("random", dict(null_class=False), ["backbone.null_class=False", "shared_embedding=True"]),
        (
            "raster",
            dict(condition="text", caption_length=3, caption_features=2, caption_null_rows=0),
            ["backbone.caption_null_rows is 0"],
        ),
    ],
)
def test_fields_that_do_not_go_together(name, fields, words):
    config = toy_config(name, backbone=toy_config(name)["backbone"] | fields)
    with pytest.raises(ValueError) as error:
        build_objective(config)
    for word in words:
        assert word in str(error.value), str(error.value)


def captions(rows: int) -> dict[str, jax.Array]:
    return {
        "caption": jnp.asarray(RNG.standard_normal((BATCH, rows, FEATURES)), jnp.float32),
        "caption_mask": jnp.asarray(RNG.random((BATCH, rows)) < 0.5),
        "dropped": jnp.asarray([True, False]),
    }


def text(**fields: Any) -> TextCondition:
    return TextCondition(
        features=FEATURES, width=4, init_std=1.0, dtype=jnp.float32, **({"length": 3} | fields)
    )


def test_longer_captions_and_null_rows_are_cut_to_the_prefix():
    """As the official code, which projects all 120 rows and keeps the first of them."""
    cond, condition = captions(5), text(null_rows=4)
    params = condition.init(jax.random.key(0), cond, None)
    assert params["params"]["null_caption"].shape == (4, FEATURES)
    prefix, mask = condition.apply(params, cond, None)
    np.testing.assert_array_equal(mask, cond["caption_mask"][:, :3])
    shorter = copy.deepcopy(params)
    shorter["params"]["null_caption"] = params["params"]["null_caption"][:3]
    first = cond | {name: cond[name][:, :3] for name in ("caption", "caption_mask")}
    np.testing.assert_array_equal(prefix, text().apply(shorter, first, None)[0])
    null, _ = condition.apply(params, condition.null(cond), None)
    np.testing.assert_array_equal(null[1], prefix[0])  # both of the learned features


def test_a_prefix_longer_than_the_null_rows_has_no_null_caption():
    condition = text(null_rows=2)
    cond = captions(3) | {"dropped": jnp.zeros(BATCH, bool)}
    params = condition.init(jax.random.key(0), cond, None)
    prefix, _ = condition.apply(params, cond, None)
    assert prefix.shape == (BATCH, 3, 4)
    with pytest.raises(ValueError, match="caption_null_rows is 2, fewer than caption_length 3"):
        condition.null(cond)
