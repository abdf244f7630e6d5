"""Training of tokenizers: values, masks, the upkeep of codebooks, keys."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.tokenizers.tokenizer import to_float
from tests.modules import apply
from tests.objective_calls import BATCH, KEY, close, gradient_of, loss_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_codes, toy_config, toy_labels, toy_params, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class TokenizerRun:
    objective: TokenizerObjective
    params: Any
    batch: Any

    @functools.cached_property
    def stats(self) -> Any:
        return self.objective.init_stats(self.params)


def tokenizer_run(name: str, tokenizer: dict[str, Any] | None = None, **fields: Any):
    config = toy_config(name, vocab_size=12, tokenizer=tokenizer or {})
    params = toy_params(build_objective(config).system)["tokenizer"]  # type: ignore[attr-defined]
    objective = build_objective(config | {"objective": dict(name="tokenizer", **fields)})
    shape = (BATCH, *objective.tokenizer.image_shape)  # type: ignore[attr-defined]
    images = np.random.default_rng(1).integers(0, 256, shape).astype(np.uint8)
    return TokenizerRun(objective, params, {"image": jnp.asarray(images)})  # type: ignore[arg-type]


NAMES = ("next_scale", "raster")


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_loss_is_the_weighted_sum(name):
    weights = dict(l1=0.3, l2=0.7, codebook=1.1, commitment=0.2, entropy=0.05)
    run = tokenizer_run(name, dict(entropy=True), **weights)
    loss, aux = loss_of(run.objective, run.params, run.stats, {}, run.batch)
    images = to_float(run.batch["image"])
    reconstruction, quantized = apply(run.objective.tokenizer, run.params, images)
    error = np.asarray(reconstruction - images, np.float64)
    terms = dict(
        l1=np.abs(error).mean(),
        l2=np.square(error).mean(),
        codebook=float(quantized.codebook_loss.mean()),
        commitment=float(quantized.commitment_loss.mean()),
        entropy=float(quantized.entropy_loss),
    )
    close(loss, sum(weights[term] * terms[term] for term in terms))
    names = dict(l1="l1", l2="l2", codebook="codebook_loss", commitment="commitment_loss")
    for term, metric in (names | dict(entropy="entropy_loss")).items():
        assert abs(terms[term]) > 1e-3
        close(aux.metrics[metric], terms[term])
    clipped = np.clip(reconstruction, -1, 1) - np.asarray(images)
    psnr = -10 * np.log10(np.square(clipped / 2).mean((1, 2, 3)))
    close(aux.metrics["psnr"], psnr.mean(), rtol=1e-4)
    assert not aux.sums
    scales = len(run.objective.tokenizer.grids)
    shown = [name for name in aux.metrics if name.startswith("usage")]
    assert len(shown) == (1 + scales if scales > 1 else 1)


@pytest.mark.parametrize("name", NAMES)
def test_tokenizer_padding_rows_do_not_count(name):
    run = tokenizer_run(name, dict(entropy=True), entropy=0.5)
    rows = {"image": run.batch["image"][:5]}
    expected = loss_of(run.objective, run.params, run.stats, {}, rows)
    mask = (jnp.arange(BATCH) < 5).astype(jnp.float32)
    padded = loss_of(run.objective, run.params, run.stats, {}, run.batch | {"mask": mask})
    # Entropies are of squared distances of some 2 over a temperature of 0.01, which float32 rounds
    # by 2.4e-5, another batch otherwise.
    close(padded, expected, atol=2.4e-5)
    unmasked = loss_of(run.objective, run.params, run.stats, {}, run.batch)
    assert abs(float(unmasked[0] - expected[0])) > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_sums_add_up_over_microbatches(name):
    run = tokenizer_run(name, dict(codebook_update="ema"))
    step = functools.partial(loss_of, run.objective, run.params, run.stats, {}, train=True)
    _, whole = step(run.batch)
    halves = [step({"image": run.batch["image"][i::2]})[1] for i in range(2)]
    close(jax.tree.map(jnp.add, halves[0].sums, halves[1].sums), whole.sums, atol=1e-5)
    close(sum(h.metrics["l2"] for h in halves) / 2, whole.metrics["l2"])
    codes = apply(
        run.objective.tokenizer, run.params, to_float(run.batch["image"]), method="encode"
    )
    step_id = np.asarray(run.objective._step_id)
    counts = np.stack(
        [np.bincount(np.ravel(codes[:, step_id == k]), minlength=12) for k in set(step_id)]
    )
    np.testing.assert_array_equal(whole.sums["counts"], counts)


def assigned_vectors(tokenizer: Any, params: Any, images: jax.Array) -> np.ndarray:
    """Float64 [B, L, C]: the latent's cells, or of several scales the residuals'."""
    if len(tokenizer.grids) == 1:
        z = apply(tokenizer, params, images, method=lambda m, x: m.autoencoder.encode(x))
    else:
        z = apply(tokenizer, params, images)[1].vectors
    return np.asarray(z, np.float64).reshape(len(images), -1, 4)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


@pytest.mark.parametrize(
    ("name", "l2_norm"),
    [
        pytest.param("raster", False, marks=pytest.mark.slow),
        pytest.param("raster", True, marks=pytest.mark.slow),
        ("next_scale", True),
    ],
)
def test_ema_codebook_equals_numpy(name, l2_norm):
    """Rows of length one where they stand for directions, and of the residuals' where for these."""
    run = tokenizer_run(
        name, dict(codebook_update="ema", l2_norm=l2_norm), ema_decay=0.8, usage_decay=0.6
    )
    step_id = np.asarray(run.objective._step_id)
    scales = step_id.max() + 1
    params, stats = run.params, run.stats
    codebook = np.asarray(params["quantizer"]["codebook"], np.float64)
    counts, sums = np.ones(12), codebook.copy()
    histogram = np.full((scales, 12), 1 / 12)
    for step in range(3):
        batch = {"image": run.batch["image"][4 * step : 4 * step + 4]}
        gradient, aux = gradient_of(run.objective, params, stats, {}, batch)
        assert not np.any(gradient["quantizer"]["codebook"])
        z = assigned_vectors(run.objective.tokenizer, params, to_float(batch["image"]))
        directions, rows = (unit(z), unit(codebook)) if l2_norm else (z, codebook)
        z = directions if name == "raster" else z
        distances = np.square(directions[:, :, None] - rows[None, None]).sum(-1)  # [B, L, V]
        codes = distances.argmin(-1)
        hits = np.stack(
            [np.bincount(codes[:, step_id == k].ravel(), minlength=12) for k in range(scales)]
        )
        assigned = np.stack([z[codes == code].sum(0) for code in range(12)])
        counts, sums = 0.8 * counts + 0.2 * hits.sum(0), 0.8 * sums + 0.2 * assigned
        histogram = 0.6 * histogram + 0.4 * hits / hits.sum(1, keepdims=True)
        codebook = sums / counts[:, None]
        if l2_norm and name == "raster":
            codebook = unit(codebook)
        params, stats = run.objective.finish(params, stats, aux.sums, aux.last, KEY)
        close(params["quantizer"]["codebook"], codebook, rtol=1e-4, atol=1e-5)
        close(stats, dict(histogram=histogram, ema_counts=counts, ema_sums=sums), rtol=1e-4)


