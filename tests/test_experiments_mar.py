"""MAR, EAR and GIVT on Fashion-MNIST from tokenizer to report, at smoke size: continuous codes."""

from __future__ import annotations

import shutil
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.build import build_objective, build_system
from ar_jax.data import from_config
from ar_jax.evaluation.cache import cache_codes
from ar_jax.evaluation.coding import encode_images
from ar_jax.evaluation.load import load_system, load_tokenizer
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.evaluation.samples import sample_workdir
from ar_jax.io.checkpoint import load_params
from ar_jax.train.preview import build_preview
from ar_jax.train.run import check_codes, train_and_evaluate
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import (
    CUBE,
    DATA,
    TRAIN_IMAGES,
    losses,
    losses_on_one_device,
    smoke_config,
    write_fashion,
)

# By default test_objectives_masked.py, test_diffusion.py and test_sampling_refine.py stand for it.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick_compilation")]

BATCH = 10


# What its report says of the loss, and how that comes of it.
PARTS: dict[str, dict[str, float]] = {
    "mar": {"noise_error": 1.0, "bound_bits": 1.0},
    "ear": {"distance": 2.0, "spread": -1.0},
    "givt": {"nll": 1.0},
}


@pytest.fixture(scope="module", params=sorted(PARTS))
def runs(request, tmp_path_factory, quick_compilation) -> dict[str, Any]:  # noqa: F811
    folder = tmp_path_factory.mktemp(request.param)
    source = write_fashion(folder / "images")
    made: dict[str, Any] = {name: folder / name for name in ("tokenizer", "codes", "generator")}

    def config(name: str, mesh: dict[str, int]) -> Any:
        axes = {f"mesh__{axis}": size for axis, size in mesh.items()}
        # All test images; pictures are drawn below, on one device.
        train = {"train__eval_batches": 0, "train__preview_every": 0}
        return smoke_config(name, data__source=source, **train, **axes)

    made["tokenizer_config"] = config("tokenizer_kl", DATA)
    assert train_and_evaluate(made["tokenizer_config"], made["tokenizer"]).finished
    cache_codes(made["tokenizer"], made["codes"], batch_size=64)
    made["name"] = request.param
    made["generator_config"] = config(request.param, CUBE)
    made["generator_config"].tokenizer_checkpoint = str(made["tokenizer"])
    made["generator_config"].data.source = f"codes:{made['codes']}"
    assert train_and_evaluate(made["generator_config"], made["generator"]).finished
    return made


def test_moments_are_cached(runs):
    _, tokenizer, params = load_tokenizer(runs["tokenizer"])
    section = dict(runs["tokenizer_config"].data)
    cached = from_config(section | {"source": f"codes:{runs['codes']}"}, "train").source
    images = from_config(section, "train").source
    assert len(cached) == TRAIN_IMAGES
    chosen = [0, 64, TRAIN_IMAGES - 1]
    encoded = encode_images(tokenizer, params, np.stack([images[i]["image"] for i in chosen]))
    for index, expected in zip(chosen, np.asarray(encoded), strict=True):
        np.testing.assert_allclose(cached[index]["codes"], expected, rtol=1e-4, atol=1e-5)
    config = runs["generator_config"].copy_and_resolve_references()
    config.tokenizer.autoencoder.code_width = 8
    config.backbone.code_width = config.head.code_width = 8
    with pytest.raises(ValueError, match="holds 8 floats for a code, the tokenizer makes 16"):
        check_codes(config, build_system(config), params)


def test_eight_devices_train_as_one(runs):
    frozen = {"tokenizer": load_tokenizer(runs["tokenizer"])[2]}
    expected = losses_on_one_device(runs["generator_config"], frozen)
    np.testing.assert_allclose(losses(runs["generator"]), expected, rtol=5e-5)


def test_a_run_goes_on_exactly_from_its_middle(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["generator"], run)
    shutil.rmtree(run / "checkpoints" / "4")
    outcome = train_and_evaluate(runs["generator_config"], run)
    assert outcome.finished and outcome.step == 4
    again, whole = (load_params(path, "params") for path in (run, runs["generator"]))
    jax.tree.map(np.testing.assert_array_equal, again, whole)


def test_samples(runs, tmp_path):
    out = tmp_path / "grid.png"
    drawn = sample_workdir(
        runs["generator"], out, labels=[7, 2], per_class=5, batch_size=BATCH, strip=True
    )
    assert drawn.codes.shape == (10, 49, 4) and drawn.codes.dtype == np.float32
    side = 28 * 3 + 2
    with Image.open(out.with_name("grid_strip.png")) as picture:
        assert picture.size == (4 * side - 2, 2 * side - 2)  # an image after each iteration
    again = sample_workdir(
        runs["generator"], tmp_path / "b.png", labels=[7, 2], per_class=5, batch_size=BATCH
    )
    np.testing.assert_array_equal(again.images, drawn.images)


def test_pictures_while_training(runs):
    params = load_system(runs["generator"])[2]
    for config, trained in (
        (runs["tokenizer_config"], params["tokenizer"]),
        (runs["generator_config"], params),
    ):
        section = runs["tokenizer_config"].data
        preview = build_preview(config, build_objective(config), from_config(section, "test"))
        assert preview is not None
        ((name, picture),) = preview(trained, {}).items()
        assert picture.dtype == np.uint8 and min(picture.shape[:2]) >= 8 * 28, name


def test_reports(runs, tmp_path):
    report = evaluate_workdir(
        runs["generator"], tmp_path / "generator", num_images=50, batch_size=BATCH
    )
    density = ["order_likelihood"] if runs["name"] == "givt" else []
    assert list(report) == [
        *("model", "generation", "memorisation", "held_out", *density),
        *("reconstruction", "bound", "training"),
    ]
    held_out = {name: entry["value"] for name, entry in report["held_out"]["metrics"].items()}
    total = sum(factor * held_out[name] for name, factor in PARTS[runs["name"]].items())
    np.testing.assert_allclose(held_out["loss"], total, rtol=1e-5)
    assert "no likelihood" in report["held_out"]["about"]
    assert "of 4 numbers each" in report["model"]["metrics"]["codes_per_image"]["measured"]
    report = evaluate_workdir(
        runs["tokenizer"], tmp_path / "tokenizer", num_images=50, batch_size=BATCH
    )
    assert list(report) == ["model", "reconstruction", "bound", "training"]


def test_a_trained_system_is_loaded(runs):
    config, system, params = load_system(runs["generator"])
    assert system.schedule.num_steps == config.schedule.iterations
    assert set(params) == {"tokenizer", "backbone", "head"}
