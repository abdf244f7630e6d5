"""Tokenizers: what training, sampling and decoding see of the codes is one and the same."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_tokenizer
from ar_jax.nn.resize import shrink
from ar_jax.tokenizers.quantizers import MultiScaleQuantizer, VectorQuantizer, phi_indices
from ar_jax.tokenizers.tokenizer import to_float, to_uint8
from tests.modules import apply, init
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)


def quantizer_params(quantizer) -> dict[str, Any]:
    """Random parameters, the codebook as large as the features."""
    features = jnp.zeros((2, *quantizer.grids[-1], quantizer.code_width))
    shapes = jax.eval_shape(lambda: init(quantizer, jax.random.key(0), features, method="quantize"))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda a: jnp.asarray(0.5 * rng.standard_normal(a.shape), jnp.float32), shapes
    )


def multiscale(grids, **fields) -> MultiScaleQuantizer:
    return MultiScaleQuantizer(grids=grids, codebook_size=11, code_width=3, **fields)


SCALE_LISTS = {
    "square": ((1, 1), (2, 2), (4, 4)),
    "one": ((3, 3),),
    "equal sizes": ((1, 4), (2, 2), (4, 1)),
    "rectangles": ((1, 2), (2, 3), (3, 5)),
    "large first": ((2, 2), (3, 3)),
}


@pytest.mark.parametrize("name", SCALE_LISTS)
def test_multiscale_contract(name):
    """Codes, sums and contexts of all methods agree, bit for bit."""
    grids = SCALE_LISTS[name]
    quantizer = multiscale(grids, phis=0)
    params = quantizer_params(quantizer)
    features = jnp.asarray(RNG.standard_normal((2, *grids[-1], 3)), jnp.float32)

    @jax.jit
    def run(params, features) -> Any:
        call: Any = functools.partial(quantizer.apply, {"params": params})
        quantized = call(features, method="quantize")
        codes, state = quantized.codes, call(2, method="begin")
        sums, contexts, start = [state], [], 0
        for step, size in enumerate(quantizer.sizes):
            part = codes[:, start : start + size]
            state, context = call(state, part, step, method="advance")
            sums.append(state)
            contexts.append(context)
            start += size
        lookups = [call(codes, n, method="lookup") for n in range(len(grids) + 1)]
        whole = call(codes, method="lookup")
        return quantized, sums, contexts, lookups, whole, call(codes, method="contexts")

    quantized, sums, contexts, lookups, whole, forced = run(params, features)
    assert quantized.codes.shape == (2, sum(h * w for h, w in grids))
    assert quantized.vectors.shape == (*quantized.codes.shape, 3)
    assert contexts[-1] is None
    fed = [jnp.zeros((2, 0, 3)), *contexts[:-1]]
    np.testing.assert_array_equal(jnp.concatenate(fed, axis=1), forced)
    assert forced.shape == (2, sum(h * w for h, w in grids[1:]), 3)
    for sum_so_far, lookup in zip(sums, lookups, strict=True):
        np.testing.assert_array_equal(sum_so_far, lookup)
    np.testing.assert_array_equal(whole, lookups[-1])
    # The straight-through value is f_hat up to the rounding of z + (f_hat - z).
    np.testing.assert_allclose(quantized.features, whole, atol=1e-6)


def test_residual_quantisation_in_numpy():
    """One image, two scales, one phi: the algorithm step by step."""
    quantizer = multiscale(((1, 1), (2, 2)), phis=1, phi_ratio=0.25)
    params = quantizer_params(quantizer)
    codebook = np.asarray(params["codebook"], np.float64)
    kernel = np.asarray(params["phi_0"]["kernel"], np.float64)  # [3, 3, C, C]
    bias = np.asarray(params["phi_0"]["bias"], np.float64)
    features = RNG.standard_normal((1, 2, 2, 3)).astype(np.float32)

    def phi(h: np.ndarray) -> np.ndarray:
        padded = np.pad(h, ((1, 1), (1, 1), (0, 0)))
        out = np.empty_like(h)
        for y, x in np.ndindex(2, 2):
            out[y, x] = np.einsum("ijc,ijcd->d", padded[y : y + 3, x : x + 3], kernel) + bias
        return 0.75 * h + 0.25 * out

    rest = features[0].astype(np.float64)
    pooled = rest.mean((0, 1))
    first = np.square(codebook - pooled).sum(1).argmin()
    f_hat = phi(np.broadcast_to(codebook[first], (2, 2, 3)))
    codebook_loss = np.square(f_hat - rest).mean()
    residual = rest - f_hat
    second = np.square(codebook[None, None] - residual[:, :, None]).sum(-1).argmin(-1)
    f_hat = f_hat + phi(codebook[second])
    codebook_loss += np.square(f_hat - rest).mean()

    quantized = apply(quantizer, params, jnp.asarray(features), method="quantize")
    np.testing.assert_array_equal(quantized.codes, [[first, *second.reshape(-1)]])
    np.testing.assert_allclose(quantized.features[0], f_hat, atol=1e-5)
    np.testing.assert_allclose(quantized.codebook_loss, [codebook_loss / 2], rtol=1e-5)
    np.testing.assert_allclose(quantized.commitment_loss, [codebook_loss / 2], rtol=1e-5)
    vectors = np.concatenate([pooled[None], residual.reshape(4, 3)])
    np.testing.assert_allclose(quantized.vectors[0], vectors, atol=1e-5)


@pytest.mark.parametrize("name", SCALE_LISTS)
def test_finer_scales_correct_wrong_draws(name):
    """What is right after a wrong draw is what quantising the rest of the latent gives."""
    grids = SCALE_LISTS[name]
    quantizer = multiscale(grids, phis=0)
    params = quantizer_params(quantizer)
    features = jnp.asarray(RNG.standard_normal((4, *grids[-1], 3)), jnp.float32)
    codes = apply(quantizer, params, features, method="quantize").codes
    drawn = jnp.asarray(RNG.integers(0, 11, codes.shape), jnp.int32)
    wrong = RNG.uniform(size=codes.shape) < 0.4
    wrong[0] = False
    right, contexts = apply(quantizer, params, codes, drawn, wrong, method="correct")
    plain = apply(quantizer, params, codes, method="contexts")
    np.testing.assert_array_equal(right[0], codes[0])
    np.testing.assert_array_equal(contexts[0], plain[0])

    used = jnp.where(wrong, drawn, right)
    np.testing.assert_allclose(contexts, apply(quantizer, params, used, method="contexts"))
    latent = apply(quantizer, params, codes, method="lookup")
    start, spoilt = 0, np.zeros(4, bool)
    for step, size in enumerate(quantizer.sizes):
        part = slice(start, start + size)
        f_hat = apply(quantizer, params, used, static=(step,), method="lookup")
        rest = shrink(latent - f_hat, grids[step]).reshape(4, size, 1, 3)
        nearest = np.square(np.asarray(rest) - np.asarray(params["codebook"])).sum(-1).argmin(-1)
        np.testing.assert_array_equal(
            right[:, part], np.where(spoilt[:, None], nearest, codes[:, part])
        )
        spoilt |= wrong[:, part].any(1)
        start += size
    if len(grids) > 1:
        assert (np.asarray(right) != codes).any()


# From the official code with four convolutions, by number of scales (VAR's case README, fact 9).
PHI_OF_SCALE = {
    1: (0,),
    3: (0, 2, 3),
    4: (0, 1, 2, 3),
    5: (0, 1, 2, 2, 3),
    6: (0, 0, 1, 2, 3, 3),
    7: (0, 0, 1, 2, 2, 3, 3),
    8: (0, 0, 1, 1, 2, 2, 3, 3),
    9: (0, 0, 1, 1, 2, 2, 2, 3, 3),
    10: (0, 0, 1, 1, 1, 2, 2, 3, 3, 3),
    11: (0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 3),
    12: (0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3),
    13: (0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
    14: (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3),
}


def test_phi_of_scale():
    for scales, expected in PHI_OF_SCALE.items():
        assert phi_indices(scales, 4) == expected
    for scales in range(1, 15):
        assert phi_indices(scales, scales) == tuple(range(scales))
        assert phi_indices(scales, 1) == (0,) * scales


@pytest.mark.parametrize(("phis", "count"), [(0, 3), (1, 1), (2, 2), (4, 4)])
def test_number_of_phis(phis, count):
    quantizer = multiscale(((1, 1), (2, 2), (4, 4)), phis=phis)
    names = quantizer_params(quantizer).keys()
    assert sorted(names) == ["codebook", *(f"phi_{i}" for i in range(count))]


@pytest.mark.parametrize("l2_norm", [False, True])
def test_one_grid_contract(l2_norm):
    quantizer = VectorQuantizer(grid=(2, 3), codebook_size=7, code_width=4, l2_norm=l2_norm)
    params = quantizer_params(quantizer)
    features = RNG.standard_normal((2, 2, 3, 4)).astype(np.float32)
    codebook = np.asarray(params["codebook"])
    if l2_norm:
        codebook = codebook / np.linalg.norm(codebook, axis=-1, keepdims=True)
        z = features / np.linalg.norm(features, axis=-1, keepdims=True)
    else:
        z = features
    call = functools.partial(apply, quantizer, params)
    quantized = call(jnp.asarray(features), method="quantize")
    codes = np.square(z[..., None, :] - codebook).sum(-1).argmin(-1)
    np.testing.assert_array_equal(quantized.codes, codes.reshape(2, 6))
    np.testing.assert_allclose(quantized.features, codebook[codes], atol=1e-6)
    loss = np.square(codebook[codes] - z).mean((1, 2, 3))
    np.testing.assert_allclose(quantized.codebook_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(quantized.commitment_loss, loss, rtol=1e-5)
    np.testing.assert_allclose(call(quantized.codes, method="lookup"), codebook[codes], atol=1e-6)
    partial = np.asarray(call(quantized.codes, 4, method="lookup")).reshape(2, 6, 4)
    np.testing.assert_allclose(partial[:, :4], codebook[codes].reshape(2, 6, 4)[:, :4], atol=1e-6)
    np.testing.assert_array_equal(partial[:, 4:], 0.0)
    np.testing.assert_array_equal(call(quantized.codes, method="contexts"), quantized.codes[:, :-1])
    assert call((), quantized.codes[:, :1], 0, method="advance")[0] == ()


@pytest.mark.parametrize("name", ["vq", "multiscale"])
@pytest.mark.parametrize("update", ["gradient", "ema"])
def test_who_moves_the_codebook(name, update):
    """Codebook loss moves codes, commitment loss moves features; EMA codebooks get no gradient."""
    quantizer: VectorQuantizer | MultiScaleQuantizer
    if name == "vq":
        quantizer = VectorQuantizer(
            grid=(2, 2), codebook_size=11, code_width=3, codebook_update=update
        )
    else:
        quantizer = multiscale(((1, 1), (2, 2)), codebook_update=update)
    params = quantizer_params(quantizer)
    features = jnp.asarray(RNG.standard_normal((2, 2, 2, 3)), jnp.float32)

    def gradients(term):
        def loss(params, features):
            out = apply(quantizer, params, features, method="quantize")
            return jnp.square(getattr(out, term)).sum()

        grads, dfeatures = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, features)
        return float(jnp.abs(grads["codebook"]).max()), float(jnp.abs(dfeatures).max())

    moved, pulled = gradients("codebook_loss")
    assert (moved > 0) == (update == "gradient")
    assert pulled == 0
    moved, pulled = gradients("commitment_loss")
    assert moved == 0
    assert pulled > 0
    moved, pulled = gradients("features")  # straight through
    assert moved == 0
    assert pulled > 0


@pytest.mark.parametrize("name", ["vq", pytest.param("multiscale_vq", marks=pytest.mark.slow)])
def test_non_square_images(name):
    config = toy_config("raster", autoencoder=dict(image_size=(8, 12), image_channels=2))
    config["tokenizer"]["name"] = name
    if name == "multiscale_vq":
        config["tokenizer"]["scales"] = (1, (2, 3), (4, 6))
    tokenizer = build_tokenizer(config)
    assert tokenizer.grids[-1] == (4, 6)
    images = jnp.asarray(RNG.uniform(-1, 1, (2, 8, 12, 2)), jnp.float32)
    params = init(tokenizer, jax.random.key(0), images)
    codes = apply(tokenizer, params, images, method="encode")
    assert codes.shape == (2, sum(h * w for h, w in tokenizer.grids))
    decoded = apply(tokenizer, params, codes, method="decode")
    assert decoded.shape == images.shape
    assert float(jnp.abs(decoded).max()) <= 1
    reconstruction, quantized = apply(tokenizer, params, images)
    np.testing.assert_array_equal(quantized.codes, codes)
    np.testing.assert_allclose(decoded, jnp.clip(reconstruction, -1, 1), atol=1e-5)


def test_pixels():
    levels = np.arange(256, dtype=np.uint8)
    floats = to_float(jnp.asarray(levels))
    assert float(floats.min()) == -1.0
    assert float(floats.max()) == 1.0
    np.testing.assert_array_equal(to_uint8(floats), levels)
    np.testing.assert_array_equal(to_uint8(jnp.array([-2.0, 2.0])), [0, 255])


@pytest.mark.slow  # compiles in two precisions
def test_bfloat16_keeps_codes_and_outputs_in_float32():
    config = toy_config("next_scale", autoencoder=dict(patch=2, image_size=16))
    config["dtype"] = "bfloat16"
    tokenizer = build_tokenizer(config)
    images = jnp.asarray(RNG.uniform(-1, 1, (2, *tokenizer.image_shape)), jnp.float32)
    params = init(tokenizer, jax.random.key(0), images)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    reconstruction, quantized = apply(tokenizer, params, images)
    floats = (reconstruction, quantized.features, quantized.vectors, quantized.codebook_loss)
    assert {leaf.dtype for leaf in floats} == {jnp.dtype("float32")}
    config["dtype"] = "float32"
    exact, _ = apply(build_tokenizer(config), params, images)
    difference = np.abs(reconstruction - exact).max()
    assert 0 < difference < 0.1 * np.abs(exact).max()
