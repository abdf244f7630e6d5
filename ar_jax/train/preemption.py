"""Being told to stop: SIGTERM, or the platform's notice to any host of a pod."""

from __future__ import annotations

import logging
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

log = logging.getLogger(__name__)


class StopRequest:
    """While open, SIGTERM asks the loop to save and end after the step at hand.

    One process: a signal handler, put back on exit; a second SIGTERM ends the process at once.
    Several: jax's preemption service, by which all hosts stop after the same step.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> StopRequest:
        # Python allows handlers in the main thread only; elsewhere the caller owns the signals.
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._receive)
            self._installed = True
        return self

    def __exit__(self, *unused: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous)
            self._installed = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(signal.SIGTERM, self._previous)
        self._installed = False

    def requested(self, step: int) -> bool:
        """Whether to save and end now; call after every step, on every process."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._received
