"""A progress bar with rate and time left; lines of text now and then where there is no terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

from tqdm import tqdm


class Progress:
    """Use as a context manager; `advance` after every step.

    On a terminal a tqdm bar. Elsewhere (log files, pipes) a line each ``interval`` seconds, the
    first once there is a rate to report, and one at the end.
    """

    def __init__(
        self,
        total: int,
        *,
        initial: int = 0,
        title: str = "training",
        unit: str = "step",
        enabled: bool = True,
        interval: float = 10.0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stream = sys.stderr if stream is None else stream
        self._total = total
        self._done = initial
        self._title = title
        self._unit = unit
        self._enabled = enabled
        self._interval = interval
        self._clock = clock
        self._text = ""
        # The first step compiles: the rate counts from its end.
        self._base: tuple[float, int] | None = None
        self._printed = clock()
        self._bar: tqdm | None = None
        if enabled and self._stream.isatty():
            self._bar = tqdm(
                total=total,
                initial=initial,
                desc=title,
                unit=unit,
                file=self._stream,
                dynamic_ncols=True,
            )

    def advance(self, count: int = 1) -> None:
        """``count`` more steps are done."""
        self._done += count
        now = self._clock()
        if self._base is None:
            self._base = (now, self._done)
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and (now - self._printed >= self._interval or self._done >= self._total):
            self._printed = now
            self._print(now)

    def write(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(text + "\n")
            self._stream.flush()

    def show(self, text: str) -> None:
        """Text to carry beside the bar, as 'loss 3.21'."""
        self._text = text
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def _print(self, now: float) -> None:
        assert self._base is not None
        start, first = self._base
        line = f"{self._title}: {self._unit} {self._done}/{self._total}"
        if now > start and self._done > first:
            rate = (self._done - first) / (now - start)
            left = (self._total - self._done) / rate
            line += f", {rate:.3g} {self._unit}s/s, {format_seconds(left)} left"
        if self._text:
            line += f", {self._text}"
        self.write(line)


def format_seconds(seconds: float) -> str:
    """'0:07', '12:30', '1:02:03'."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
