"""Infinity from tokenizer to report, at smoke size: cached bits, eight devices, resuming, edits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.data import open_source
from ar_jax.evaluation.cache import cache_codes
from ar_jax.evaluation.load import load_tokenizer
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.evaluation.samples import sample_workdir
from ar_jax.io.checkpoint import load_params
from ar_jax.train.run import train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import CUBE, losses, losses_on_one_device, smoke_config, write_fashion

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

LENGTH, BITS = 70, 5


def config_of(name: str, source: str, **changes: Any) -> Any:
    axes = {f"mesh__{axis}": size for axis, size in CUBE.items()}
    train = {"train__eval_batches": 0, "train__preview_every": 0}
    return smoke_config(name, data__source=source, **train, **axes, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compilation) -> Path:  # noqa: F811
    """A trained tokenizer and its codes."""
    folder = tmp_path_factory.mktemp("infinity")
    source = write_fashion(folder / "images")
    config = config_of("tokenizer_bitwise", source)
    assert train_and_evaluate(config, folder / "tokenizer").finished
    cache_codes(folder / "tokenizer", folder / "codes", progress=False)
    return folder


@pytest.fixture(scope="module")
def run(folder) -> tuple[Any, Path]:
    """(config, workdir) of a generator trained on the codes."""
    config = config_of("infinity", f"codes:{folder / 'codes'}")
    config.tokenizer_checkpoint = str(folder / "tokenizer")
    assert train_and_evaluate(config, folder / "generator").finished
    return config, folder / "generator"


def test_cached_bits(folder):
    item = open_source(f"codes:{folder / 'codes'}", "train")[0]
    assert item["codes"].shape == (LENGTH, BITS) and item["codes"].dtype == np.int8


def test_eight_devices_train_as_one(run):
    config, workdir = run
    frozen = {"tokenizer": load_tokenizer(config.tokenizer_checkpoint)[2]}
    expected = losses_on_one_device(config, frozen)
    np.testing.assert_allclose(losses(workdir), expected, rtol=5e-5)


def test_a_run_goes_on_exactly_from_its_middle(run, tmp_path):
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    outcome = train_and_evaluate(config, tmp_path / "run")
    assert outcome.finished and outcome.step == 4
    again, whole = (load_params(path, "params") for path in (tmp_path / "run", workdir))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_samples_and_a_report(run, tmp_path):
    settings: dict[str, Any] = dict(labels=[7, 2], per_class=5, batch_size=10)
    drawn = sample_workdir(run[1], tmp_path / "grid.png", strip=True, **settings)
    assert drawn.codes.shape == (10, LENGTH, BITS) and drawn.codes.dtype == np.int8
    report = evaluate_workdir(run[1], tmp_path / "report", num_images=50, batch_size=10)
    assert {"generation", "likelihood", "bound"} <= set(report)
    nats = report["likelihood"]["metrics"]["nats_per_image"]["value"]
    assert 0 < nats < 1.5 * LENGTH * BITS * np.log(2)


def test_captions_are_trained_on_and_drawn_for(folder, tmp_path):
    """Of each class one, beside cached codes: features that the blocks attend to."""
    rng = np.random.default_rng(0)
    caption = rng.standard_normal((10, 4, 16)).astype(np.float32)
    mask = np.arange(4)[None] <= np.arange(10)[:, None] % 4
    codes = f"codes:{folder / 'codes'}"
    for split in ("train", "test"):
        source = open_source(codes, split)
        labels = [int(source[i]["label"]) for i in range(len(source))]
        file = tmp_path / f"{split}.npz"
        np.savez(file, caption=caption, caption_mask=mask, caption_of=labels)
    config = config_of("infinity", codes, backbone__condition="text")
    config.data.captions = str(tmp_path)
    config.tokenizer_checkpoint = str(folder / "tokenizer")
    assert train_and_evaluate(config, tmp_path / "run").finished
    params = load_params(tmp_path / "run", "params")["backbone"]["condition"]
    assert set(params) == {"null_caption"}  # no table of classes
    trained = losses(tmp_path / "run")
    assert len(trained) == 4 and np.isfinite(trained).all()
    drawn = sample_workdir(
        tmp_path / "run", tmp_path / "a.png", captions=tmp_path / "train.npz", batch_size=10
    )
    assert drawn.codes.shape == (10, LENGTH, BITS)
