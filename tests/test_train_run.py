"""Real systems through `train_and_evaluate`: tokenizer, then generator, and what it refuses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.build import build_objective
from ar_jax.data import CodesWriter, from_config
from ar_jax.io.checkpoint import load_params, load_system_params, tree_digest
from ar_jax.io.metrics import JSONL, read_jsonl
from ar_jax.parallel.mesh import make_mesh
from ar_jax.parallel.rules import check_coverage, shardings
from ar_jax.train.loop import Outcome
from ar_jax.train.run import check_codes, count_skips, train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.test_train_resume import assert_same_run, losses
from tests.tiny_runs import SCALES, tiny_generator, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = Path(__file__).resolve().parent.parent


def restarting_tokenizer() -> Any:
    """Whose histogram forgets so fast that every step restarts the codes it used less than most."""
    config = tiny_tokenizer()
    config.objective.update(usage_decay=0.05, restart_below=0.9)
    return config


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Outcome]:
    """A tokenizer's workdir, and how its run ended."""
    workdir = tmp_path_factory.mktemp("run") / "tokenizer"
    outcome = train_and_evaluate(restarting_tokenizer(), workdir)
    assert outcome.finished
    return workdir, outcome


@pytest.fixture(scope="module")
def tokenizer(trained) -> Path:
    return trained[0]


@pytest.fixture(scope="module")
def generator(tokenizer) -> Path:
    workdir = tokenizer.parent / "generator"
    config = tiny_generator(str(tokenizer))
    assert train_and_evaluate(config, workdir).finished
    return workdir


def names(workdir: Path) -> set[str]:
    records = read_jsonl(workdir / JSONL)
    assert [r["step"] for r in records] == [1, 2, 3, 3]
    assert all(np.isfinite(value) for record in records for value in record.values())
    return set().union(*records)


@pytest.mark.slow  # trains; that of a generator stays
def test_tokenizer_run(tokenizer):
    assert {"train/loss", "eval/psnr", "train/usage/scale_02"} <= names(tokenizer)
    picture = np.asarray(Image.open(tokenizer / "previews" / "reconstructions_00000003.png"))
    assert picture.shape == (10 * 8 + 9 * 2, 8 * 8 + 7 * 2)


def stopped_at_two(workdir: Path, copy: Path) -> Path:
    """A copy of a run of three steps as it was after the second."""
    shutil.copytree(workdir, copy)
    for step in (copy / "checkpoints").iterdir():
        if int(step.name) > 2:
            shutil.rmtree(step)
    return copy


@pytest.mark.slow
def test_a_tokenizer_goes_on_exactly(trained, tmp_path):
    """Restarts and what they go by included."""
    workdir, whole = trained
    config = restarting_tokenizer()
    config.train.preview_every = config.train.eval_every = 0
    moved = stopped_at_two(workdir, tmp_path / "moved")
    outcome = train_and_evaluate(config, moved)
    assert outcome.finished
    for part in ("params", "ema", "opt_state", "stats"):
        one, two = (jax.device_get(getattr(o.state, part)) for o in (whole, outcome))
        jax.tree.map(np.testing.assert_array_equal, one, two)
    assert losses(moved) == [line for line in losses(workdir) if line[1].startswith("train/")]
    histogram = np.asarray(outcome.state.stats["histogram"])  # [scales, V]
    restarted = (histogram == np.float32(1 / 16)).all(0)
    assert restarted.any() and not restarted.all()


def test_generator_run_keeps_its_tokenizer(tokenizer, generator, tmp_path):
    assert {"train/loss", "eval/nll", "train/nll/scale_02", "speed/tokens_per_second"} <= names(
        generator
    )
    picture = np.asarray(Image.open(generator / "previews" / "samples_00000003.png"))
    assert picture.shape == (4 * 8 + 3 * 2, 8 * 8 + 7 * 2)  # a row for each of the four classes
    params = load_system_params(generator)
    assert params.keys() == {"tokenizer", "backbone", "head"}
    original = load_params(tokenizer, "ema")
    jax.tree.map(np.testing.assert_array_equal, params["tokenizer"], original)

    # With its first tokenizer gone it still goes on: the workdir holds all it needs.
    moved = stopped_at_two(generator, tmp_path / "moved")
    shutil.move(tokenizer, tmp_path / "hidden")
    config = tiny_generator(str(tokenizer))
    config.train.preview_every = 0
    try:
        assert train_and_evaluate(config, moved).finished
    finally:
        shutil.move(tmp_path / "hidden", tokenizer)
    jax.tree.map(np.testing.assert_array_equal, load_system_params(moved), params)
    assert_same_run(moved, generator)


