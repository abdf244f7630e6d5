"""FractalAR at smoke size: eight devices, a resumed run, programs for a topology."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from ar_jax.compilation import ahead, trials
from ar_jax.compilation import target as targets
from ar_jax.io.checkpoint import load_params
from ar_jax.parallel.mesh import use_mesh
from ar_jax.train.run import train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import CUBE, losses, losses_on_one_device, smoke_config, write_fashion

# By default test_fractal.py and test_sampling_nested.py stand for it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]


def config_of(source: str) -> Any:
    axes = {f"mesh__{axis}": size for axis, size in CUBE.items()}
    return smoke_config("fractal", data__source=source, train__eval_batches=0, **axes)


@pytest.fixture(scope="module")
def run(tmp_path_factory, quick_compilation) -> tuple[Any, Path]:  # noqa: F811
    """(config, workdir) of a trained generator."""
    folder = tmp_path_factory.mktemp("fractal")
    config = config_of(write_fashion(folder / "images"))
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
