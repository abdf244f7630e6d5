"""The sampling benchmark: two settings and a command in one run."""

from __future__ import annotations

import json
import shlex
import sys

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
    wait = "import sys, time; time.sleep(1 + 0.2 * int(sys.argv[1]))"  # a second to start
    against = f"--against={sys.executable} -c {shlex.quote(wait)} {{images}} {{threads}}"
    flags = ("--repeats=2", "--steps_too", f"--out={out}")
    with script("benchmarks/sampling", *settings, against, *flags) as sampling:
        sampling.main(["sampling"])
    found, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert 0.1 < found["against"]["seconds_an_image"]["median"] < 0.6
    for name in ("base", "other"):
        row = found[name]
        assert row["gap"]["median"] >= max(row[f"gap_{k}"]["least"] for k in ("flops", "bytes")) / 2
        assert row["flops"] == found["base"]["flops"] > 0
    assert found["base"]["over_base"] == {"median": 1.0, "least": 1.0, "most": 1.0}
    ratio, times = found["other"]["over_base"], found["other"]["seconds_an_image"]
    assert ratio["least"] <= ratio["median"] <= ratio["most"]
    assert ratio["most"] <= times["most"] / found["base"]["seconds_an_image"]["least"]
    assert [row["codes"] for row in found["steps"]] == [1, 4, 16, 49]
    assert "times the base's" in printed


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
