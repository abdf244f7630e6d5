"""A process that hangs ends itself with a message; one that goes on or has ended is left alone."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from ar_jax.io.checkpoint import list_steps
from ar_jax.train.fields import TrainFields
from ar_jax.train.watchdog import BATCH, EXIT_CODE, Watchdog
from tests.faulty_run import EVERY, STEPS, run_toy, start
from tests.quick_compilation import quick_compilation  # noqa: F401

pytestmark = pytest.mark.usefixtures("quick_compilation")


class Recorder(Watchdog):
    """Says what it would have ended the process for."""

    def __init__(self, limit: float) -> None:
        super().__init__(limit)
        self.said: list[tuple[str, int]] = []
        self.ends = threading.Event()

    def _end(self, what: str, step: int, seconds: float) -> None:
        assert seconds >= self._limit
        self.said.append((what, step))
        self.ends.set()
        self._ended.wait()  # `Watchdog._end` returns to nobody either


def test_says_what_hangs_once_it_has_compiled():
    """The first training may take `COMPILING` longer than a batch, or than the second one."""
    with Recorder(0.1) as first:
        first.begin("training", 1)
        assert not first.ends.wait(0.5)
        first.begin("training", 2)
        assert first.ends.wait(60)
    assert first.said == [("training", 2)]
    with Recorder(0.1) as second:
        second.begin(BATCH, 1)
        assert second.ends.wait(60)
    assert second.said == [(BATCH, 1)]


def test_leaves_alone_what_goes_on_or_has_ended():
    """The clock starts anew with all that is begun; 0 starts no thread; none outlives the run."""
    with Recorder(1.5) as dog:
        for step in range(40):
            dog.begin(BATCH, step)
            dog._ended.wait(0.05)  # 2 s in all
        assert not dog.said
    with Recorder(0) as off:
        assert not off._thread.is_alive()
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
    with pytest.raises(ValueError, match="config.train.stuck_after_seconds=-1 must be at least 0"):
        TrainFields(
            steps=1,
            batch_size=1,
            log_every=1,
            eval_every=1,
            preview_every=0,
            checkpoint_every=1,
            stuck_after_seconds=-1,
        )


@pytest.mark.slow
def test_a_loader_that_hangs_ends_the_process_and_the_next_goes_on(tmp_path: Path):
    """The fifth batch never comes; to compile takes longer than the limit, and is no hang."""
    process = start(tmp_path, "--devices=1 --mesh=1,1,1 --hang_at=5 --stuck_after=6")
    try:
        output = process.communicate(timeout=200)[0].decode()
    finally:
        process.kill()
    assert process.returncode == EXIT_CODE, output[-4000:]
    assert "stuck: batch of step 5 has taken 6 s, more than config.train.stuck_after_seconds=6" in (
        output
    )
    stack = output.partition("Where its threads are:")[2]
    assert "in __next__" in stack and 'ar_jax/train/loop.py", line' in stack
    assert list_steps(tmp_path) == [EVERY]

    assert run_toy(tmp_path, mesh=(8, 1, 1), first=EVERY).finished
    assert list_steps(tmp_path)[-1] == STEPS
    assert not any(thread.name == "watchdog" for thread in threading.enumerate())
