"""Metric writers: JSON lines, TensorBoard events, Weights & Biases, and the console."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

log = logging.getLogger(__name__)

Scalars = Mapping[str, float]

JSONL = "metrics.jsonl"
EVENTS = "tensorboard"
# What the console shows first of a step's metrics, by the last word of their names.
TELLING = ("loss", "nll", "accuracy", "psnr", "usage", "grad_norm", "steps_per_second")


class MetricWriter(Protocol):
    """Where scalars go. Steps count completed steps and never decrease."""

    def write_scalars(self, step: int, scalars: Scalars) -> None: ...

    def close(self) -> None: ...


class JsonlWriter:
    """One JSON object a line: ``{"step": 100, "train/loss": 3.2, ...}``.

    A float keeps every digit of its float32 value; NaN and infinities are written as Python reads
    them back. Each line is flushed, so a killed run loses none that was written.
    """

    def __init__(self, path: str | Path, *, step: int) -> None:
        """Continues after ``step``: lines of later steps, from before a restart, are dropped."""
        self._path = Path(path)
        if self._path.exists():
            _truncate(self._path, step)
        self._file = self._path.open("a", encoding="utf-8")

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        self._file.write(json.dumps({"step": step, **scalars}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_jsonl(path: str | Path) -> list[dict[str, float]]:
    """The lines of a metrics file; a last line cut short by a kill is left out.

    Raises:
        ValueError: names the file and the line that is no JSON.
    """
    records = []
    lines = Path(path).read_text(encoding="utf-8").splitlines(keepends=True)
    for number, line in enumerate(lines, start=1):
        if number == len(lines) and not line.endswith("\n"):
            break
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {line.strip()!r}") from error
    return records


def _truncate(path: Path, step: int) -> None:
    kept = [record for record in read_jsonl(path) if record["step"] <= step]
    beside = path.with_suffix(".tmp")
    beside.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")
    os.replace(beside, path)


class TensorBoardWriter:
    """TensorBoard event files, without TensorFlow.

    Written in the caller's thread: tensorboardX's own ends at the first error, and the next scalars
    then wait for it for ever.
    """

    def __init__(self, directory: str | Path, *, step: int) -> None:
        """Continues after ``step``: TensorBoard hides events of later steps from before."""
        self._directory = Path(directory)
        self._directory.mkdir(parents=True, exist_ok=True)
        self._files = 0
        self._file: Any = self._open(step + 1)

    def _open(self, first: int) -> Any:
        """A new file of events from step ``first`` on."""
        # A second of imports that other floors do not need.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._files += 1
        suffix = f".{os.getpid()}.{self._files}"  # the name has no more than the second
        file = EventsWriter(str(self._directory / "events"), suffix)
        start = SessionLog(status=SessionLog.START)
        file.write_event(Event(step=first, wall_time=time.time(), session_log=start))
        return file

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.summary import scalar

        # A file with half an event is not read beyond it: after an error comes another one.
        file, self._file = self._file or self._open(step), None
        for name, value in scalars.items():
            summary = scalar(name, value)
            file.write_event(Event(step=step, wall_time=time.time(), summary=summary))
        file.flush()
        self._file = file

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


class WandbWriter:
    """Weights & Biases; one run a workdir, continued on restart."""

    def __init__(self, workdir: str | Path, config: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                "config.train.wandb=True needs the package wandb: pip install 'ar_jax[wandb]', or "
                "set config.train.wandb=False"
            ) from error
        record = Path(workdir) / "wandb_id"
        name = record.read_text().strip() if record.exists() else wandb.util.generate_id()
        record.write_text(name + "\n")
        self._run = wandb.init(
            project="ar_jax",
            id=name,
            name=Path(workdir).absolute().name,
            resume="allow",
            dir=str(workdir),
            config=dict(config),
        )

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class ConsoleWriter:
    """The most telling scalars, one line a step, for people; all of them are in the files."""

    def __init__(
        self,
        write: Callable[[str], None],
        first: Sequence[str] = TELLING,
        limit: int = 6,
    ) -> None:
        self._write = write
        self._first = first
        self._limit = limit

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        def rank(name: str) -> int:
            word = name.rpartition("/")[2]
            return self._first.index(word) if word in self._first else len(self._first)

        shown = sorted(scalars, key=rank)[: self._limit]
        text = ", ".join(f"{name} {format_scalar(scalars[name])}" for name in shown)
        self._write(f"step {step}: {text}")

    def close(self) -> None:
        pass


def format_scalar(value: float) -> str:
    """Short text for people: '0.1234', '1.2e-05', '1234', 'nan'."""
    if not math.isfinite(value) or value == int(value):
        return f"{value:g}"
    return f"{value:.4g}"


class MetricWriters:
    """Several writers as one. Where one cannot write (the disk is full) the run goes on."""

    def __init__(self, writers: Sequence[MetricWriter]) -> None:
        self._writers = tuple(writers)
        self._failing: set[int] = set()

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        for index, writer in enumerate(self._writers):
            try:
                writer.write_scalars(step, scalars)
            except OSError as error:
                self._report(index, step, error)
            else:
                self._failing.discard(index)

    def close(self) -> None:
        for index, writer in enumerate(self._writers):
            try:
                writer.close()
            except OSError as error:
                self._report(index, None, error)

    def _report(self, index: int, step: int | None, error: OSError) -> None:
        """Once for every time that a writer begins to fail: steps may be many."""
        if index not in self._failing:
            when = "at the end" if step is None else f"at step {step}"
            name = type(self._writers[index]).__name__
            log.error("metrics are not written by %s %s: %s", name, when, error)
        self._failing.add(index)


def open_writers(
    workdir: str | Path,
    *,
    step: int,
    console: Callable[[str], None],
    wandb: Mapping[str, Any] | None = None,
    main: bool = True,
) -> MetricWriters:
    """The writers of a run; none of them on other processes than the first.

    Args:
        step: completed steps of the restored checkpoint, 0 for a new run; lines after it go.
        console: prints one line.
        wandb: the resolved configuration if Weights & Biases is on, else None.
        main: whether this is process 0.
    """
    if not main:
        return MetricWriters([])
    folder = Path(workdir)
    writers: list[MetricWriter] = [] if wandb is None else [WandbWriter(folder, wandb)]
    writers += [JsonlWriter(folder / JSONL, step=step), ConsoleWriter(console)]
    writers += [TensorBoardWriter(folder / EVENTS, step=step)]
    return MetricWriters(writers)
