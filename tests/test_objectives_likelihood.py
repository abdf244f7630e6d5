"""Likelihood: values, masks, label dropout, one device and eight."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.tokenizers.tokenizer import to_float
from tests.modules import apply
from tests.objective_calls import BATCH, KEY, close, gradient_of, loss_of, replicated, sharded
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_systems import toy_codes, toy_labels, toy_system

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Generator:
    objective: Likelihood
    params: Any
    frozen: Any
    batch: Any

    def loss(self, train: bool = False, key: jax.Array = KEY, **fields: Any) -> Any:
        objective = dataclasses.replace(self.objective, **fields)
        return loss_of(objective, self.params, {}, self.frozen, self.batch, key, train)


@pytest.fixture(scope="module", params=["next_scale", "raster"])
def generator(request) -> Generator:
    system, params = toy_system(request.param)
    batch = toy_labels(BATCH) | {"codes": toy_codes(system, BATCH)}
    frozen = {"tokenizer": params.pop("tokenizer")}
    return Generator(Likelihood(system=system), params, frozen, batch)


def log_probabilities(generator: Generator, cond: Any = None) -> np.ndarray:
    """Teacher-forced log p [B, L, V] in float64."""
    params = generator.params | generator.frozen
    cond = {"label": generator.batch["label"]} if cond is None else cond
    system, codes = generator.objective.system, generator.batch["codes"]
    logits = np.asarray(jax.jit(teacher_forced, static_argnums=0)(system, params, cond, codes))
    logits = logits.astype(np.float64)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def picked(log_p: np.ndarray, codes: Any) -> np.ndarray:
    return np.take_along_axis(log_p, np.asarray(codes)[..., None], -1)[..., 0]


def test_likelihood_and_its_metrics(generator):
    log_p, codes = log_probabilities(generator), np.asarray(generator.batch["codes"])
    nll = -picked(log_p, codes)
    correct = log_p.argmax(-1) == codes
    loss, aux = generator.loss()
    close(loss, nll.mean())
    close(aux.metrics["nll"], nll.mean())
    close(aux.metrics["accuracy"], correct.mean())
    schedule = generator.objective.system.schedule
    if len(schedule.grids) > 1:
        groups = {f"scale_{k:02d}": schedule.step_id == k for k in range(3)}
    else:
        quarter = np.arange(16) // 4
        groups = {f"quarter_{k}": quarter == k for k in range(4)}
    assert len(aux.metrics) == 2 * len(groups) + 2
    for name, rows in groups.items():
        close(aux.metrics[f"nll/{name}"], nll[:, rows].mean())
        close(aux.metrics[f"accuracy/{name}"], correct[:, rows].mean())


def test_label_smoothing_is_for_training(generator):
    log_p = log_probabilities(generator)
    nll = -picked(log_p, generator.batch["codes"]).mean()
    smoothed = 0.8 * nll + 0.2 * -log_p.mean(-1).mean()
    fields = dict(label_smoothing=0.2, label_dropout=0.0)
    loss, aux = generator.loss(train=True, **fields)
    close(loss, smoothed)
    close(aux.metrics["nll"], nll)
    close(generator.loss(train=False, **fields)[0], nll)


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["next_scale"], indirect=True)
def test_self_correction_trains_on_what_the_model_drew(generator):
    objective = dataclasses.replace(generator.objective, label_dropout=0.0, self_correction=0.8)
    system, codes = objective.system, generator.batch["codes"]
    log_p = log_probabilities(generator)
    keys = jax.random.split(jax.random.split(KEY, 5)[4], 3)
    share = 0.8 * jax.random.uniform(keys[0], (BATCH, 1))
    wrong = jax.random.bernoulli(keys[1], share, codes.shape)
    drawn = jnp.argmax(log_p + jax.random.gumbel(keys[2], log_p.shape), axis=-1).astype(jnp.int32)
    tokenizer = generator.frozen["tokenizer"]
    right, contexts = apply(system.tokenizer, tokenizer, codes, drawn, wrong, method="correct")
    assert (np.asarray(right) != np.asarray(codes)).mean() > 0.1
    hidden, _ = apply(
        system.backbone, generator.params["backbone"], contexts, {"label": generator.batch["label"]}
    )
    logits = apply(system.head, generator.params["head"], hidden)
    nll = system.head.loss(logits, right).mean()
    fields = dict(label_dropout=0.0, self_correction=0.8)
    close(generator.loss(train=True, **fields)[0], nll)
    assert abs(float(nll) - float(generator.loss(train=True, label_dropout=0.0)[0])) > 1e-3
    close(generator.loss(train=False, **fields)[0], generator.loss(train=False)[0])


@pytest.mark.slow  # gradients of two models
def test_label_dropout_trains_the_null_condition(generator):
    conditioner = generator.objective.system.backbone.conditioner
    cond = {"label": generator.batch["label"]}
    codes = generator.batch["codes"]
    given = picked(log_probabilities(generator), codes).mean(1)
    null = picked(log_probabilities(generator, conditioner.null(cond)), codes).mean(1)
    close(generator.loss(train=True, label_dropout=1.0)[0], -null.mean())
    close(generator.loss(train=True, label_dropout=0.0)[0], -given.mean())
    close(generator.loss(train=False, label_dropout=1.0)[0], -given.mean())
    drop = jax.random.bernoulli(jax.random.split(KEY, 3)[0], 0.4, (BATCH,))
    assert 0 < int(drop.sum()) < BATCH
    mixed = np.where(drop, null, given)
    close(generator.loss(train=True, label_dropout=0.4)[0], -mixed.mean())
    other = generator.loss(train=True, label_dropout=0.4, key=jax.random.key(6))[0]
    assert abs(float(other) + mixed.mean()) > 1e-4


def test_null_labels():
    system, _ = toy_system("raster")
    conditioner = system.backbone.conditioner
    labels = toy_labels(5)
    np.testing.assert_array_equal(conditioner.null(labels)["label"], [3] * 5)
    drop = jnp.array([True, False, True, False, False])
    np.testing.assert_array_equal(conditioner.null(labels, drop)["label"], [3, 1, 3, 0, 1])
    assert jax.tree.map(jnp.shape, conditioner.empty(5)) == {"label": (5,)}


def test_padding_rows_do_not_count(generator):
    rows = jax.tree.map(lambda a: a[:5], generator.batch)
    expected = loss_of(generator.objective, generator.params, {}, generator.frozen, rows)
    mask = (jnp.arange(BATCH) < 5).astype(jnp.float32)
    padded = dataclasses.replace(generator, batch=generator.batch | {"mask": mask})
    close(padded.loss(), expected)


def test_images_are_encoded_by_the_frozen_tokenizer(generator):
    system = generator.objective.system
    shape = (4, *system.tokenizer.image_shape)
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.uint8)
    codes = apply(
        system.tokenizer, generator.frozen["tokenizer"], to_float(images), method="encode"
    )
    labels = toy_labels(4)
    run = functools.partial(loss_of, generator.objective, generator.params, {}, generator.frozen)
    close(run(labels | {"image": images}), run(labels | {"codes": codes}))


def test_likelihood_on_one_and_on_eight_devices(generator):
    objective = dataclasses.replace(generator.objective, label_dropout=0.3)
    one = gradient_of(objective, generator.params, {}, generator.frozen, generator.batch)
    eight = gradient_of(
        objective,
        replicated(generator.params),
        {},
        replicated(generator.frozen),
        sharded(generator.batch),
    )
    close(one[1].metrics, eight[1].metrics)
    close(one[0], eight[0], rtol=1e-4, atol=1e-5)
