"""Threads and worker processes: the same stream, no hang, nothing left behind."""

from __future__ import annotations

import itertools
import os
import pathlib
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest

from ar_jax.data import train_iterator
from ar_jax.data.source import SkipUnreadable
from tests.numbered_source import TRANSFORM, Numbered, batches, equal

ROOT = pathlib.Path(__file__).parents[1]


def grain_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("grain")]


def test_workers_give_the_same_batches_lose_none_and_resume():
    whole = batches(7, batch_size=10)
    source = SkipUnreadable(Numbered(24, bad=(5, 6)))
    damaged = batches(7, source, batch_size=10)
    with train_iterator(
        source, TRANSFORM, batch_size=10, seed=3, num_workers=2, num_threads=1
    ) as iterator:
        first = [next(iterator) for _ in range(3)]
        # Not grain's shared memory, whose last arrays would be reported as leaks at exit.
        assert {type(value) for batch in first for value in batch.values()} == {np.ndarray}
        assert equal(first, damaged[:3])
        # Worker counts may change on resume: the state is a batch number.
        state = iterator.get_state()
    assert state == {"next_index": 3, "global_batch": 10, "seed": 3, "items": 24}
    with train_iterator(source, TRANSFORM, batch_size=10, seed=3) as iterator:
        iterator.set_state(state)
        assert equal(list(itertools.islice(iterator, 4)), damaged[3:])
    assert source.skipped == 2, "skips inside workers are counted too"
    same = [np.array_equal(a["label"], b["label"]) for a, b in zip(whole, damaged, strict=True)]
    assert not all(same)


def test_an_unreadable_item_reaches_the_caller_from_a_worker():
    started = time.monotonic()
    with train_iterator(
        Numbered(24, bad=(0,)), TRANSFORM, batch_size=8, seed=3, num_workers=1
    ) as iterator:
        with pytest.raises(ValueError, match="item 0 is corrupt"):
            for _ in range(4):
                next(iterator)
        with pytest.raises(ValueError, match="closed"):
            next(iterator)
    assert time.monotonic() - started < 60


def test_an_error_ends_a_plain_script_at_once(tmp_path):
    """No app.run, flags unparsed, an exception in a worker: an exit code, not a hang."""
    script = textwrap.dedent(
        """
        from tests.numbered_source import TRANSFORM, Numbered
        from ar_jax.data import train_iterator

        if __name__ == "__main__":
            iterator = train_iterator(
                Numbered(24, bad=(0,)), TRANSFORM, batch_size=8, seed=3, num_workers=1
            )
            for _ in range(4):
                next(iterator)
        """
    )
    # A file is needed: spawned workers import the main module again.
    path = tmp_path / "plain_script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path)],
        cwd=ROOT,
        timeout=120,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 1 and "item 0 is corrupt" in done.stderr, done.stderr
    assert "UnparsedFlagAccessError" not in done.stderr


def test_closing_ends_all_threads():
    before = len(grain_threads())
    for _ in range(5):
        with train_iterator(Numbered(24), TRANSFORM, batch_size=8, seed=3, num_threads=3) as it:
            next(it)
            it.set_state(it.get_state() | {"next_index": 5})
            next(it)
            assert len(grain_threads()) > before
    deadline = time.monotonic() + 10
    while len(grain_threads()) > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert len(grain_threads()) <= before
    it.close()
