"""Attention, norms, feed-forward, stochastic depth and rotary positions."""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.nn.attention import (
    SUBLANES,
    attend,
    attend_cache,
    filled_products,
    plain_products,
    visibility,
    write,
)
from ar_jax.nn.conv import fold, unfold
from ar_jax.nn.layers import MLP, RMSNorm, activate, drop_path, layer_norm, unit
from ar_jax.nn.positions import rope_2d, rotate, rotate_by_product, rotate_pairs
from tests.modules import apply, init

RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def test_attention_is_a_masked_mean():
    q, k, v = normal(2, 3, 2, 4), normal(2, 5, 2, 4), normal(2, 5, 2, 4)
    mask = visibility(jnp.array([0, 1, 1]), jnp.array([0, 0, 1, 1, 2]))
    expected_mask = [[1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(mask, np.array(expected_mask, bool))
    out = attend(*map(jnp.asarray, (q, k, v)), mask=mask[None, None], scale=0.7)
    for b, i, h in np.ndindex(2, 3, 2):
        seen = np.flatnonzero(expected_mask[i])
        weights = np.exp(0.7 * k[b, seen, h] @ q[b, i, h])
        expected = weights @ v[b, seen, h] / weights.sum()
        np.testing.assert_allclose(out[b, i, h], expected, rtol=1e-5, atol=1e-6)


def test_attention_keeps_float32_logits_for_bfloat16_inputs():
    """Logits of 256 and 257 differ by less than a bfloat16 step of that size."""
    q = jnp.ones((1, 1, 1, 1), jnp.bfloat16)
    k = jnp.asarray([[[[128.0]], [[128.0]]]], jnp.bfloat16)
    q2 = jnp.concatenate([q, q], -1)
    k2 = jnp.concatenate([k, jnp.asarray([[[[128.0]], [[129.0]]]], jnp.bfloat16)], -1)
    v = jnp.asarray([[[[0.0]], [[1.0]]]], jnp.bfloat16)
    out = attend(q2, k2, v, mask=None, scale=1.0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(float(out[0, 0, 0, 0]), 1 / (1 + math.exp(-1)), rtol=4e-3)


def test_attention_to_a_cache_is_that_to_its_rows():
    """Two heads of keys for four of queries, written in two parts, one row hidden."""
    q, k, v = (jnp.asarray(normal(2, n, h, 6)) for n, h in ((3, 4), (5, 2), (5, 2)))
    mask = jnp.asarray(RNG.random((2, 1, 3, 5)) > 0.3).at[..., 0].set(True)
    cached = []
    for rows in (k, v):
        empty = jnp.zeros((2, 2, 7, 6))
        cached.append(write(write(empty, rows[:, :2], 0), rows[:, 2:], 2)[:, :, :5])
    out = attend_cache(q, *cached, mask=mask, scale=0.7)
    wide = (rows.repeat(2, axis=2) for rows in (k, v))
    np.testing.assert_allclose(out, attend(q, *wide, mask=mask, scale=0.7), rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(out - attend_cache(q, *cached, mask=None, scale=0.7)).max()) > 0.01


@pytest.mark.parametrize("over", [2, 3])
def test_few_rows_are_filled_up_on_tpus_and_change_nothing(over):
    rows, cached = jnp.asarray(normal(2, 3, 1, 6)), jnp.asarray(normal(2, 3, 6, 6))
    given = dict(over=over, dtype=jnp.float32)
    expected = plain_products(rows, cached, **given)
    np.testing.assert_allclose(
        filled_products(rows, cached, **given), expected, rtol=1e-6, atol=1e-6
    )
    assert float(jnp.abs(expected - plain_products(rows, cached.mT, **given)).max()) > 0.01

    def attention(q: jax.Array, k: jax.Array) -> jax.Array:
        return attend_cache(q, k, k, mask=None, scale=1.0)

    q, k = jnp.zeros((2, 1, 3, 6)), jnp.zeros((2, 3, 5, 6))
    traced = jax.jit(attention).trace(q, k)
    for platform, filled in (("tpu", True), ("cpu", False)):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        assert (f"tensor<2x3x{SUBLANES}x6xf32>" in text) == filled


def test_norms():
    x = 1e3 + normal(2, 3, 8)  # a large mean: the fast variance would lose all digits
    exact = x.astype(np.float64)
    centred = exact - exact.mean(-1, keepdims=True)
    expected = centred / np.sqrt(centred.var(-1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(layer_norm(jnp.asarray(x), epsilon=1e-6), expected, atol=2e-3)
    scale = normal(8)
    out: Any = RMSNorm(epsilon=1e-5).apply({"params": {"scale": scale}}, jnp.asarray(x))
    expected = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(out, expected, rtol=1e-5)
    assert layer_norm(jnp.asarray(x, jnp.bfloat16), epsilon=1e-6).dtype == jnp.float32


def test_unit():
    x = normal(4, 3)
    expected = x / np.linalg.norm(x, axis=-1, keepdims=True)
    np.testing.assert_allclose(unit(jnp.asarray(x)), expected, rtol=1e-6)
    zero = jnp.zeros((3,))
    np.testing.assert_array_equal(unit(zero), zero)
    assert np.isfinite(jax.jacobian(unit)(zero)).all()


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("gelu", lambda x: x * 0.5 * (1 + math.erf(x / math.sqrt(2)))),
        (
            "gelu_tanh",
            lambda x: x * 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        ),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activations(name, function):
    x = np.linspace(-3, 3, 13, dtype=np.float32)
    expected = [function(float(value)) for value in x]
    np.testing.assert_allclose(activate(jnp.asarray(x), name), expected, atol=1e-6)


def test_unknown_activation():
    with pytest.raises(ValueError, match="'swish'.*gelu_tanh, gelu, silu, relu"):
        activate(jnp.zeros(1), "swish")


@pytest.mark.parametrize("gated", [False, True])
def test_mlp(gated):
    normal_init = nn.initializers.normal(1.0)
    mlp = MLP(
        hidden=5,
        activation="silu",
        gated=gated,
        bias=not gated,
        kernel_init=normal_init,
        out_init=normal_init,
        dtype=jnp.float32,
    )
    x = normal(2, 3)
    params = init(mlp, jax.random.key(0), jnp.asarray(x))
    kernels = {name: np.asarray(leaf["kernel"]) for name, leaf in params.items()}
    silu = lambda a: a / (1 + np.exp(-a))  # noqa: E731
    up = x @ kernels["up"]
    expected = (silu(x @ kernels["gate"]) * up if gated else silu(up)) @ kernels["down"]
    assert ("bias" in params["up"]) == (not gated)
    np.testing.assert_allclose(apply(mlp, params, jnp.asarray(x)), expected, atol=1e-5)


def test_drop_path_is_per_sample_and_unbiased():
    x = jnp.ones((4000, 2, 3))
    out = np.asarray(drop_path(x, jnp.float32(0.25), jax.random.key(0)))
    kept = out[:, 0, 0] > 0
    np.testing.assert_array_equal(out[kept], np.float32(1 / 0.75))
    np.testing.assert_array_equal(out[~kept], 0.0)
    assert abs(kept.mean() - 0.75) < 4 * math.sqrt(0.75 * 0.25 / 4000)
    np.testing.assert_array_equal(drop_path(x, jnp.float32(0.0), jax.random.key(0)), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pairs_turn_alike_apart_and_by_a_product(dtype):
    x = jnp.asarray(normal(2, 4, 3, 12), dtype)
    table = jnp.asarray(rope_2d(np.array([[0, 0], [1, 0], [0, 1], [3, 5]]), 12))
    by_product = rotate_by_product(x, table)
    assert by_product.dtype == dtype
    np.testing.assert_array_equal(by_product, rotate_pairs(x, table))
    assert np.any(by_product != x)


def test_rope_turns_pairs_by_row_and_column():
    """As complex numbers: pair j of the first half times exp(i row base^(-2 j / (K / 2)))."""
    coords = np.array([[0, 0], [1, 0], [0, 1], [3, 5]])
    table = rope_2d(coords, 8, base=100.0)
    assert table.shape == (4, 4, 2)
    x = normal(2, 4, 3, 8)
    turned = np.asarray(rotate(jnp.asarray(x), jnp.asarray(table)))
    as_complex = lambda a: a[..., 0::2] + 1j * a[..., 1::2]  # noqa: E731
    frequencies = 100.0 ** (-2 * np.arange(2) / 4)
    for cell, (row, column) in enumerate(coords):
        angles = np.concatenate([row * frequencies, column * frequencies])
        expected = as_complex(x[:, cell]) * np.exp(1j * angles)
        np.testing.assert_allclose(as_complex(turned[:, cell]), expected, atol=1e-5)


def test_rope_makes_attention_depend_on_offsets_only():
    q, k = normal(1, 1, 1, 8), normal(1, 1, 1, 8)

    def product(a: tuple[int, int], b: tuple[int, int]) -> float:
        turn = lambda x, cell: rotate(jnp.asarray(x), jnp.asarray(rope_2d(np.array([cell]), 8)))  # noqa: E731
        return float((turn(q, a) * turn(k, b)).sum())

    assert product((1, 2), (3, 5)) == pytest.approx(product((2, 4), (4, 7)), abs=1e-5)
    assert product((1, 2), (3, 5)) != pytest.approx(product((1, 2), (5, 3)), abs=1e-3)


def test_rope_rows_of_zeros_silence_a_vector():
    x = jnp.asarray(normal(1, 1, 1, 8))
    assert not np.any(rotate(x, jnp.zeros((1, 4, 2))))


def test_rope_needs_a_multiple_of_four():
    with pytest.raises(ValueError, match="multiple of 4, not 6"):
        rope_2d(np.zeros((1, 2), int), 6)


def test_fold_takes_patches_apart_and_unfold_puts_them_together():
    x = normal(2, 4, 6, 3)
    folded = fold(jnp.asarray(x), 2)
    assert folded.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(folded[0, 1, 2], x[0, 2:4, 4:6].reshape(-1))
    np.testing.assert_array_equal(unfold(folded, 2), x)
