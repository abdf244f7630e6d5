"""A full disk, a kill while a checkpoint is written, a damaged checkpoint of a two-process run."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from ar_jax.io.checkpoint import DATA, FOLDER, list_steps
from ar_jax.io.metrics import JSONL, read_jsonl
from tests.faulty_run import EVERY, STEPS, run_toy, start, start_pair
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.test_io_checkpoint_damage import change_value

pytestmark = pytest.mark.usefixtures("quick_compilation")

MESH = (2, 2, 2)


def losses(workdir: Path) -> dict[int, float]:
    return {
        int(record["step"]): record["train/loss"]
        for record in read_jsonl(workdir / JSONL)
        if "train/loss" in record
    }


def assert_same_losses(got: dict[int, float], expected: dict[int, float]) -> None:
    """Equal but for the order in which devices add: 1e-5 of the loss."""
    assert got.keys() == expected.keys()
    np.testing.assert_allclose([got[step] for step in expected], list(expected.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, quick_compilation) -> dict[int, float]:  # noqa: F811
    """Losses of a run on eight devices that nothing happened to."""
    workdir = tmp_path_factory.mktemp("whole")
    run_toy(workdir, mesh=MESH)
    return losses(workdir)


def ended(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=200)[0].decode()
    assert process.returncode == code, output[-4000:]
    return output


def on_small_disk(folder: Path, size: str) -> tuple[str, ...]:
    """A command's prefix, under which ``folder`` is a file system of ``size`` of its own.

    It is gone with the command: ``folder``.kept gets a copy of what was there.
    """
    unshare = ["unshare", "--user", "--map-root-user", "--mount"]
    script = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift && kept="$1" && shift && { "$@"; '
    script += 'code=$?; rm -f "$kept/filler"; cp -r "$kept" "$kept.kept"; exit $code; }'
    folder.mkdir()
    probe = [*unshare, "sh", "-c", 'mount -t tmpfs tmpfs "$1"', "sh", str(folder)]
    if shutil.which("unshare") is None or subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("this machine lets no user mount a file system of his own")
    return (*unshare, "sh", "-c", script, "sh", size, str(folder))


def test_a_full_disk_ends_no_run_that_gets_space_again(tmp_path, expected):
    """Full from step 4 to 8 of 12: the save of step 6 fails, those of 9 and 12 do not."""
    disk = tmp_path / "disk"
    prefix = on_small_disk(disk, "48m")
    flags = f"--ballast=4 --fill={disk}/filler --fill_at=4 --free_at=8"
    output = ended(start(disk / "run", flags, prefix=prefix))
    kept = tmp_path / "disk.kept" / "run"
    assert "filled the disk: [Errno 28] No space left on device" in output
    assert f"saving step 6 in {disk}/run/{FOLDER} failed, 0 bytes are free there" in output
    assert "No space left on device" in output.partition("saving step 6")[2]
    assert "saving step 9" not in output
    assert list_steps(kept) == [3, 9, 12]
    written = read_jsonl(kept / JSONL)
    failed = [r["checkpoint/failed_saves"] for r in written if "checkpoint/failed_saves" in r]
    assert failed == [1.0]
    # Lines of the time without space came later, or not at all, but whole.
    got = losses(kept)
    assert_same_losses(got, {step: expected[step] for step in got})
    assert got.keys() >= {1, 2, 3, 9, 10, 11, 12}


@pytest.mark.slow
def test_a_full_disk_at_the_end_is_an_error(tmp_path):
    disk = tmp_path / "disk"
    prefix = on_small_disk(disk, "48m")
    flags = f"--ballast=4 --fill={disk}/filler --fill_at=4"
    output = ended(start(disk / "run", flags, prefix=prefix), code=1)
    kept = tmp_path / "disk.kept" / "run"
    assert "SaveFailed: saving step 12 in" in output and "The newest checkpoint is [3]" in output
    assert list_steps(kept) == [3]


def wait_for_half_save(process: subprocess.Popen, workdir: Path, step: int) -> Path:
    """Returns once some, but not all, of the checkpoint of ``step`` is on disk."""
    for _ in range(20_000):
        for half in (workdir / FOLDER).glob(f"{step}.orbax-checkpoint-tmp*"):
            if any(path.is_file() and path.stat().st_size > 1 << 20 for path in half.rglob("*")):
                return half
        if process.poll() is not None:
            break
        time.sleep(0.005)
    process.kill()
    raise AssertionError(f"never saw half of step {step}: {ended(process)}")


@pytest.mark.slow
def test_killed_while_saving_goes_on_from_the_checkpoint_before(tmp_path, expected):
    """SIGKILL when part of step 6's 32 MiB is written."""
    process = start(tmp_path, "--ballast=32")
    half = wait_for_half_save(process, tmp_path, 6)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert half.exists() and not (tmp_path / FOLDER / "6").exists()
    assert list_steps(tmp_path) == [3]
    run_toy(tmp_path, mesh=MESH, first=3, stop_at=5, ballast=32)
    assert list_steps(tmp_path) == [3, 5] and not half.exists()
    assert_same_losses(losses(tmp_path), {step: expected[step] for step in range(1, 6)})


