"""xAR and FlowAR on Fashion-MNIST by the demo, at smoke size: what entities change."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.evaluation.load import load_tokenizer
from ar_jax.evaluation.report import read_report
from ar_jax.evaluation.samples import sample_workdir
from ar_jax.io.checkpoint import load_params
from ar_jax.train.run import train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import CUBE, losses, losses_on_one_device, script, smoke_config, write_fashion

# By default test_flow.py, test_noisy_decoder.py, test_objectives_flow.py and test_sampling_flow.py
# stand for it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

BATCH, SAMPLES = 10, 50
SYSTEMS = ("xar", "flowar")


def adapted(source: str, name: str, mode: str = "smoke") -> Any:
    config = smoke_config(name, data__source=source)
    config.train.update(eval_batches=0, preview_every=4)
    config.mesh.update(CUBE)
    return config


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def demo(system, tmp_path_factory, quick_compilation) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp(system)
    load = functools.partial(adapted, write_fashion(folder / "images"))
    arguments = (f"--system={system}", f"--workdir={folder / 'demo'}", "--mode=smoke")
    with (
        script("demo", *arguments, f"--num_images={SAMPLES}") as module,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(module, "load_config", load)
        evaluate = functools.partial(module.evaluate_workdir, batch_size=BATCH)
        patch.setattr(module, "evaluate_workdir", evaluate)
        patch.setattr(module, "cache_codes", functools.partial(module.cache_codes, batch_size=64))
        module.main(["demo"])
    return folder / "demo"


def generator_config(system: str, demo: Path) -> Any:
    config = adapted("", system)
    config.tokenizer_checkpoint = str(demo / "tokenizer")
    config.data.source = f"codes:{demo / 'codes'}"
    return config


def test_eight_devices_train_as_one(system, demo):
    frozen = {"tokenizer": load_tokenizer(demo / "tokenizer")[2]}
    expected = losses_on_one_device(generator_config(system, demo), frozen)
    np.testing.assert_allclose(losses(demo / "generator"), expected, rtol=5e-5)


def test_a_run_goes_on_exactly_from_its_middle(system, demo, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(demo / "generator", run)
    shutil.rmtree(run / "checkpoints" / "4")
    outcome = train_and_evaluate(generator_config(system, demo), run)
    assert outcome.finished and outcome.step == 4
    again, whole = (load_params(path, "params") for path in (run, demo / "generator"))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_the_report(demo):
    report = read_report(demo)
    assert list(report) == [
        "model", "generation", "memorisation", "held_out", "reconstruction", "bound", "training",
    ]  # fmt: skip
    held_out = {name: entry["value"] for name, entry in report["held_out"]["metrics"].items()}
    assert held_out["loss"] > 0 and "no likelihood" in report["held_out"]["about"]


def test_samples(demo, tmp_path):
    where: Any = dict(labels=[7, 2], per_class=5, batch_size=BATCH)
    drawn = sample_workdir(demo / "generator", tmp_path / "a.png", strip=True, **where)
    assert drawn.codes.shape[::2] == (10, 4) and drawn.codes.dtype == np.float32
    side = 28 * 3 + 2
    with Image.open(tmp_path / "a_strip.png") as picture:
        assert picture.size == (4 * side - 2, 2 * side - 2)  # an image after each step
    again = sample_workdir(demo / "generator", tmp_path / "b.png", **where)
    np.testing.assert_array_equal(again.images, drawn.images)