def test_usage_and_perplexity_of_the_histogram():
    run = tokenizer_run("next_scale")
    histogram = np.zeros((3, 12), np.float32)
    histogram[0, 3] = 1.0
    histogram[1, :4] = 0.25
    histogram[2, :] = 1 / 12
    _, aux = loss_of(
        run.objective, run.params, {"histogram": jnp.asarray(histogram)}, {}, run.batch
    )
    for scale, (usage, perplexity) in enumerate([(1 / 12, 1), (4 / 12, 4), (1, 12)]):
        close(aux.metrics[f"usage/scale_{scale:02d}"], usage)
        close(aux.metrics[f"perplexity/scale_{scale:02d}"], perplexity, rtol=1e-4)
    mean = histogram.mean(0).astype(np.float64)
    close(aux.metrics["usage"], 1.0)
    close(aux.metrics["perplexity"], math.exp(-(mean * np.log(mean)).sum()), rtol=1e-4)


def rare_codes(run: TokenizerRun) -> Any:
    """The run's parameters with three codes no feature is near, and statistics that know it."""
    codebook = run.params["quantizer"]["codebook"].at[jnp.array([2, 5, 7])].set(100.0)
    params = run.params | {"quantizer": run.params["quantizer"] | {"codebook": codebook}}
    histogram = run.stats["histogram"].at[:, jnp.array([2, 5, 7])].set(1e-6)
    return params, run.stats | {"histogram": histogram}


@pytest.mark.parametrize("update", ["gradient", "ema"])
@pytest.mark.parametrize("name", NAMES)
def test_dead_codes_restart_as_vectors_of_the_batch(name, update):
    run = tokenizer_run(name, dict(codebook_update=update), restart_below=0.02)
    params, stats = rare_codes(run)
    _, aux = loss_of(run.objective, params, stats, {}, run.batch, KEY, True)
    after, later = run.objective.finish(params, stats, aux.sums, aux.last, KEY)
    dead = np.isin(np.arange(12), [2, 5, 7])
    codebook = np.asarray(after["quantizer"]["codebook"])
    _, quantized = apply(run.objective.tokenizer, params, to_float(run.batch["image"]))
    pool = np.asarray(quantized.vectors).reshape(-1, 4)

    def distance(rows: Any) -> np.ndarray:
        return np.abs(np.asarray(rows)[:, None] - pool[None]).max(-1).min(1)

    assert (distance(codebook[dead]) < 1e-6).all()
    assert len(np.unique(codebook[dead], axis=0)) == 3
    never = dataclasses.replace(run.objective, restart_below=0.0)
    kept, plain = never.finish(params, stats, aux.sums, aux.last, KEY)
    kept = np.asarray(kept["quantizer"]["codebook"])
    close(codebook[~dead], kept[~dead])
    assert (distance(kept[dead]) > 1e-3).all()
    close(later["histogram"][:, ~dead], plain["histogram"][:, ~dead])
    close(later["histogram"][:, dead], np.full((len(stats["histogram"]), 3), 1 / 12))
    if update == "ema":
        close(later["ema_sums"][dead], codebook[dead])
        close(later["ema_counts"][dead], np.ones(3))


@pytest.mark.slow  # compiles every objective
def test_no_key_is_used_twice():
    """By the checker of jax, in a training step of both objectives with all randomness on."""
    system, params = toy_system("raster")
    rates = dict(drop_path=0.1, token_dropout=0.1, residual_dropout=0.1, mlp_dropout=0.1)
    backbone = system.backbone.clone(**rates)
    objective = Likelihood(system=dataclasses.replace(system, backbone=backbone))
    run = tokenizer_run("raster", restart_below=0.5)
    batch = toy_labels(4) | {"codes": toy_codes(system, 4)}
    with jax.debug_key_reuse(True):
        key = jax.random.key(0)
        gradient_of(objective, params, {}, params, batch, jax.random.fold_in(key, 0))
        key = jax.random.fold_in(key, 1)
        gradient_of(run.objective, run.params, run.stats, {}, run.batch, key)
        with pytest.raises(jax.errors.KeyReuseError):  # the checker is awake
            gradient_of(run.objective, run.params, run.stats, {}, run.batch, key)
