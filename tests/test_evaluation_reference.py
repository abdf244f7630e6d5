"""Trained systems against a reference: samples that are drawn, reconstructions of test images."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.evaluation.files import evaluate_samples
from ar_jax.evaluation.report import read_report
from ar_jax.evaluation.run import evaluate_workdir
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.toy_extractor import brightness_against, write_untrained

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.slow]

NUM = 8  # samples, two of each class


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("untrained")
    write_untrained(folder)
    return folder


def test_samples_that_are_drawn_are_measured_like_stored_ones(workdirs, tmp_path):
    standard = brightness_against(tmp_path, NUM)
    fields: Any = dict(num_images=NUM, batch_size=NUM, progress=False)
    report = evaluate_workdir(
        workdirs / "generator", tmp_path / "report", likelihood_images=8, standard=standard,
        **fields,
    )  # fmt: skip
    section = report["standard"]
    distance = section["metrics"][f"toy_frechet_distance@{NUM}"]["value"]
    assert "8 samples (2 of each of 4 classes)" in str(section["metrics"])
    drawn = "guidance 1.5 (constant), temperature 1, parameters of step 0, seed 0"
    assert drawn in section["about"]
    assert "psnr" in report["reconstruction"]["metrics"]  # of a few images, which give no rFID
    assert not any("distance" in name for name in report["reconstruction"]["metrics"])

    evaluate_samples(tmp_path / "report" / "samples.npz", tmp_path / "stored", standard)
    stored = read_report(tmp_path / "stored")["standard"]
    assert stored["metrics"][f"toy_frechet_distance@{NUM}"]["value"] == distance
    assert f"{drawn}; drawn by ar_jax" in stored["about"]

    np.savez(tmp_path / "larger.npz", arr_0=np.zeros((20, 16, 16, 1), np.uint8))
    other = dataclasses.replace(standard, reference=str(tmp_path / "larger.npz"))
    with pytest.raises(ValueError, match="must be of the samples' resolution"):
        evaluate_workdir(workdirs / "generator", tmp_path / "refused", standard=other, **fields)
    assert not (tmp_path / "refused").exists()  # before anything was drawn


def test_reconstructions_are_measured_against_the_test_images(workdirs, tmp_path):
    against = brightness_against(tmp_path, 40)
    fields: Any = dict(batch_size=20, progress=False)
    standard = dataclasses.replace(against, reference=None)
    report = evaluate_workdir(
        workdirs / "tokenizer", tmp_path / "report", standard=standard, **fields
    )
    metrics = report["reconstruction"]["metrics"]
    assert metrics["toy_reconstruction_distance@40"]["value"] > 0
    assert "the same images of synthetic" in (metrics["toy_reconstruction_distance@40"]["measured"])
    assert "40 test images" in metrics["psnr"]["measured"]

    def refused(message: str, standard: Any) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate_workdir(workdirs / "tokenizer", tmp_path / "no", standard=standard, **fields)

    refused("reconstructions are compared with the test images that they are of", against)
    rules = dataclasses.replace(standard.rules, num_images=3)
    refused("3 images give no covariance", dataclasses.replace(standard, rules=rules))
    rules = dataclasses.replace(standard.rules, num_images=None)
    refused("say --num_images=", dataclasses.replace(standard, rules=rules))
