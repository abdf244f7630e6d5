"""Continuous codes: patches, posteriors, and their way to disk and back."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective, build_tokenizer
from ar_jax.data import CodesSource, CodesWriter
from ar_jax.tokenizers.kl import Posterior
from tests.modules import apply, init
from tests.objective_calls import loss_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_masked import masked_config

pytestmark = pytest.mark.usefixtures("quick_compilation")

RNG = np.random.default_rng(0)
IMAGES = jnp.asarray(RNG.uniform(-1, 1, (3, 8, 8, 1)), jnp.float32)


def tokenizer_of(**fields: Any) -> Any:
    return build_tokenizer(masked_config(tokenizer=fields))


@pytest.fixture(scope="module")
def params(quick_compilation) -> Any:  # noqa: F811
    return init(tokenizer_of(), jax.random.key(0), IMAGES)


def test_patches_hold_channels_then_rows_then_columns():
    tokenizer = tokenizer_of(patch=2)
    assert tokenizer.grids == ((2, 2),)
    assert (tokenizer.codes_shape, tokenizer.encoding_shape) == ((4, 8), (4, 16))
    latents = jnp.asarray(RNG.standard_normal((3, 4, 4, 2)), jnp.float32)
    codes = tokenizer.patchify(latents)
    cell = latents[:, 2:4, 0:2]  # the third code: second row, first column
    np.testing.assert_array_equal(codes[:, 2], cell.transpose(0, 3, 1, 2).reshape(3, 8))
    np.testing.assert_array_equal(tokenizer.unpatchify(codes), latents)


@pytest.mark.parametrize("patch", [1, 2])
def test_codes_are_the_scaled_latents(params, patch):
    """Encoding, drawing and decoding, against the autoencoder with the same noise."""
    tokenizer = tokenizer_of(patch=patch)
    encoding = apply(tokenizer, params, IMAGES, method="encode")
    assert encoding.shape == (3, *tokenizer.encoding_shape)
    noise = jnp.asarray(RNG.standard_normal((3, 4, 4, 2)), jnp.float32)
    for drawn in (None, noise):
        images, posterior = apply(tokenizer, params, IMAGES, drawn)
        rows = None if drawn is None else tokenizer.patchify(drawn)
        codes = apply(tokenizer, params, encoding, rows, method="codes_of")
        latents = posterior.mean if drawn is None else posterior.sample(drawn)
        np.testing.assert_allclose(codes, 0.5 * tokenizer.patchify(latents), rtol=1e-5, atol=1e-6)
        decoded = apply(tokenizer, params, codes, method="decode")
        np.testing.assert_allclose(decoded, jnp.clip(images, -1, 1), rtol=1e-4, atol=1e-5)


def test_posterior():
    moments = jnp.asarray(RNG.standard_normal((2, 50, 6)), jnp.float32).at[0, 0, 3:].set(99.0)
    posterior = Posterior.of(moments)
    np.testing.assert_allclose(posterior.log_variance[0, 0], 20.0)
    posterior = Posterior.of(moments[1:])
    mean, std = np.asarray(posterior.mean), np.asarray(posterior.std)
    noise = np.random.default_rng(1).standard_normal((20_000, *mean.shape[1:]))
    x = mean + std * noise
    log_ratio = (-0.5 * noise**2 - np.log(std) + 0.5 * x**2).sum((1, 2))
    np.testing.assert_allclose(posterior.kl()[0], log_ratio.mean(), rtol=0.02)


def test_objective(params):
    """Training decodes a sample, evaluation the mean; the terms add up."""
    config = masked_config() | {"objective": dict(name="kl_tokenizer", l1=0.5, l2=2.0, kl=0.1)}
    objective: Any = build_objective(config)
    batch = {"image": jnp.asarray(RNG.integers(0, 256, (3, 8, 8, 1)), jnp.uint8)}
    loss, aux = loss_of(objective, params, {}, {}, batch)
    m = aux.metrics
    np.testing.assert_allclose(loss, 0.5 * m["l1"] + 2 * m["l2"] + 0.1 * m["kl"] / 64, rtol=1e-5)
    images = batch["image"].astype(jnp.float32) / 127.5 - 1
    mean, posterior = apply(objective.tokenizer, params, images)
    np.testing.assert_allclose(m["l2"], jnp.square(mean - images).mean(), rtol=1e-5)
    np.testing.assert_allclose(m["kl"], posterior.kl().mean(), rtol=1e-5)
    _, one = loss_of(objective, params, {}, {}, batch, train=True)
    _, two = loss_of(objective, params, {}, {}, batch, key=jax.random.key(6), train=True)
    assert float(one.metrics["l2"]) != float(two.metrics["l2"])


def test_attention_by_level():
    """Latent diffusion's: the encoder's last level and both middles."""
    fields = dict(masked_config()["tokenizer"]["autoencoder"])
    fields |= dict(attention=True, middle=True, encoder_attention=(0,), decoder_attention=())
    shapes = jax.eval_shape(tokenizer_of(autoencoder=fields).init, jax.random.key(0), IMAGES)[
        "params"
    ]["autoencoder"]
    found = {
        f"{part}/{name}" for part in ("encoder", "decoder") for name in shapes[part]
        if "attention" in name
    }  # fmt: skip
    assert found == {
        "encoder/level0_attention0",
        "encoder/middle_attention",
        "decoder/middle_attention",
    }


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(tokenizer={"patch": 3}), "tokenizer.patch is 3, but the latent is 4x4"),
        (dict(tokenizer={"scale": 0.0}), "tokenizer.scale is 0.0"),
        (dict(schedule={"iterations": 17}), "schedule.iterations is 17.*16 codes"),
        (dict(backbone={"heads": 3}), "backbone.width 16 is not a multiple of backbone.heads 3"),
        (dict(backbone={"code_width": 3}), "backbone.code_width is 3.* 2 numbers"),
        (dict(head={"code_width": 4}), "head.code_width is 4.* 2 numbers"),
        (dict(head={"sampling_steps": "ddim999"}), "head.sampling_steps is 'ddim999'"),
        (dict(objective={"name": "likelihood"}), "objective.name is 'likelihood'.*'masked'"),
        (dict(objective={"name": "tokenizer"}), "objective.name is 'tokenizer'.*'kl_tokenizer'"),
    ],
)
def test_bad_configs_are_errors(change, words):
    with pytest.raises(ValueError, match=words):
        build_objective(masked_config(**change))


def test_masked_codes_need_their_parts():
    config = masked_config()
    config["schedule"] = dict(name="raster", grid=4)
    with pytest.raises(ValueError, match="schedule.name is 'raster'.*use 'masked'"):
        build_objective(config)
    config = masked_config()
    config["head"] = dict(name="categorical", vocab_size=8, bias=False, init_std=0.0)
    with pytest.raises(ValueError, match="head.name is another than 'diffusion'"):
        build_objective(config)


META: dict[str, Any] = dict(
    sizes=(1, 1), copies=2, num_classes=3, tokenizer={"digest": "x"}, image_size=8, channels=1
)


def test_floats_on_disk(tmp_path):
    codes = RNG.standard_normal((5, 2, 2, 4)).astype(np.float32)
    labels = np.array([0, 2, 1, 1, 0])
    with CodesWriter(
        tmp_path / "train", "train", vocabulary_size=0, width=4, shard_size=3, **META
    ) as writer:
        writer.write(codes[:4], labels[:4])
        writer.write(codes[4:], labels[4:])
    source = CodesSource(str(tmp_path), "train")
    assert (source.width, source.vocabulary_size, len(source)) == (4, 0, 5)
    for index in range(5):
        item = source[index]
        assert item["codes"].dtype == np.float32 and item["label"] == labels[index]
        np.testing.assert_array_equal(item["codes"], codes[index, 0])
    drawn = {source.fetch(1, np.random.default_rng(seed))["codes"].tobytes() for seed in range(20)}
    assert drawn == {copy.tobytes() for copy in codes[1]}


def test_what_does_not_fit_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="integers, floats or bits"):
        CodesWriter(tmp_path / "a", "train", vocabulary_size=5, width=4, **META)
    writer = CodesWriter(tmp_path / "b", "train", vocabulary_size=0, width=4, **META)
    for codes, words in (
        (np.zeros((1, 2, 2, 3), np.float32), r"expected floats \[n, 2, 2, 4\]"),
        (np.zeros((1, 2, 2, 4), np.int32), "expected floats"),
        (np.full((1, 2, 2, 4), np.inf, np.float32), "NaN or infinity"),
    ):
        with pytest.raises(ValueError, match=words):
            writer.write(codes, np.zeros(1, int))
