"""FractalAR and FractalMAR at smoke size: eight devices, a resumed run, samples, programs."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.build import create_sampler
from ar_jax.compilation import ahead, trials
from ar_jax.compilation import target as targets
from ar_jax.evaluation.edits import edit_images
from ar_jax.evaluation.load import load_system
from ar_jax.evaluation.samples import sample_workdir
from ar_jax.io.checkpoint import load_params
from ar_jax.parallel.mesh import use_mesh
from ar_jax.train.run import train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import CUBE, losses, losses_on_one_device, smoke_config, write_fashion

# By default test_fractal.py and test_sampling_nested.py stand for it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


# What configs/fashion_mnist/fractal.py tells the reader to set for levels of masked sets.
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "masked": dict(
        schedule__iterations=(12, 8),
        backbone__conditions=5,
        sampling__guidance__kind="linear_known",
    ),
}


def config_of(source: str, kind: str = "causal") -> Any:
    axes = {f"mesh__{axis}": size for axis, size in CUBE.items()}
    changes = KINDS[kind] | dict(data__source=source, train__eval_batches=0)
    return smoke_config("fractal", **changes, **axes)


@pytest.fixture(scope="module", params=KINDS)
def run(request, tmp_path_factory, quick_compilation) -> tuple[Any, Path]:  # noqa: F811
    """(config, workdir) of a trained generator."""
    folder = tmp_path_factory.mktemp("fractal")
    config = config_of(write_fashion(folder / "images"), request.param)
    assert train_and_evaluate(config, folder / "run").finished
    return config, folder / "run"


def test_eight_devices_train_as_one(run):
    config, workdir = run
    expected = losses_on_one_device(config, {"tokenizer": {}})
    np.testing.assert_allclose(losses(workdir), expected, rtol=5e-5)


def test_a_run_goes_on_exactly_from_its_middle(run, tmp_path):
    config, workdir = run
    shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "4")
    outcome = train_and_evaluate(config, tmp_path / "run")
    assert outcome.finished and outcome.step == 4
    again, whole = (load_params(path, "params") for path in (tmp_path / "run", workdir))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_samples_and_edits(run, tmp_path):
    """Pixels that are kept stay as they are, at either kind of level."""
    _, workdir = run
    settings: dict[str, Any] = dict(labels=[7, 2], per_class=5, batch_size=10)
    drawn = sample_workdir(workdir, tmp_path / "grid.png", **settings)
    assert drawn.images.shape == (10, 28, 28, 1) and (drawn.images[0] != drawn.images[1]).any()
    again = sample_workdir(workdir, tmp_path / "b.png", **settings)
    np.testing.assert_array_equal(again.images, drawn.images)
    _, system, params = load_system(workdir)
    images, mask = drawn.images[:2], np.zeros((2, 28, 28), bool)
    mask[:, 6:20, 9:] = True
    sampler = create_sampler(system, params)
    # Another seed: a generator of four steps draws the same pixels of the same noise.
    asked = np.array([3, 4])
    edited, found = edit_images(sampler, images, mask, asked, seed=1, batch_size=2)
    np.testing.assert_array_equal(edited[~mask], images[~mask])
    assert not np.asarray(found.keep).all() and (edited[mask] != images[mask]).any()


def test_programs_are_lowered_for_a_topology(monkeypatch):
    for module in (targets, trials):
        monkeypatch.setattr(module, "topology_devices", lambda *_: jax.devices()[:4])

    def lower_only(target: Any, lower: Any) -> None:
        with use_mesh(target.mesh):
            lower()

    monkeypatch.setattr(ahead, "compile_for", lower_only)
    monkeypatch.setattr(ahead, "report", lambda *arguments: {"flops": arguments[4]})
    config = config_of("synthetic")
    config.update(attention="xla")
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    assert ahead.compile_train_step(config, "v5e:2x2", batch_size=8)["flops"] > 0
    assert ahead.compile_sampler(config, "v5e:2x2", batch_size=8)["flops"] > 0
    ahead.compile_decoder(config, "v5e:2x2", batch_size=8)
