"""Images that no picture holds, and smaller than the window of SSIM: left out, with the reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.convert.conversion import Converted
from ar_jax.convert.directory import write_directory
from ar_jax.data import from_config
from ar_jax.evaluation.illustrated import draw_samples
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.evaluation.samples import Generated, sample_workdir
from ar_jax.train.preview import build_preview
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.tiny_runs import tiny_generator, tiny_tokenizer
from tests.toy_systems import toy_params

CHANNELS = 2


def with_channels(config: Any) -> Any:
    config.data.channels = config.tokenizer.autoencoder.image_channels = CHANNELS
    config.ema.decay = 0.0
    return config


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> Path:
    """Holds a 'tokenizer' and a 'generator' of 8x8 images, as if they had been trained."""
    folder = tmp_path_factory.mktemp("other")
    config = with_channels(tiny_generator(""))
    objective: Any = build_objective(config)
    params = toy_params(objective.system)
    own = with_channels(tiny_tokenizer()).to_dict()
    write_directory(Converted(own, params["tokenizer"], "tokenizer"), folder / "tokenizer")
    write_directory(Converted(config.to_dict(), params, "generator"), folder / "generator")
    return folder


@pytest.mark.usefixtures("quick_compilation")
def test_evaluation_finishes_without_them(workdirs, tmp_path):
    report = evaluate_workdir(workdirs / "tokenizer", tmp_path, batch_size=100, progress=False)
    assert list(report) == ["model", "reconstruction", "codebook", "left_out"]
    similarity = report["reconstruction"]["metrics"]["ssim"]
    assert similarity["value"] is None
    assert similarity["measured"] == (
        "left out: the images are smaller than its window of 11x11 pixels"
    )
    assert report["reconstruction"]["metrics"]["psnr"]["value"] > 0
    assert not report["reconstruction"]["pictures"]
    assert "these have 2 channels, a picture 1 or 3" in report["left_out"]["about"]
    assert "| ssim | – | left out" in (tmp_path / "report.md").read_text()


def test_a_report_has_no_pictures_of_samples(tmp_path):
    images = np.zeros((4, 8, 8, CHANNELS), np.uint8)
    drawn = Generated(images, np.arange(4, dtype=np.int32), np.zeros((4, 21), np.int32))
    nobody: Any = None  # draws nothing
    assert draw_samples(nobody, drawn, 4, tmp_path) == {}
    assert not list(tmp_path.iterdir())


def test_a_picture_of_samples_is_refused_before_they_are_drawn(workdirs, tmp_path):
    with pytest.raises(ValueError, match=r"a\.png: .* have 2 channels, a picture 1 or 3; evaluate"):
        sample_workdir(workdirs / "generator", tmp_path / "a.png", num_images=4)


@pytest.mark.parametrize("config", [tiny_tokenizer(), tiny_generator("")], ids=["own", "system"])
def test_training_has_no_previews_of_them(config, caplog):
    config = with_channels(config)
    test = from_config(config.data, "test")
    assert build_preview(config, build_objective(config), test) is None
    assert "no preview: images of config.data.channels=2" in caplog.text
