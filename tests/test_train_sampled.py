"""Samples that are judged while a generator trains."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest

from ar_jax.build import create_sampler
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import load_system
from ar_jax.evaluation.samples import generate, sampling_of
from ar_jax.train import sampled
from ar_jax.train.fields import TrainFields
from ar_jax.train.run import train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.tiny_runs import tiny_tokenizer
from tests.toy_extractor import write_untrained

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.slow  # compiles two samplers
def test_they_are_the_samples_that_evaluation_would_draw(tmp_path, monkeypatch):
    write_untrained(tmp_path)
    config, system, params = load_system(tmp_path / "generator")
    labels = balanced_labels(6, 4)
    knobs, guidance = sampling_of(config)
    drawn = generate(
        create_sampler(system, params), labels, seed=config["seed"], knobs=knobs, guidance=guidance
    )
    seen = []

    def score(judge, images, labels):
        seen.append((judge, images, labels))
        return {"class_accuracy": 0.5}

    monkeypatch.setattr(sampled, "score_samples", score)
    monkeypatch.setattr(sampled, "BATCH_SIZE", 4)  # the second batch is half full
    judge: Any = object()
    measure = sampled.measure_with(judge, config, system, labels)
    tokenizer = {"tokenizer": params["tokenizer"]}
    trained = {name: params[name] for name in ("backbone", "head")}
    assert measure(trained, tokenizer) == {"class_accuracy": 0.5}
    ((judged_by, images, asked),) = seen
    assert judged_by is judge and asked.tolist() == labels.tolist()
    assert images.dtype == np.uint8 and len(np.unique(images, axis=0)) == 6
    np.testing.assert_array_equal(images, drawn.images)


def test_what_cannot_be_judged_is_said_before_training(tmp_path):
    write_untrained(tmp_path)
    config, system, params = load_system(tmp_path / "generator")
    objective = types.SimpleNamespace(system=system)
    for count, message in (
        (6, "config.train.sample_images=6 is no multiple of the 4 classes"),
        (8, "config.train.sample_images=8: nothing judges the samples. The images are"),
    ):
        with pytest.raises(ValueError, match=message):
            sampled.build_measure(config, objective, params["tokenizer"], count)


def test_a_tokenizer_draws_none(tmp_path):
    config = tiny_tokenizer()
    config.train.sample_images = 8
    with pytest.raises(ValueError, match="sample_images=8, but a tokenizer draws none"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_they_need_evaluations():
    fields: dict[str, Any] = {"steps": 4, "batch_size": 8, "log_every": 1, "preview_every": 0}
    with pytest.raises(ValueError, match=r"sample_images=8 .* config\.train\.eval_every=0"):
        TrainFields(**fields, checkpoint_every=2, eval_every=0, sample_images=8)