@pytest.mark.slow
def test_the_script_takes_a_workdir_s_own_config(tokenizer):
    """Finished already, so it only starts, restores and ends."""
    command = [sys.executable, "experiments/train.py", f"--config={tokenizer / 'config.py'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def run(*more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*command, *more], cwd=ROOT, env=environment, capture_output=True, text=True
        )

    done = run(f"--workdir={tokenizer}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "process 0/1, " in done.stderr
    assert f"workdir {tokenizer}: finished already at step 3 of 3" in done.stderr
    assert "quantizer/codebook" in done.stderr
    typo = run(f"--workdir={tokenizer}", "--config.train.stepz=4")
    assert typo.returncode != 0 and "stepz" in typo.stderr
    assert run().returncode != 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokenizer_checkpoint": ""}, "config.tokenizer_checkpoint is empty: train a tokenizer"),
        ({"tokenizer_checkpoint": "nowhere"}, "nowhere/config.json does not exist"),
        ({"tokenizer.autoencoder.latent": 16}, "tokenizer.autoencoder.latent"),
        ({"head.vocab_size": 32}, "head.vocab_size is 32"),
        ({"backbone.num_classes": 5}, "config.backbone.num_classes=5, but config.data.num_cl"),
        ({"data.image_size": 16}, r"config.data.image_size=16 .* for \(8, 8, 1\)"),
        ({"train.batch_size": 12}, "config.train.batch_size=12"),
        ({"optimizer.schedule": "exp"}, "config.optimizer.schedule='exp'"),
        ({"sampling.topk": 5, "train.preview_every": 0}, "sampling.topk = 5 is unknown; .*top_k"),
        ({"sampling.guidance.start": 3}, "guidance.start is 3, .* the steps 0 to 2"),
        ({"sampling.step_top_k": (5, 6)}, "step_top_k has 2 numbers; the schedule has 3 steps"),
        ({"mesh.data": 3}, "config.mesh asks for 3 devices"),
        ({"mesh.tensor": 8}, r"dimension \d \(heads\) is 2, which config.mesh.tensor=8"),
    ],
)
def test_bad_generators_are_refused_before_anything_is_written(
    tokenizer, tmp_path, change, message
):
    config = tiny_generator(str(tokenizer))
    config.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unknown_and_missing_sections_are_named(tmp_path):
    config = tiny_tokenizer()
    config.optimiser = config.optimizer
    with pytest.raises(ValueError, match="config.optimiser is no section; .*optimizer"):
        train_and_evaluate(config, tmp_path / "run")
    config = tiny_tokenizer()
    config.attention = "splash"  # a tokenizer's convolutions read no such field
    with pytest.raises(ValueError, match="config.attention is no section"):
        train_and_evaluate(config, tmp_path / "run")
    config = tiny_generator("x")
    del config.sampling
    with pytest.raises(ValueError, match="config.sampling is missing"):
        train_and_evaluate(config, tmp_path / "run")
    with pytest.raises(ValueError, match="config.objective is missing"):
        train_and_evaluate({}, tmp_path / "run")


def write_codes(folder: Path, params, sizes=(1, 4, 16), vocabulary_size: int = 16) -> None:
    for split in ("train", "test"):
        with CodesWriter(
            folder / split,
            split,
            sizes=sizes,
            copies=1,
            vocabulary_size=vocabulary_size,
            num_classes=4,
            tokenizer={"digest": tree_digest(params)},
            image_size=8,
            channels=1,
        ) as writer:
            count = 32
            rng = np.random.default_rng(0)
            writer.write(rng.integers(0, 16, (count, 1, sum(sizes))), np.arange(count) % 4)


def test_cached_codes_must_be_this_tokenizer_s(tokenizer, tmp_path):
    params = load_params(tokenizer, "ema")
    config = tiny_generator(str(tokenizer))
    system = build_objective(config).system  # type: ignore[attr-defined]

    def check(folder: Path, **fields) -> None:
        write_codes(folder, **fields)
        config.data.source = f"codes:{folder}"
        check_codes(config, system, params)

    check(tmp_path / "a", params=params)
    other = jax.tree.map(lambda x: x + 1, params)
    with pytest.raises(ValueError, match="written with the tokenizer of digest"):
        check(tmp_path / "b", params=other)
    with pytest.raises(ValueError, match=r"steps of \(5, 16\) codes, config.schedule makes"):
        check(tmp_path / "c", params=params, sizes=(5, 16))
    with pytest.raises(ValueError, match="holds codes below 17, the tokenizer has 16"):
        check(tmp_path / "d", params=params, vocabulary_size=17)


@pytest.mark.slow  # test_experiments_systems.py does, with losses equal to those of the images
def test_a_generator_trains_on_cached_codes(tokenizer, tmp_path):
    write_codes(tmp_path / "codes", load_params(tokenizer, "ema"))
    config = tiny_generator(str(tokenizer))
    config.update_from_flattened_dict(
        {"data.source": f"codes:{tmp_path / 'codes'}", "train.preview_every": 0, "train.steps": 2}
    )
    assert train_and_evaluate(config, tmp_path / "run").finished
    assert len(SCALES) == 3


def test_skipped_files_are_counted_over_both_splits(tmp_path):
    for split, broken in (("train", 2), ("test", 1)):
        folder = tmp_path / split / "class"
        folder.mkdir(parents=True)
        Image.new("L", (8, 8)).save(folder / "whole.png")
        for i in range(broken):
            (folder / f"{i}.png").write_bytes(b"no image")
    section = dict(source=f"folder:{tmp_path}", image_size=8, channels=1, num_classes=1)
    splits = [from_config(section | {"on_error": "skip"}, split) for split in ("train", "test")]
    counts = count_skips(splits)
    assert counts is not None and counts() == {"data/skipped": 0.0}
    for data in splits:
        for _ in range(2):
            assert len(list(data.eval_batches(batch_size=4))) == 1
    assert counts() == {"data/skipped": 3.0}
    assert count_skips([from_config(section, "train")]) is None


@pytest.mark.parametrize("config", [tiny_tokenizer(), tiny_generator("")])
def test_every_parameter_of_the_models_has_a_rule(config):
    params = jax.eval_shape(build_objective(config).init, jax.random.key(0))
    check_coverage(params, min_bytes=300)
    places = shardings(params, make_mesh(data=2, fsdp=2, tensor=2))
    assert any("fsdp" in place.spec for place in jax.tree.leaves(places))
