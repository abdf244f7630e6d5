"""Quantisers without a codebook: FSQ, LFQ, BSQ and bits over scales."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_tokenizer
from ar_jax.nn.bits import draw_flips
from ar_jax.tokenizers.bitwise import MultiScaleBitwiseQuantizer
from ar_jax.tokenizers.finite_scalar import FiniteScalarQuantizer
from ar_jax.tokenizers.lookup_free import BinarySphericalQuantizer, LookupFreeQuantizer
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import AUTOENCODER

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
GRID = (2, 3)
ONE_GRID: dict[str, Any] = {
    "fsq": FiniteScalarQuantizer(grid=GRID, levels=(4, 3, 5, 2), code_width=4),
    "lfq": LookupFreeQuantizer(grid=GRID, code_width=4),
    "bsq": BinarySphericalQuantizer(grid=GRID, code_width=4),
}
SCALES = {
    "square": ((1, 1), (2, 2), (4, 4)),
    "one": ((3, 3),),
    "rectangles": ((1, 2), (2, 3), (3, 5)),
}


def bitwise(grids: Any, **fields: Any) -> MultiScaleBitwiseQuantizer:
    return MultiScaleBitwiseQuantizer(grids=grids, code_width=5, **fields)


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("name", ONE_GRID)
def test_codes_and_vectors_of_all_codes(name):
    """Every code is the code of its own vector, and nothing else is."""
    quantizer = ONE_GRID[name]
    codes = jnp.arange(quantizer.codebook_size)
    vectors = np.asarray(quantizer.code_vectors(codes))
    assert len(np.unique(vectors, axis=0)) == len(codes) == {"fsq": 120}.get(name, 16)
    if name == "fsq":
        np.testing.assert_array_equal(quantizer.to_codes(vectors), codes)
        assert np.abs(vectors).max() == 1
        # The first channel's digit is the lowest.
        np.testing.assert_allclose(vectors[:5, 0], [-1, -0.5, 0, 0.5, -1])
    else:
        size = 0.5 if name == "bsq" else 1.0
        expected = size * np.array(list(itertools.product((-1, 1), repeat=4)))
        np.testing.assert_array_equal(vectors, expected)


@pytest.mark.parametrize("name", ["fsq", pytest.param("lfq", marks=pytest.mark.slow), "bsq"])
def test_one_grid_contract(name):
    quantizer = ONE_GRID[name]
    features = normal(50, *GRID, 4)

    @jax.jit
    def run(features: jax.Array) -> Any:
        quantized = quantizer.quantize(features)
        codes = quantized.codes
        lookups = quantizer.lookup(codes), quantizer.lookup(codes, 4)
        gradient = jax.grad(lambda x: quantizer.quantize(x).features[..., 0].sum())(features)
        return quantized, lookups, quantizer.contexts(codes), quantizer.index(codes), gradient

    quantized, (whole, part), contexts, index, gradient = run(features)
    assert quantized.codes.dtype == jnp.int32
    assert quantized.codes.shape == (50, 6)
    assert 0 <= quantized.codes.min() < quantized.codes.max() < quantizer.codebook_size
    np.testing.assert_allclose(quantized.features, whole, atol=1e-6)
    whole, part = (np.asarray(x).reshape(50, 6, 4) for x in (whole, part))
    np.testing.assert_array_equal(part[:, :4], whole[:, :4])
    np.testing.assert_array_equal(part[:, 4:], 0.0)
    np.testing.assert_array_equal(contexts, quantized.codes[:, :-1])
    np.testing.assert_array_equal(index, quantized.codes)
    assert (quantizer.index_size, quantizer.bits) == (quantizer.codebook_size, 0)
    assert np.abs(gradient[..., 0]).min() > 0 or name == "bsq"
    if name == "lfq":
        np.testing.assert_array_equal(gradient[..., 0], 1.0)
        loss = np.square(np.asarray(quantized.features) - features).mean((1, 2, 3))
        np.testing.assert_allclose(quantized.commitment_loss, loss, rtol=1e-5)
    if name == "bsq":  # along the sphere
        np.testing.assert_allclose((gradient * features).sum(-1), 0.0, atol=1e-5)


def test_levels_of_a_bounded_channel():
    """All levels are reached, none beyond; an even number of them goes half a step lower."""
    quantizer = ONE_GRID["fsq"]
    z = jnp.broadcast_to(jnp.linspace(-9, 9, 2001)[:, None], (2001, 4))
    rounded = np.round(np.asarray(quantizer.bound(z))).astype(int)
    reached = [sorted(set(rounded[:, channel])) for channel in range(4)]
    assert reached == [[-2, -1, 0, 1], [-1, 0, 1], [-2, -1, 0, 1, 2], [-1, 0]]
    np.testing.assert_allclose(quantizer.bound(jnp.zeros((1, 4)))[0, 1:3], 0.0, atol=1e-7)


@pytest.mark.parametrize(
    "name",
    ["rectangles", *(pytest.param(name, marks=pytest.mark.slow) for name in ("one", "square"))],
)
def test_bitwise_contract(name):
    """Codes, sums and contexts of all methods agree, as do scales one by one in numpy."""
    grids = SCALES[name]
    quantizer = bitwise(grids)
    features = normal(2, *grids[-1], 5)

    @jax.jit
    def run(features: jax.Array) -> Any:
        quantized = quantizer.quantize(features)
        codes, state = quantized.codes, quantizer.begin(2)
        states, contexts, start = [state], [], 0
        for step, size in enumerate(quantizer.sizes):
            state, context = quantizer.advance(state, codes[:, start : start + size], step)
            states.append(state)
            contexts.append(context)
            start += size
        lookups = [quantizer.lookup(codes, n) for n in range(len(grids) + 1)]
        forced, index = quantizer.contexts(codes), quantizer.index(codes)
        return quantized, states, contexts, lookups, quantizer.lookup(codes), forced, index

    quantized, states, contexts, lookups, whole, forced, index = run(features)
    codes = quantized.codes
    assert codes.dtype == jnp.int8
    assert codes.shape == (2, sum(h * w for h, w in grids), 5)
    assert quantized.vectors.shape == codes.shape
    np.testing.assert_array_equal(codes, quantized.vectors > 0)
    for state, lookup in zip(states, lookups, strict=True):
        np.testing.assert_array_equal(state, lookup)
    np.testing.assert_array_equal(states[-1], whole)
    assert contexts[-1] is None
    fed = np.concatenate([np.zeros((2, 0, 5)), *contexts[:-1]], axis=1)
    np.testing.assert_array_equal(fed, forced)
    np.testing.assert_allclose(quantized.features, whole, atol=1e-6)
    # The last scale is as large as the latent, and a code is of length one.
    last = np.asarray(states[-1]) - states[-2]
    np.testing.assert_allclose(np.linalg.norm(last, axis=-1), 1.0, rtol=1e-5)
    np.testing.assert_array_equal(last > 0, np.asarray(features) - states[-2] > 0)
    np.testing.assert_array_equal(index, np.asarray(codes, int) @ [16, 8, 4, 2, 1])
    assert quantizer.index_size == quantizer.codebook_size == 32


def test_codes_of_many_bits_are_counted_by_the_first():
    quantizer = MultiScaleBitwiseQuantizer(grids=((1, 1),), code_width=20)
    assert (quantizer.index_size, quantizer.codebook_size) == (2**16, 2**20)
    codes = np.zeros((1, 2, 20), np.int8)
    codes[0, 0, 0] = codes[0, 1, 15:] = 1
    np.testing.assert_array_equal(quantizer.index(jnp.asarray(codes)), [[2**15, 1]])


def test_bitwise_self_correction():
    """Finer scales make up for flipped bits; the contexts are those of the flipped codes."""
    grids = SCALES["square"]
    quantizer = bitwise(grids)
    features = normal(3, 4, 4, 5)

    @jax.jit
    def run(features: jax.Array) -> Any:
        codes = quantizer.quantize(features).codes
        flips = draw_flips(jax.random.key(0), 3, quantizer.sizes, 5, strength=0.5, scales=2)
        plain = quantizer.correct(features, jnp.zeros_like(flips))
        right, contexts = quantizer.correct(features, flips)
        used = right ^ flips.astype(jnp.int8)
        same = quantizer.correct(features, flips, requantize=False)
        expected = quantizer.contexts(codes), quantizer.contexts(used)
        rest = features - quantizer.lookup(used, 2)
        return codes, flips, (plain, same), (right, contexts), expected, rest

    codes, flips, unchanged, (right, contexts), expected, rest = jax.device_get(run(features))
    assert flips.shape == codes.shape
    assert not flips[:, 5:].any()
    assert 0 < flips[:, :5].mean() < 0.6
    for targets, fed in unchanged:
        np.testing.assert_array_equal(targets, codes)
        np.testing.assert_allclose(fed, expected[0], atol=1e-6)
    np.testing.assert_allclose(contexts, expected[1], atol=1e-6)
    np.testing.assert_array_equal(right[:, :1], codes[:, :1])
    assert (right != codes).any()
    # What is left over after the wrong scales is what the last one codes.
    np.testing.assert_array_equal(right[:, 5:], (rest > 0).reshape(3, 16, 5))


@pytest.mark.slow
def test_shares_of_flips():
    """One of each scale for the whole batch: hundredths from 0 to the strength, both included."""

    def draw(key: jax.Array) -> jax.Array:
        return draw_flips(key, 1, (1, 1, 1), 40_000, strength=0.03, scales=2).mean((0, 2))

    shares = np.asarray(jax.jit(jax.vmap(draw))(jax.random.split(jax.random.key(3), 60)))
    assert set(np.round(100 * shares[:, 0]).astype(int)) == {0, 1, 2, 3}
    assert set(np.round(100 * shares[:, 1]).astype(int)) == {0, 1, 2, 3}
    assert (np.round(shares[:, 0], 2) != np.round(shares[:, 1], 2)).any()
    np.testing.assert_array_equal(shares[:, 2], 0.0)


QUANTIZERS: dict[str, dict[str, Any]] = {
    "vq": dict(codebook_size=8),
    "fsq": dict(levels=(4, 3, 2, 2)),
    "lfq": {},
    "bsq": {},
    "multiscale_vq": dict(codebook_size=8, scales=(1, (2, 3))),
    "multiscale_bitwise": dict(scales=(1, (2, 3))),
}


def shape_cases() -> list[Any]:
    """(downsampling, channels, pooled): one of each autoencoder, the others in the slow run."""
    sides = [(2, 1), (4, 2), (8, 3), (16, 4), (32, 3)]
    return [
        pytest.param(*side, pooled, marks=() if side == kept else pytest.mark.slow)
        for pooled, kept in ((False, (32, 3)), (True, (4, 2)))
        for side in sides
    ]


@pytest.mark.parametrize(("downsample", "channels", "pooled"), shape_cases())
def test_shapes_of_every_downsampling_and_channel_count(downsample, channels, pooled):
    """Images that are not square, for each quantiser in turn."""
    levels = downsample.bit_length() - 1
    side = {"image_size": (2 * downsample, 3 * downsample), "image_channels": channels}
    fields: dict[str, Any] = AUTOENCODER | side | {"multipliers": (1,) * (levels + 1)}
    if pooled:
        names = ("image_size", "image_channels", "code_width", "channels", "multipliers", "groups")
        fields = {"name": "pooled"} | {field: fields[field] for field in names}
    name = list(QUANTIZERS)[levels % len(QUANTIZERS)]
    section = dict(name=name, autoencoder=fields) | QUANTIZERS[name]
    tokenizer: Any = build_tokenizer({"dtype": "float32", "tokenizer": section})
    assert tokenizer.grids[-1] == (2, 3)
    images = jax.ShapeDtypeStruct((2, *tokenizer.image_shape), jnp.float32)

    def passes(images: jax.Array) -> Any:
        params = tokenizer.init(jax.random.key(0), images)
        codes = tokenizer.apply(params, images, method="encode")
        return codes, tokenizer.apply(params, codes, method="decode"), tokenizer.index(codes)

    codes, decoded, index = jax.eval_shape(passes, images)
    assert codes.shape == (2, *tokenizer.codes_shape)
    assert codes.dtype == (jnp.int8 if tokenizer.bits else jnp.int32)
    assert decoded.shape == images.shape
    assert (index.shape, index.dtype) == (codes.shape[:2], jnp.int32)
