"""FLOPs of matrix products and convolutions, counted from jaxprs."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.compilation.ahead import batch_shapes, frozen_params
from ar_jax.compilation.estimate import model_flops
from ar_jax.compilation.products import count_products
from ar_jax.nn.splash import attend_all, visible_rows
from tests.smoke_runs import smoke_config

X, W = jnp.ones((4, 8)), jnp.ones((8, 3))
PRODUCT = 2 * 4 * 8 * 3


def convolve(size: int, window: int, **options):
    """FLOPs of a convolution of 2 images [size, size, 6] with 4 kernels."""
    fields = {"window_strides": (1, 1), "padding": "SAME"} | options
    image = jnp.ones((2, size, size, 6))
    kernel = jnp.ones((window, window, 6 // fields.get("feature_group_count", 1), 4))

    def run(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(image, kernel, dimension_numbers=numbers, **fields)

    return count_products(run, image, kernel)


def test_products_of_matrices():
    assert count_products(jnp.dot, X, W) == PRODUCT
    batched = count_products(
        lambda q, k: jnp.einsum("bqhk,bthk->bhqt", q, k), *2 * [jnp.ones((2, 5, 3, 7))]
    )
    assert batched == 2 * 2 * 3 * 5 * 5 * 7
    assert count_products(lambda x: jnp.sin(x).sum(), X) == 0


def test_convolutions_count_neither_padding_nor_gaps():
    # Of 6 places 4 have three taps each, the two at the rim two.
    assert convolve(6, 3) == 2 * 2 * 6 * 4 * (4 * 3 + 2 * 2) ** 2
    assert convolve(6, 3, padding="VALID") == 2 * 2 * 6 * 4 * (4 * 3) ** 2
    assert convolve(6, 3, window_strides=(2, 2), padding=((1, 0), (1, 0))) == 2 * 2 * 6 * 4 * 8**2
    assert convolve(6, 1, window_strides=(2, 3)) == 2 * 2 * 6 * 4 * 3 * 2
    assert convolve(6, 3, feature_group_count=2) == convolve(6, 3) / 2
    # Five places between zeros: every place of the kernel meets each of them once.
    options = {"lhs_dilation": (2, 2), "padding": ((2, 2), (2, 2))}
    assert convolve(5, 3, **options) == 2 * 2 * 6 * 4 * (5 * 3) ** 2


def test_what_is_around_products():
    square = jnp.ones((8, 8))

    @jax.checkpoint
    def turn(x, _):
        return jax.nn.silu(jax.nn.relu(x @ square)), None

    def run(x, w):
        x, _ = jax.lax.scan(turn, x, None, length=5)
        x = jax.lax.fori_loop(0, 3, lambda _, x: turn(x, None)[0], x)
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w[:, :1] + 0 * x[:, :3])

    expected = (5 + 3) * 2 * 4 * 8 * 8 + PRODUCT
    assert count_products(jax.jit(run), X, W) == expected
    assert count_products(jax.jit(run), *jax.eval_shape(lambda: (X, W))) == expected


def test_of_forms_for_platforms_the_default_counts():
    def run(a, b):
        return jax.lax.platform_dependent(
            a, b, tpu=lambda a, b: (jnp.concatenate([a, a]) @ b)[:3], default=lambda a, b: a @ b
        )

    assert count_products(run, jnp.ones((3, 4)), jnp.ones((4, 5))) == 2 * 3 * 4 * 5


def test_what_cannot_be_counted_is_refused():
    square = jnp.ones((8, 8))

    def until(x):
        return jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ square, x)

    with pytest.raises(ValueError, match="products inside while cannot be counted"):
        count_products(until, X)
    counting = jax.lax.while_loop
    assert count_products(lambda x: counting(lambda x: x < 9, lambda x: x + 1, x), 1.0) == 0
    rows = jnp.ones((1, 128, 1, 8))

    def attend(x):
        return attend_all(x, x, x, steps=(0,) * 128, real=None, scale=1.0, kernel="splash")

    with pytest.raises(ValueError, match="products inside pallas_call cannot be counted"):
        count_products(attend, rows)


def test_the_formula_agrees_but_for_hidden_pairs():
    """What `model_flops` says of a decoder, from its weights, is what its loss multiplies."""
    config = ml_collections.ConfigDict(smoke_config("llamagen").to_dict())
    config.attention = "xla"
    objective: Any = build_objective(config)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, frozen = jax.eval_shape(objective.init, key), frozen_params(objective)

    def loss(*arguments):
        return objective.loss(*arguments, True)[0]

    batch = batch_shapes(objective, 3, "codes")
    counted = count_products(loss, params, {}, frozen, batch, key)
    system = objective.system
    backbone = system.backbone
    hidden = np.count_nonzero(~visible_rows(backbone.row_steps))
    pairs = 4 * 3 * backbone.depth * backbone.width * hidden
    assert counted == model_flops(params, system, 3, passes=1) + pairs
