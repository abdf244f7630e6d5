"""Discriminators: sizes, what they normalise over, pooling and blurring."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nn.discriminators import (
    BatchNorm,
    PatchDiscriminator,
    PooledDiscriminator,
    StyleDiscriminator,
    adaptive_max_pool,
    blur,
)
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")


def logits_shape(module, *image_shape: int) -> tuple[int, ...]:
    images = jnp.zeros((2, *image_shape))
    logits, _ = jax.eval_shape(module.init_with_output, jax.random.key(0), images)
    assert logits.dtype == jnp.float32
    return logits.shape


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
def test_patchgan_takes_all_images_from_its_least_size_on(layers):
    module = PatchDiscriminator(channels=4, layers=layers)
    least = module.least_size
    assert logits_shape(module, least, least, 1) == (2, 1, 1, 1)
    assert module.problem((least, least, 1)) is None
    assert logits_shape(module, least - 1, least, 1)[1] == 0
    problem = module.problem((least, least - 1, 1)) or ""
    assert problem.startswith(f"layers is {layers}") and f"{least} pixels" in problem


def test_shapes_of_logits():
    half = dict(dtype=jnp.bfloat16)
    assert logits_shape(PatchDiscriminator(channels=4, **half), 256, 256, 3) == (2, 30, 30, 1)
    assert logits_shape(PatchDiscriminator(channels=4, layers=2), 28, 40, 1) == (2, 5, 8, 1)
    for shape in ((28, 28, 1), (32, 48, 3), (5, 4, 2)):
        assert logits_shape(StyleDiscriminator(width=8, **half), *shape) == (2, 1)
        pooled = PooledDiscriminator(channels=8, groups=4, **half)
        assert logits_shape(pooled, *shape) == (2, 16, 16, 1)


def test_stylegan_s_widths_are_the_official_ones():
    params = jax.eval_shape(
        lambda key: StyleDiscriminator().init(key, jnp.zeros((1, 1024, 1024, 3))),
        jax.random.key(0),
    )["params"]
    widths = [params["conv_in"]["bias"].shape[0]]
    widths += [params[f"block{i}"]["down"]["bias"].shape[0] for i in range(8)]
    assert widths == [16, 32, 64, 128, 256, 512, 512, 512, 512]


def test_batch_norm_is_over_the_whole_batch_and_moves_the_running_statistics():
    x = np.random.default_rng(0).normal(1.5, 2.0, (4, 3, 5, 2)).astype(np.float32)
    norm = BatchNorm(momentum=0.8)
    variables = norm.init(jax.random.key(0), x, True)
    assert not np.any(variables["batch_stats"]["mean"])
    y, after = norm.apply(variables, x, True, mutable=["batch_stats"])
    flat = x.reshape(-1, 2).astype(np.float64)
    scale = np.asarray(variables["params"]["scale"])
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + 1e-5) * scale
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    stats = after["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.2 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.8 + 0.2 * flat.var(0, ddof=1), rtol=1e-5)
    still: Any = norm.apply({"params": variables["params"], "batch_stats": stats}, x, False)
    mean, var = (np.asarray(stats[name]) for name in ("mean", "var"))
    expected = (x - mean) / np.sqrt(var + 1e-5) * scale
    np.testing.assert_allclose(still, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size", [3, 7, 16])
@pytest.mark.parametrize("rows", [5, 16, 24])
def test_adaptive_pooling_takes_the_maxima_of_overlapping_cells(rows, size):
    x = np.random.default_rng(1).normal(size=(2, rows, 8, 3)).astype(np.float32)
    pooled = np.asarray(adaptive_max_pool(jnp.asarray(x), size))
    for i in range(size):
        for j in range(size):
            top, bottom = i * rows // size, -(-(i + 1) * rows // size)
            left, right = j * 8 // size, -(-(j + 1) * 8 // size)
            cell = x[:, top:bottom, left:right].max((1, 2))
            np.testing.assert_array_equal(pooled[:, i, j], cell)


def test_blur_keeps_constants_and_channels_apart():
    x = np.stack([np.full((6, 6), 2.0), np.eye(6)], -1)[None].astype(np.float32)
    y = np.asarray(blur(jnp.asarray(x), (1, 2, 1), stride=1, padding="VALID"))[0]
    np.testing.assert_allclose(y[..., 0], 2.0, rtol=1e-6)
    np.testing.assert_allclose(np.diag(y[..., 1]), 6 / 16, rtol=1e-6)
    assert blur(jnp.asarray(x), (1, 3, 3, 1), stride=2, padding="SAME").shape == (1, 3, 3, 2)