SPREAD = "--devices=4 --mesh=1,8,1"


def end_pair(workdir: Path, flags: str, logs: Path, code: int = 0) -> list[str]:
    """Runs two processes to their end; what each of them said."""
    pair = start_pair(workdir, f"{SPREAD} {flags}", logs)
    try:
        codes = [process.wait(timeout=200) for process in pair]
    finally:
        for process in pair:
            process.kill()
    texts = [(logs / f"{index}.log").read_text() for index in range(2)]
    assert codes == [code, code], texts[0][-3000:] + texts[1][-3000:]
    return texts


@pytest.mark.slow  # three runs of two processes each
@pytest.mark.parametrize("damage", ["position", "arrays", "values"])
def test_damage_that_one_of_two_processes_sees_sends_both_back(tmp_path, expected, damage):
    """The second process's own position, a file that fails in orbax while both read arrays, or
    values that only the sum over both tells from those that were saved.
    """
    workdir = tmp_path / "run"
    end_pair(workdir, "--stop_at=5", tmp_path / "first")
    *_, before, newest = list_steps(workdir)
    assert newest < STEPS - EVERY
    latest = workdir / FOLDER / str(newest)
    if damage == "position":
        (latest / DATA / "process_1-of-2.json").write_text("garbage")
    elif damage == "values":
        change_value(latest, "params/backbone/class_embed/embedding")
    else:
        (latest / "params" / "array_metadatas" / "process_0").write_text("")

    for text in end_pair(workdir, "", tmp_path / "refused", code=1):
        assert f"DamagedCheckpoint: {latest} is damaged: " in text
        assert f"step {before} is the newest before it: train.skip_damaged" in text
    assert list_steps(workdir)[-2:] == [before, newest]

    texts = end_pair(workdir, "--skip_damaged", tmp_path / "skipped")
    assert all(f"{latest} is damaged: " in text for text in texts)
    assert f"is kept as {latest}.damaged" in texts[0]
    assert latest.with_name(f"{newest}.damaged").is_dir()
    assert list_steps(workdir)[-2:] == [STEPS - EVERY, STEPS]
    assert_same_losses(losses(workdir), expected)


@pytest.mark.slow
@pytest.mark.parametrize("full_on", [0, 1])
def test_a_save_that_fails_on_one_of_two_processes_fails_for_both(tmp_path, full_on):
    """One of them can write no large file from step 4 to 8: step 6 is nobody's, 9 and 12 are."""
    workdir = tmp_path / "run"
    flags = f"--ballast=32 --full_on={full_on} --fill_at=4 --free_at=8 --hosts_wait=20"
    texts = end_pair(workdir, flags, tmp_path / "logs")
    failed = f"saving step 6 in {workdir}/{FOLDER} failed"
    assert "File too large" in texts[full_on].partition(failed)[2].splitlines()[0]
    assert failed in texts[1 - full_on]
    assert not any(f"saving step {step}" in text for text in texts for step in (9, 12))
    assert list_steps(workdir) == [3, 9, 12]
    written = read_jsonl(workdir / JSONL)
    failures = [r["checkpoint/failed_saves"] for r in written if "checkpoint/failed_saves" in r]
    assert failures == [1.0]


@pytest.mark.slow
def test_goes_on_exactly_on_other_devices(tmp_path, expected):
    """fsdp 8, then data 4 x tensor 2, then 4 devices, then 1, then 8 again: one run's losses."""
    run_toy(tmp_path, mesh=(1, 8, 1), stop_at=2)
    run_toy(tmp_path, mesh=(4, 1, 2), first=2, stop_at=5)
    ended(start(tmp_path, "--devices=4 --mesh=2,2,1 --first=5 --stop_at=7"))
    ended(start(tmp_path, "--devices=1 --mesh=1,1,1 --first=7 --stop_at=10"))
    assert list_steps(tmp_path)[-2:] == [9, 10]
    outcome = run_toy(tmp_path, mesh=MESH, first=10)
    assert outcome.finished
    assert_same_losses(losses(tmp_path), expected)
    machines = (tmp_path / "environment.jsonl").read_text().splitlines()
    assert len(machines) == 5
