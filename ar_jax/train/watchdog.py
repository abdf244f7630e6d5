"""Ending a process that hangs, so that a restart can go on: its heartbeats do not tell it apart."""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
import time
from typing import Self

log = logging.getLogger(__name__)

BATCH = "batch"
EXIT_CODE = os.EX_TEMPFAIL  # the same command goes on from the newest checkpoint
LAST_WORDS = 10  # seconds after which the process ends even if it cannot log any more
COMPILING = 3600  # seconds more that whatever compiles may take the first time
STDERR = 2  # `sys.stderr` of a notebook is no file


class Watchdog:
    """While open, ends the process if nothing is begun for too long; the others end with it.

    A process that dies is noticed by jax, which ends those that wait for it. One whose data loader
    or disk hangs goes on to send heartbeats, and all would wait for ever.
    """

    def __init__(self, limit: float) -> None:
        """``limit``: seconds that what was begun may take; 0: for ever."""
        self._limit = limit
        self._known = {BATCH}  # what compiles nothing, or has done so
        # One tuple, since the thread reads all of it: what, its step, since when, its own limit.
        self._waits = (BATCH, 0, time.monotonic(), limit)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        if self._limit:
            self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._ended.set()
        if self._limit:
            self._thread.join()

    def begin(self, what: str, step: int) -> None:
        """The process has come to ``what`` ('batch', 'evaluation', ...) of ``step``.

        Only a batch is known to compile nothing: what else is begun has `COMPILING` more at first.
        """
        limit = self._limit if what in self._known else self._limit + COMPILING
        self._known.add(what)
        self._waits = (what, step, time.monotonic(), limit)

    def _watch(self) -> None:
        rest = self._limit
        while not self._ended.wait(rest):
            what, step, since, limit = self._waits
            passed = time.monotonic() - since
            if passed >= limit:
                self._end(what, step, passed)
            # What is begun next may have less time than what compiles now.
            rest = min(self._limit, limit - passed)

    def _end(self, what: str, step: int, seconds: float) -> None:
        # Whatever hangs may hold the lock of a log handler.
        faulthandler.dump_traceback_later(LAST_WORDS, file=STDERR, exit=True)
        log.critical(
            "stuck: %s of step %d has taken %.0f s, more than config.train.stuck_after_seconds=%g "
            "allows; this process ends, and all that wait for it. Where its threads are:",
            what,
            step,
            seconds,
            self._limit,
        )
        faulthandler.dump_traceback(file=STDERR)
        os._exit(EXIT_CODE)  # the main thread may hang where no exception reaches it
