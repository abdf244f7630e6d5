"""Jobs of several processes: they train as one does, and end when one of them dies or freezes."""

from __future__ import annotations

import signal
from pathlib import Path

import jax
import numpy as np
import pytest

from ar_jax.io.checkpoint import DATA, FOLDER, load_params
from ar_jax.io.metrics import EVENTS, JSONL, read_jsonl
from tests.process_run import MESHES, TOY, Job, write_inputs
from tests.quick_compilation import quick_compilation  # noqa: F401

SYSTEMS = tuple(MESHES)
STEPS = 4  # of the smoke configs


@pytest.fixture(scope="module")
def folder(tmp_path_factory, quick_compilation) -> Path:  # noqa: F811
    """Where all jobs are, with tokenizers and codes of both systems."""
    path = tmp_path_factory.mktemp("jobs")
    for system in SYSTEMS:
        write_inputs(system, path)
    return path


def scalars(workdir: Path) -> dict[str, list[float]]:
    """Name -> values, in the order of the file, of everything but speeds."""
    found: dict[str, list[float]] = {}
    for record in read_jsonl(workdir / JSONL):
        for name, value in record.items():
            if name == "step" or name.startswith(("train/", "eval/")):
                found.setdefault(name, []).append(value)
    return found


def assert_trained_alike(several: Path, one: Path) -> None:
    """Losses and parameters are equal but for the order in which float32 sums are added.

    Gloo adds the parts of several processes in another order than one process's own all-reduce
    does. That is 1e-6 of a loss; Adam and Muon divide a gradient by its own size, so where it is
    nearly zero a parameter moves by up to some 1e-3 of the step that it makes (2e-3 or less).
    """
    got, expected = scalars(several), scalars(one)
    assert got.keys() == expected.keys()
    assert got["step"] == expected["step"]
    for name in ("train/loss", "eval/loss"):
        np.testing.assert_allclose(got[name], expected[name], rtol=1e-5, err_msg=name)
    for which in ("params", "ema"):
        ours, theirs = load_params(several, which), load_params(one, which)
        assert str(jax.tree.structure(ours)) == str(jax.tree.structure(theirs))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), ours, theirs)


def assert_written_once(workdir: Path, processes: int) -> None:
    """Process 0 alone wrote logs and metrics, all of them the checkpoints."""
    records = read_jsonl(workdir / JSONL)
    trained = [record["step"] for record in records if "train/loss" in record]
    assert trained == list(range(1, STEPS + 1))
    assert len(list((workdir / EVENTS).iterdir())) == 1
    assert len((workdir / "environment.jsonl").read_text().splitlines()) == 1
    newest = workdir / FOLDER / str(STEPS)
    positions = {path.name for path in (newest / DATA).glob("process_*")}
    assert positions == {f"process_{i}-of-{processes}.json" for i in range(processes)}
    if workdir.name == "var":  # its parameters are split over the processes, the other's are not
        assert len(list((newest / "params").glob("ocdbt.process_*"))) == processes


# By default two processes against one are those of test_train_resume.py.
@pytest.mark.slow
@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("processes", [2, 4])
def test_several_processes_train_as_one(folder, processes, system):
    """Each of two devices, against one process with all of these.

    One job after the other: together they would only take turns on the cores.
    """
    several, one = folder / f"{system}-{processes}x2", folder / f"{system}-1x{2 * processes}"
    with Job(several, (system,), processes, devices=2) as job:
        job.finish()
        for index in range(1, processes):
            assert "step 1:" not in job.log(index)  # the console is the first one's as well
    assert_written_once(several / system, processes)
    with Job(one, (system,), processes=1, devices=2 * processes) as job:
        job.finish()
    assert_trained_alike(several / system, one / system)


@pytest.mark.slow
def test_several_processes_go_on_with_the_tokenizer_they_kept(folder):
    """Each reads the tokenizer from the job's own directory the second time."""
    path = folder / "again"
    for words in ("starting at step 0", f"finished already at step {STEPS}"):
        with Job(path, ("var",), processes=2, devices=2) as job:
            job.finish()
        assert all(words in job.log(index) for index in range(2))


HEARTBEAT = 10
# Killed, its connections break; frozen, they stay and only its heartbeats are missed.
LOSSES = [
    pytest.param(signal.SIGKILL, 0, id="killed-0"),
    pytest.param(signal.SIGKILL, 1, id="killed-1", marks=pytest.mark.slow),
    pytest.param(signal.SIGSTOP, 0, id="frozen-0", marks=pytest.mark.slow),
    pytest.param(signal.SIGSTOP, 1, id="frozen-1", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("how", "lost"), LOSSES)
def test_a_lost_process_ends_the_other_with_a_message(tmp_path, how, lost):
    """Within the heartbeat's timeout, and as much again for a machine that is busy."""
    other = 1 - lost
    with Job(tmp_path / "job", (TOY,), processes=2, devices=2, heartbeat=HEARTBEAT) as job:
        job.wait_for_step(TOY, 3)
        job.started[lost].send_signal(how)
        code = job.started[other].wait(timeout=2 * HEARTBEAT)
    assert code != 0
    assert "most likely indicates that another task died" in job.log(other)
