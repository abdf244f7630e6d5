"""Reports, their sections, plots and grids of images."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ar_jax.evaluation import grids, plots, sections
from ar_jax.evaluation.codebook import codebook_result
from ar_jax.evaluation.frechet import Floor
from ar_jax.evaluation.generation import GenerationResult
from ar_jax.evaluation.likelihood import LikelihoodMeter
from ar_jax.evaluation.memorisation import evaluate_memorisation
from ar_jax.evaluation.reconstruction import evaluate_reconstruction
from ar_jax.evaluation.report import (
    format_value,
    markdown,
    metric,
    read_report,
    table,
    write_report,
)

RNG = np.random.default_rng(0)


def images(count: int, size: int = 12, channels: int = 1) -> np.ndarray:
    return RNG.integers(0, 256, (count, size, size, channels), dtype=np.uint8)


def example() -> dict[str, Any]:
    return {
        "a": {
            "title": "Section A",
            "about": "Of 3 images.",
            "metrics": {
                "accuracy": metric(np.float32(0.5), "share of 3 test images"),
                "psnr": metric(math.inf, "dB | of identical images"),
                "count": metric(np.int64(12345), "images"),
                "missing": metric(None, "does not apply"),
            },
            "tables": {"Per class": table(["class", "share"], [["Bag", np.float64(1 / 3)]])},
            "pictures": {"A picture.": "pictures/a.png"},
        },
        "b": {"title": "Section B", "metrics": {"x": metric(1e-9, "small")}},
    }


def write_picture(directory: Path) -> None:
    grids.save_tiles(directory / "pictures" / "a.png", images(1)[None])


def test_report_round_trip(tmp_path: Path) -> None:
    write_picture(tmp_path)
    json_path, md_path = write_report(tmp_path, "Title", example())
    back = read_report(tmp_path)
    assert list(back) == ["a", "b"]
    metrics = back["a"]["metrics"]
    assert metrics["accuracy"] == {"value": 0.5, "measured": "share of 3 test images"}
    assert metrics["psnr"]["value"] == "inf"
    assert metrics["count"]["value"] == 12345
    assert back["a"]["tables"]["Per class"]["rows"] == [["Bag", 1 / 3]]
    text = md_path.read_text()
    assert "| accuracy | 0.5 | share of 3 test images |" in text
    assert "| psnr | inf | dB \\| of identical images |" in text
    assert "| count | 12,345 | images |" in text
    assert "| missing | – | does not apply |" in text
    assert "| Bag | 0.3333 |" in text
    assert "![A picture.](pictures/a.png)" in text
    # What was read back writes the same files again, and so does a second run.
    first = json_path.read_bytes(), md_path.read_bytes()
    write_report(tmp_path, "Title", back)
    assert (json_path.read_bytes(), md_path.read_bytes()) == first
    assert markdown("Title", back) == text


def test_report_refuses(tmp_path: Path) -> None:
    write_picture(tmp_path)

    def check(change: dict[str, Any], message: str) -> None:
        broken = example()
        broken["a"].update(change)
        with pytest.raises(ValueError, match=message):
            write_report(tmp_path, "Title", broken)

    check({"pictures": {"Gone.": "gone.png"}}, r"sections\.a\.pictures: 'gone\.png'")
    check({"pictures": {"A.": str(tmp_path / "pictures/a.png")}}, "is absolute")
    check({"metrics": {"x": 3.0}}, r"sections\.a\.metrics\.x: 3\.0, expected")
    check({"metrics": {"x": metric(1.0, " ")}}, "say what was measured")
    check({"tables": {"t": table(["a", "b"], [[1]])}}, "a row of 1 cells under 2 columns")
    check({"title": ""}, r"sections\.a\.title: missing")
    check({"plots": {}}, r"unknown keys \['plots'\]")
    check({"metrics": {"x": metric(object(), "x")}}, "object cannot be written")  # type: ignore[arg-type]
    assert not (tmp_path / "report.json").exists()  # nothing half written
    with pytest.raises(ValueError, match=r"report\.json: no such file"):
        read_report(tmp_path)


def test_cells() -> None:
    cells = {
        None: "–",
        1234567: "1,234,567",
        0.123456: "0.1235",
        123456.7: "123,457",
        "a|b": "a\\|b",
    }
    assert {value: format_value(value) for value in cells} == cells
    assert format_value(True) == "yes"
    assert format_value([1, 0.5]) == "1, 0.5"


def test_every_result_becomes_a_section_that_says_what_it_is(tmp_path: Path) -> None:
    originals = images(5)
    meter = LikelihoodMeter((1, 4))
    meter.add(np.ones((2, 5)), np.ones((2, 5)))
    generation = GenerationResult(
        count=20, train_count=100, test_count=40, classifier="our_classifier", class_accuracy=0.9,
        class_accuracy_per_class=np.array([0.8, 1.0]), class_counts=np.array([10, 10]),
        confidence=0.7, label_probability=0.6, test_class_accuracy=0.95, test_confidence=0.8,
        classifier_frechet_distance=4.0, frechet_floor=Floor(20, 10, 2.0, 0.1),
        frechet_ratio=2.0, frechet_test_all=1.0,
    )  # fmt: skip
    copies = evaluate_memorisation(
        originals, images(9), images(6), lambda x: x.reshape(len(x), -1)[:, :8].astype(np.float32)
    )
    codes = codebook_result(np.array([[2, 0, 0], [4, 4, 0]]))
    steps = ["1x1", "2x2"]
    report = {
        "reconstruction": sections.reconstruction_section(
            evaluate_reconstruction(originals, images(5)), "test images"
        ),
        "codebook": sections.codebook_section(codes, steps, "test images"),
        "likelihood": sections.likelihood_section(meter.result(), steps, "test images"),
        "generation": sections.generation_section(
            generation, "guidance 2 (constant)", ["dark", "bright"], "0.9 on 40 test images"
        ),
        "memorisation": sections.memorisation_section(copies),
    }
    write_report(tmp_path, "All", report)
    text = (tmp_path / "report.md").read_text()
    for phrase in (
        "20 generated images, 10 of each class; guidance 2 (constant)",
        "20 class-balanced real test images",
        "0.9 on 40 test images",
        "not FID",
        "| 2x2 | 8 | 0.6667 | 2 |",
        "| nats_per_image | 5 |",
        "| bright | 10 | 1 |",
        "5 test images",
    ):
        assert phrase in text, phrase
    assert "FID" not in text.replace("it is not FID and not comparable with it", "")
    with pytest.raises(ValueError, match="step_names: 1 for 2"):
        sections.codebook_section(codes, ["1x1"], "test images")
    with pytest.raises(ValueError, match="class_names: 1 for 2"):
        sections.generation_section(generation, "", ["dark"], "")

    fewer = GenerationResult(**{**vars(generation), "frechet_floor": Floor(10, 10, 2.0, 0.1)})
    section = sections.generation_section(fewer, "", ["dark", "bright"], "")
    assert "10 (NOT the 20 generated)" in section["metrics"]["frechet_floor"]["measured"]


def test_metrics_file_with_gaps_rewinds_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines: list[Any] = [
        {"step": 1, "train/loss": 3.0},
        {"step": 3, "train/loss": 9.0, "eval/loss": 4.0},
        {"step": 2, "train/loss": 2.0, "note": "text", "flag": True},
        {"step": 3, "train/loss": 1},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 4, "train/lo')
    series = plots.read_metrics(path)
    assert sorted(series) == ["eval/loss", "train/loss"]
    np.testing.assert_array_equal(series["train/loss"][0], [1, 2, 3])
    np.testing.assert_array_equal(series["train/loss"][1], [3, 2, 1])
    np.testing.assert_array_equal(series["eval/loss"][1], [4])
    with pytest.raises(ValueError, match="no such file"):
        plots.read_metrics(tmp_path / "other.jsonl")
    path.write_text("{}\n")
    with pytest.raises(ValueError, match="no object with a step"):
        plots.read_metrics(path)
    path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="no line of the form"):
        plots.read_metrics(path)


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return picture.size


def test_plots_are_written_and_repeat_exactly(tmp_path: Path) -> None:
    steps = np.arange(5)
    series = {name: (steps, RNG.random(5)) for name in ("train/loss", "eval/loss", "rate")}
    series |= {f"train/accuracy/scale_{i:02d}": (steps, RNG.random(5)) for i in range(7)}
    series["eval/nan"] = (steps, np.full(5, np.nan))
    copies = evaluate_memorisation(
        images(4), images(9), images(6), lambda x: x.reshape(len(x), -1)[:, :8].astype(np.float32)
    )

    def draw(folder: Path) -> list[Path]:
        return [
            plots.save_training_curves(series, folder / "curves.png"),
            plots.save_training_curves(series, folder / "loss.png", include=[".*/loss"]),
            plots.save_bars(
                {"accuracy": [0.1, 0.2], "perplexity": np.array([3.0, np.nan])},
                ["1x1", "2x2"],
                folder / "bars.png",
                references={"accuracy": ("chance", 0.05)},
                xlabel="scale",
            ),
            plots.save_memorisation(copies, folder / "copies.png", limit=3),
        ]

    first, second = draw(tmp_path / "one"), draw(tmp_path / "two")
    for a, b in zip(first, second, strict=True):
        assert a.read_bytes() == b.read_bytes()
        assert min(size_of(a)) > 200
    assert size_of(first[0])[1] > size_of(first[1])[1]  # more panels take more rows

    with pytest.raises(ValueError, match="match none of"):
        plots.save_training_curves(series, tmp_path / "x.png", include=["nothing"])
    with pytest.raises(ValueError, match="accuracy: 1 values for 2 labels"):
        plots.save_bars({"accuracy": [1.0]}, ["a", "b"], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"references: \['other'\]"):
        plots.save_bars({"a": [1.0]}, ["a"], tmp_path / "x.png", {"other": ("floor", 1.0)})
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plots.save_bars({"a": [1.0]}, ["a"], tmp_path / "x.svg")


def test_panels_gather_splits_and_steps() -> None:
    parts = [f"{split}/nll/scale_{i:02d}" for split in ("train", "eval") for i in range(2)]
    assert plots.group_panels(["train/nll", "eval/nll", "psnr", *parts]) == {
        "nll": {"train": "train/nll", "eval": "eval/nll"},
        "psnr": {"psnr": "psnr"},
        "nll of each part, train": {"scale_00": parts[0], "scale_01": parts[1]},
        "nll of each part, eval": {"scale_00": parts[2], "scale_01": parts[3]},
    }


def test_tiles_hold_every_image_in_its_place(tmp_path: Path) -> None:
    cells = images(6, size=5, channels=3).reshape(2, 3, 5, 5, 3)
    picture = grids.tile(cells, factor=2, gap=1)
    assert picture.shape == (2 * 11 - 1, 3 * 11 - 1, 3)
    np.testing.assert_array_equal(picture[11:21:2, 22:32:2], cells[1, 2])
    np.testing.assert_array_equal(picture[10], 255)
    path = grids.save_tiles(tmp_path / "new" / "grid.png", cells, factor=2, gap=1)
    with Image.open(path) as stored:
        np.testing.assert_array_equal(np.asarray(stored), picture)

    grey = images(1, size=28)
    assert grids.upscale(grey).shape == (1, 84, 84, 1)  # 28 pixels alone are hard to see
    assert grids.upscale(images(1, size=256)).shape == (1, 256, 256, 1)
    assert grids.tile(grey[None], gap=0).shape == (84, 84, 1)
    assert grids.to_rgb(grey).shape == (1, 28, 28, 3)
    with pytest.raises(ValueError, match="2 channels"):
        grids.to_rgb(images(1, channels=2))
    with pytest.raises(ValueError, match=r"\[rows, columns, H, W, C\]"):
        grids.tile(grey)
    with pytest.raises(ValueError, match=r"must end in \.png"):
        grids.save_tiles(tmp_path / "x.jpg", cells)
    with pytest.raises(ValueError, match="factor: 0"):
        grids.upscale(grey, 0)


def test_arrangements_of_images() -> None:
    samples, labels = images(5), np.array([1, 0, 1, 1, 0])
    grid = grids.class_grid(samples, labels, num_classes=3, columns=2)
    assert grid.shape == (3, 2, 12, 12, 1)
    np.testing.assert_array_equal(grid[0], samples[[1, 4]])
    np.testing.assert_array_equal(grid[1], samples[[0, 2]])
    np.testing.assert_array_equal(grid[2], 128)
    with pytest.raises(ValueError, match="labels: 2 for 5 images"):
        grids.class_grid(samples, labels[:2], num_classes=3)

    pairs = grids.reconstruction_pairs(samples, 255 - samples, columns=3)
    assert pairs.shape == (4, 3, 12, 12, 1)
    np.testing.assert_array_equal(pairs[0], samples[:3])
    np.testing.assert_array_equal(pairs[1], 255 - samples[:3])
    np.testing.assert_array_equal(pairs[3, :2], 255 - samples[3:])
    with pytest.raises(ValueError, match="disagree"):
        grids.reconstruction_pairs(samples, samples[:2])

    stages = images(6).reshape(3, 2, 12, 12, 1)
    strip = grids.formation_strip(stages)
    np.testing.assert_array_equal(strip[1], stages[:, 1])
    with pytest.raises(ValueError, match=r"\[S, N, H, W, C\]"):
        grids.formation_strip(samples)
