"""A sweep of the sampler: its points, what it goes on from, what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from absl import app
from PIL import Image

from ar_jax.evaluation import sweep
from ar_jax.evaluation.adm import Standard
from ar_jax.evaluation.report import read_report
from ar_jax.evaluation.sweep import (
    combinations,
    find_point,
    read_points,
    sweep_workdir,
    write_points,
    write_sweep,
)
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import script
from tests.toy_extractor import brightness_against, write_untrained

pytestmark = pytest.mark.usefixtures("quick_compilation")

NUM = 8  # samples a point, two of each class
AXES: dict[str, list[Any]] = {"guidance.scale": [1.0, 3.0], "guidance.kind": ["constant", "linear"]}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    write_untrained(folder)
    return folder / "generator"


@pytest.fixture
def reference(tmp_path) -> Standard:
    return brightness_against(tmp_path, NUM)


@pytest.mark.slow
def test_a_sweep_goes_on_where_it_stopped(workdir, reference, tmp_path, monkeypatch):
    calls = []
    generate = sweep.generate

    def counted(*args: Any, **fields: Any) -> Any:
        calls.append(fields["guidance"])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **fields)

    monkeypatch.setattr(sweep, "generate", counted)

    def run(axes: Any = AXES, **fields: Any) -> Any:
        return sweep_workdir(
            workdir, tmp_path / "out", axes, num_images=NUM, batch_size=NUM, standard=reference,
            progress=False, **fields,
        )  # fmt: skip

    with pytest.raises(KeyboardInterrupt):
        run()
    kept = json.loads((tmp_path / "out" / "points.json").read_text())["points"]
    assert [p["settings"] for p in kept] == combinations(AXES)[:2]
    report = run()
    assert len(calls) == 5  # the two that were there are not drawn again
    (rows,) = [t["rows"] for t in report["sweep"]["tables"].values()]
    assert [row[:2] for row in rows] == [[1.0, "constant"], [1.0, "linear"], [3.0, "constant"],
                                         [3.0, "linear"]]  # fmt: skip
    # Without guidance its kind changes nothing; with it, it does.
    assert rows[0][2:] == rows[1][2:] != rows[3][2:] != rows[2][2:]
    assert f"toy_frechet_distance@{NUM}" in report["sweep"]["tables"].popitem()[1]["columns"]
    assert "8 samples a point, 2 of each class" in report["sweep"]["about"]
    assert (tmp_path / "out" / "sweep.png").stat().st_size > 1000
    run(AXES | {"guidance.scale": [1.0, 2.0, 3.0]})
    assert len(calls) == 7  # more values cost themselves alone
    with pytest.raises(ValueError, match="points of another seed: 0 there, 1 now"):
        run(seed=1)


@pytest.mark.slow
def test_what_is_refused_of_a_generator(workdir, reference, tmp_path):
    with pytest.raises(ValueError, match="--num_images=6 is not a positive multiple of 4"):
        sweep_workdir(workdir, tmp_path, AXES, num_images=6)
    with pytest.raises(ValueError, match=r"sampling\.top_p is 2\.0"):  # before anything is drawn
        sweep_workdir(workdir, tmp_path, {"top_p": [0.5, 2.0]}, num_images=NUM)
    with pytest.raises(ValueError, match="nothing judges these samples: The images are"):
        sweep_workdir(workdir, tmp_path, AXES, num_images=NUM)
    assert not (tmp_path / "points.json").exists()


def test_points_are_kept_and_drawn(tmp_path):
    """Everything but the samples, which the slow test draws."""
    assert combinations({"a": [1, 2], "b": ["x"]}) == [{"a": 1, "b": "x"}, {"a": 2, "b": "x"}]
    with pytest.raises(ValueError, match="nothing to sweep"):
        sweep_workdir("nowhere", tmp_path, {})
    with pytest.raises(ValueError, match="top_k: .*must be values that differ"):
        sweep_workdir("nowhere", tmp_path, {"top_k": [1, 1]})
    about = {"seed": 0, "num_images": NUM}
    assert read_points(tmp_path, about) == []
    points: list[dict[str, Any]] = [
        {"settings": settings, "metrics": {"fid@8": float(n), "other": 1.0}, "code": "ar_jax"}
        for n, settings in enumerate(combinations(AXES))
    ]
    write_points(tmp_path, about, points[:3])
    assert read_points(tmp_path, about) == points[:3]
    assert find_point(points[:3], points[2]["settings"]) == points[2]
    assert find_point(points[:3], points[3]["settings"]) is None
    with pytest.raises(ValueError, match="points of another seed: 0 there, 1 now"):
        read_points(tmp_path, about | {"seed": 1})
    write_sweep(tmp_path, AXES, points, "Said.")
    report = read_report(tmp_path)["sweep"]
    (table,) = report["tables"].values()
    assert table["columns"] == ["guidance.scale", "guidance.kind", "fid@8", "other"]
    assert table["rows"][3] == [3.0, "linear", 3.0, 1.0]
    with Image.open(tmp_path / report["pictures"]["Metrics over guidance.scale."]) as picture:
        assert min(picture.size) > 200


def test_flags(tmp_path):
    flags = ("--guidance=1,2.5", "--guidance_kind=linear", "--top_k=0,100")
    with script("sweep", "--checkpoint=x", f"--out={tmp_path}", *flags) as module:
        expected = {"guidance.scale": [1.0, 2.5], "guidance.kind": ["linear"], "top_k": [0, 100]}
        assert module.chosen_axes() == expected
    with (
        script("sweep", "--checkpoint=x", f"--out={tmp_path}", "--top_k=a") as module,
        pytest.raises(app.UsageError, match="--top_k=a must be ints"),
    ):
        module.chosen_axes()
