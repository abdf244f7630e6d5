"""The sampling benchmark: two settings and a command in one run."""

from __future__ import annotations

import json
import os
import sys
from types import SimpleNamespace

import pytest
from absl import app

from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import ROOT, script

CONFIG = f"{ROOT / 'configs' / 'fashion_mnist' / 'var.py'}:smoke"


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_settings_beside_a_command(tmp_path, capsys):
    out = tmp_path / "new" / "figures.json"
    settings = (f"--base={CONFIG} batch=2", f"--other={CONFIG} plain=True plain_steps=1 batch=2")
    against = f"--against={sys.executable} -c pass {{images}} {{threads}}"
    flags = ("--repeats=2", "--steps_too", f"--out={out}")
    with script("benchmarks/sampling", *settings, against, *flags) as sampling:
        sampling.main(["sampling"])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert found["against"]["over_base"]["least"] <= found["against"]["over_base"]["most"]
    for name in ("base", "other"):
        row = found[name]
        least = [row[key]["least"] for key in ("gap_flops", "gap_bytes")]
        assert row["gap"]["least"] == min(least) > 0  # over the larger floor
        assert row["flops"] == found["base"]["flops"] > 0
    assert found["base"]["over_base"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    ratio, times = found["other"]["over_base"], found["other"]["seconds_an_image"]
    assert ratio["least"] <= ratio["median"] <= ratio["most"]
    assert ratio["most"] <= times["most"] / found["base"]["seconds_an_image"]["least"]
    assert [row["codes"] for row in found["steps"]] == [1, 4, 16, 49]
    assert "times the base's" in printed


def test_a_command_is_timed_without_its_start(monkeypatch):
    """Of one that takes 3 seconds to start and 2 an image."""
    clock, told = [0.0], []

    def run(words, *, env, check):
        told.append((words, env["OMP_NUM_THREADS"]))
        clock[0] += 3.0 + 2.0 * int(words[1].removeprefix("--images="))
        return SimpleNamespace(returncode=int(words[1] == "--images=7"))

    with script("benchmarks/sampling", f"--base={CONFIG}") as sampling:
        monkeypatch.setattr(sampling, "subprocess", SimpleNamespace(run=run))
        monkeypatch.setattr(sampling, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        assert sampling.run_command("other --images={images} --threads={threads}", 4) == 2.0
        threads = str(len(os.sched_getaffinity(0)))
        assert told == [
            (["other", f"--images={images}", f"--threads={threads}"], threads) for images in (4, 8)
        ]
        with pytest.raises(SystemExit, match="other --images=7 ended with 1"):
            sampling.run_command("other --images={images}", 7)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--base=nowhere.py", "'nowhere.py' is no config file"),
        (f"--base={CONFIG} batch", "'batch' of .* must be NAME=VALUE"),
        (f"--base={CONFIG} backbone.depht=2", "depht"),
    ],
)
def test_bad_settings(flag, words):
    with (
        script("benchmarks/sampling", flag) as sampling,
        pytest.raises(app.UsageError, match=words),
    ):
        sampling.main(["sampling"])


def test_a_command_must_be_told_how_many_images():
    with (
        script("benchmarks/sampling", f"--base={CONFIG}", "--against=echo") as sampling,
        pytest.raises(app.UsageError, match="must say {images}"),
    ):
        sampling.main(["sampling"])
