"""Systems that draw groups of codes, from tokenizer to report, at smoke size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.compilation import ahead, trials
from ar_jax.compilation import target as targets
from ar_jax.evaluation.load import load_system, load_tokenizer
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.evaluation.samples import sample_workdir
from ar_jax.io.checkpoint import load_params
from ar_jax.parallel.mesh import use_mesh
from ar_jax.train.run import train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import CUBE, losses, losses_on_one_device, smoke_config, write_fashion

# By default test_ordered_decoders.py, test_distant_groups.py and test_shuffled_decoder.py stand for
# it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

# System -> (its tokenizer, codes of an image).
SYSTEMS = {
    "randar": ("tokenizer_vq", 49),
    "arpg": ("tokenizer_vq", 49),
    "par": ("tokenizer_vq_fine", 196),
    "token_shuffle": ("tokenizer_vq_fine", 196),
}
BATCH = 10


def config_of(name: str, source: str) -> Any:
    axes = {f"mesh__{axis}": size for axis, size in CUBE.items()}
    train = {"train__eval_batches": 0, "train__preview_every": 0}
    return smoke_config(name, data__source=source, **train, **axes)


@pytest.fixture(scope="module")
def images(tmp_path_factory, quick_compilation) -> Path:  # noqa: F811
    folder = tmp_path_factory.mktemp("orders")
    write_fashion(folder / "images")
    return folder


@pytest.fixture(scope="module", params=SYSTEMS)
def system(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def run(system, images) -> tuple[Any, Path]:
    """(config, workdir) of a trained generator."""
    name, _ = SYSTEMS[system]
    source = f"idx:{images / 'images'}"
    if not (images / name).exists():
        assert train_and_evaluate(config_of(name, source), images / name).finished
    config = config_of(system, source)
    config.tokenizer_checkpoint = str(images / name)
    assert train_and_evaluate(config, images / system).finished
    return config, images / system


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


def test_samples_and_their_forming(system, run, tmp_path):
    (_, workdir), (_, length) = run, SYSTEMS[system]
    settings: dict[str, Any] = dict(labels=[7, 2], per_class=5, batch_size=BATCH)
    drawn = sample_workdir(workdir, tmp_path / "grid.png", strip=True, **settings)
    assert drawn.codes.shape == (10, length) and drawn.order is not None
    np.testing.assert_array_equal(np.sort(drawn.order), np.arange(length)[None].repeat(10, 0))
    side = 28 * 3 + 2
    steps = load_system(workdir)[1].schedule.num_steps
    with Image.open(tmp_path / "grid_strip.png") as picture:
        assert picture.size == (min(steps, 10) * side - 2, 2 * side - 2)
    again = sample_workdir(workdir, tmp_path / "b.png", **settings)
    np.testing.assert_array_equal(again.images, drawn.images)


def test_reports(system, run, tmp_path):
    report = evaluate_workdir(run[1], tmp_path / "report", num_images=50, batch_size=BATCH)
    assert {"generation", "likelihood", "bound"} <= set(report)
    nats = report["likelihood"]["metrics"]["nats_per_image"]["value"]
    assert 0 < nats < 1.5 * SYSTEMS[system][1] * np.log(32)


@pytest.mark.parametrize("name", SYSTEMS)
def test_programs_are_lowered_for_a_topology(name, monkeypatch):
    for module in (targets, trials):
        monkeypatch.setattr(module, "topology_devices", lambda *_: jax.devices()[:4])

    def lower_only(target: Any, lower: Any) -> None:
        with use_mesh(target.mesh):
            lower()

    monkeypatch.setattr(ahead, "compile_for", lower_only)
    monkeypatch.setattr(ahead, "report", lambda *arguments: {"flops": arguments[4]})
    config = smoke_config(name, attention="xla")
    flops = ahead.compile_train_step(config, "v5e:2x2", batch_size=8)["flops"]
    assert flops > ahead.compile_sampler(config, "v5e:2x2", batch_size=8)["flops"] > 0
