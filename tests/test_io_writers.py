"""Metric files over restarts, the progress line, pictures."""

from __future__ import annotations

import io
import struct
import sys
import types

import numpy as np
import pytest
from PIL import Image

from ar_jax.io.images import image_grid, save_grid
from ar_jax.io.metrics import (
    EVENTS,
    JSONL,
    ConsoleWriter,
    JsonlWriter,
    WandbWriter,
    format_scalar,
    open_writers,
    read_jsonl,
)
from ar_jax.io.progress import Progress, format_seconds


def test_jsonl_keeps_float32_and_not_finite_values(tmp_path):
    writer = JsonlWriter(tmp_path / JSONL, step=0)
    loss = float(np.float32(1 / 3))
    writer.write_scalars(1, {"train/loss": loss})
    writer.write_scalars(2, {"train/loss": float("nan"), "train/norm": float("inf")})
    first, second = read_jsonl(tmp_path / JSONL)  # flushed line by line, before it is closed
    writer.close()
    assert first == {"step": 1, "train/loss": loss}
    assert np.isnan(second["train/loss"]) and np.isinf(second["train/norm"])


def test_jsonl_continues_without_double_steps(tmp_path):
    path = tmp_path / JSONL
    writer = JsonlWriter(path, step=0)
    for step in range(1, 8):
        writer.write_scalars(step, {"loss": float(step)})
    writer.close()
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # the process was killed here
    writer = JsonlWriter(path, step=5)
    writer.write_scalars(6, {"loss": 60.0})
    writer.close()
    assert [(r["step"], r["loss"]) for r in read_jsonl(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, 4.0),
        (5, 5.0),
        (6, 60.0),
    ]


def test_damaged_jsonl_is_named(tmp_path):
    path = tmp_path / JSONL
    path.write_text('{"step": 1}\nnot json\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no JSON: 'not json'"):
        JsonlWriter(path, step=3)
    assert path.read_text().count("\n") == 3


def read_events(folder):
    """(step, tag, value) of all TensorBoard event files, in the order of the files."""
    from tensorboardX.proto import event_pb2

    found = []
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack("<Q", data[position : position + 8])
            event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.session_log.status:
                found.append((event.step, "session start", 0.0))
            position += length + 16
    return found


def test_all_writers(tmp_path):
    lines: list[str] = []
    writers = open_writers(tmp_path, step=0, console=lines.append)
    writers.write_scalars(4, {"train/a": 1.0, "train/loss": 0.5})
    writers.close()
    assert lines == ["step 4: train/loss 0.5, train/a 1"]
    assert read_jsonl(tmp_path / JSONL) == [{"step": 4, "train/a": 1.0, "train/loss": 0.5}]
    events = read_events(tmp_path / EVENTS)
    assert (4, "train/loss", 0.5) in events and (4, "train/a", 1.0) in events
    # A restart tells TensorBoard from which step on older events are void.
    open_writers(tmp_path, step=3, console=lines.append).close()
    assert (4, "session start", 0.0) in read_events(tmp_path / EVENTS)
    assert read_jsonl(tmp_path / JSONL) == []


def test_only_the_main_process_writes(tmp_path):
    writers = open_writers(tmp_path / "x", step=0, console=print, main=False)
    writers.write_scalars(1, {"loss": 1.0})
    writers.close()
    assert not (tmp_path / "x").exists()


def test_wandb_is_asked_for_by_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"config.train.wandb=True .*'ar_jax\[wandb\]'"):
        open_writers(tmp_path, step=0, console=print, wandb={})


def test_wandb_continues_its_run(tmp_path, monkeypatch):
    calls: list[tuple] = []

    def init(**fields):
        calls.append(("init", fields["id"], fields["resume"], fields["config"]))
        return types.SimpleNamespace(
            log=lambda scalars, step: calls.append(("log", step, scalars)),
            finish=lambda: calls.append(("finish",)),
        )

    ids = iter(["first", "second"])
    fake = types.SimpleNamespace(
        init=init, util=types.SimpleNamespace(generate_id=lambda: next(ids))
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    writer = WandbWriter(tmp_path, {"seed": 1})
    writer.write_scalars(2, {"loss": 1.0})
    writer.close()
    WandbWriter(tmp_path, {"seed": 1})
    again = ("init", "first", "allow", {"seed": 1})
    assert calls == [again, ("log", 2, {"loss": 1.0}), ("finish",), again]


def test_console_shows_the_telling_first():
    lines: list[str] = []
    scalars = {f"train/{name}": 1.0 for name in ("a", "b", "c", "accuracy", "loss", "grad_norm")}
    ConsoleWriter(lines.append, limit=4).write_scalars(3, scalars)
    assert lines == ["step 3: train/loss 1, train/accuracy 1, train/grad_norm 1, train/a 1"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, "0.1235"), (3.0, "3"), (1.5e-7, "1.5e-07"), (float("nan"), "nan")]
)
def test_format_scalar(value, text):
    assert format_scalar(value) == text


def test_progress_prints_rate_and_time_left_without_a_terminal():
    now = [0.0]
    stream = io.StringIO()
    with Progress(300, initial=100, interval=10.0, stream=stream, clock=lambda: now[0]) as bar:
        now[0] = 60.0  # the first step compiles for a minute, which is no part of the rate
        bar.advance()
        bar.show("loss 0.5")
        for _ in range(30):
            now[0] += 1.0
            bar.advance()
        bar.write("a line")
    assert stream.getvalue().splitlines() == [
        "training: step 101/300",
        "training: step 111/300, 1 steps/s, 3:09 left, loss 0.5",
        "training: step 121/300, 1 steps/s, 2:59 left, loss 0.5",
        "training: step 131/300, 1 steps/s, 2:49 left, loss 0.5",
        "a line",
    ]


def test_progress_is_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    with Progress(3, title="test", stream=stream) as bar:
        for _ in range(3):
            bar.advance()
    assert "test: 100%" in stream.getvalue() and "3/3" in stream.getvalue()


def test_disabled_progress_prints_nothing():
    stream = io.StringIO()
    with Progress(2, enabled=False, stream=stream) as bar:
        bar.advance(2)
        bar.write("no")
    assert stream.getvalue() == ""


def test_format_seconds():
    assert [format_seconds(s) for s in (7, 750, 3723.4)] == ["0:07", "12:30", "1:02:03"]


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid(tmp_path, channels):
    images = np.zeros((5, 2, 3, channels), np.uint8)
    images[:] = np.arange(5)[:, None, None, None] * 10
    grid = image_grid(images, columns=3, gap=1)
    assert grid.shape == (5, 11, channels)
    np.testing.assert_array_equal(grid[0, ::4, 0], [0, 10, 20])
    np.testing.assert_array_equal(grid[3, ::4, 0], [30, 40, 255])  # the missing sixth is white
    assert (grid[2] == 255).all() and (grid[:, 3] == 255).all()
    save_grid(tmp_path / "a" / "grid.png", images, columns=3, scale=2)
    picture = np.asarray(Image.open(tmp_path / "a" / "grid.png"))
    assert picture.shape[:2] == (12, 26)
    assert picture[0, 8, ...].max() == 255  # the gap of two pixels, doubled, begins at 6
    assert picture[0, 10, ...].max() == 10


def test_image_grid_refuses_what_is_no_picture():
    with pytest.raises(ValueError, match="float32 and shape"):
        image_grid(np.zeros((1, 2, 2, 1), np.float32))
    with pytest.raises(ValueError, match="no rows"):
        image_grid(np.zeros((0, 2, 2, 1), np.uint8))
