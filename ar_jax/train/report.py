"""From device metrics to the writers: fetched one step late, with rates."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping

import jax

from ar_jax.io.metrics import MetricWriters, format_scalar
from ar_jax.io.progress import Progress

Pending = tuple[int, Mapping[str, jax.Array]]


class Reporter:
    """Writes a step's metrics and keeps count of steps that were skipped in a row.

    Attributes:
        bad_steps: of the last settled step; see `ar_jax.train.state.TrainState`.
    """

    def __init__(
        self,
        writers: MetricWriters,
        progress: Progress,
        *,
        log_every: int,
        last_step: int,
        batch_size: int,
        tokens_per_image: int,
    ) -> None:
        """``tokens_per_image`` 0: the objective has no tokens."""
        self.bad_steps = 0
        self._writers = writers
        self._progress = progress
        self._log_every = log_every
        self._last_step = last_step
        self._batch_size = batch_size
        self._tokens = tokens_per_image
        self._window: tuple[int, float] | None = None  # (step, time) from which rates count

    def settle(self, pending: Pending | None) -> None:
        """Waits for the step ``pending`` = (step, metrics) and writes them if they are due.

        Called after the next step was dispatched, so that the device never waits for the host.
        """
        if pending is None:
            return
        step, metrics = pending
        due = step % self._log_every == 0 or step == self._last_step
        values = jax.device_get(dict(metrics) if due else {"bad_steps": metrics["bad_steps"]})
        self.bad_steps = int(values["bad_steps"])
        if due:
            scalars = {f"train/{name}": float(value) for name, value in values.items()}
            self._progress.show(f"loss {format_scalar(scalars['train/loss'])}")
            self._writers.write_scalars(step, scalars | self._rates(step))
        elif self._window is None:
            self._window = (step, time.monotonic())  # the first step compiled
        self._progress.advance()

    def _rates(self, step: int) -> dict[str, float]:
        now = time.monotonic()
        before, self._window = self._window, (step, now)
        if before is None or step == before[0]:
            return {}
        rate = (step - before[0]) / max(now - before[1], 1e-9)
        rates = {"steps_per_second": rate, "images_per_second": rate * self._batch_size}
        if self._tokens:
            rates["tokens_per_second"] = rates["images_per_second"] * self._tokens
        return {f"speed/{name}": value for name, value in rates.items()}

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Writes what is no step's metrics (evaluation)."""
        self._writers.write_scalars(step, scalars)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside counts for no rate."""
        start = time.monotonic()
        try:
            yield
        finally:
            if self._window is not None:
                step, since = self._window
                self._window = (step, since + time.monotonic() - start)
