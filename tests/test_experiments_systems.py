"""The demo of both Fashion-MNIST systems, at smoke size, and what its workdirs are good for."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from absl import app
from PIL import Image, ImageSequence

from ar_jax.data import from_config
from ar_jax.evaluation.cache import cache_codes
from ar_jax.evaluation.coding import encode_images
from ar_jax.evaluation.edits import edit_workdir
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import load_system, load_tokenizer
from ar_jax.evaluation.report import read_report
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.evaluation.samples import Generated, generate, sample_workdir, sampling_of
from ar_jax.io.images import save_png
from ar_jax.io.metrics import read_jsonl
from ar_jax.sampling.loop import CachedSampler
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import (
    BATCH,
    SAMPLES,
    SYSTEMS,
    TEST_IMAGES,
    TRAIN_IMAGES,
    Runs,
    losses,
    losses_on_one_device,
    script,
    write_fashion,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(
    scope="module",
    # The notebook takes VAR the same way.
    params=[
        pytest.param("var", marks=pytest.mark.slow),
        *(name for name in SYSTEMS if name != "var"),
    ],
)
def runs(request, tmp_path_factory, quick_compilation) -> Runs:  # noqa: F811
    folder = tmp_path_factory.mktemp(request.param)
    made = Runs(request.param, write_fashion(folder / "images"), folder / "demo")
    made.run_demo()
    return made


def test_cached_codes_are_the_tokenizer_s(runs):
    config, tokenizer, params = load_tokenizer(runs.tokenizer)
    for split, count in (("train", TRAIN_IMAGES), ("test", TEST_IMAGES)):
        section = dict(config.data, source=f"codes:{runs.codes}")
        cached = from_config(section, split).source
        images = from_config(config.data, split).source
        assert len(cached) == count
        chosen = [0, 63, 64, count - 1]  # across a batch border and at the end
        codes = encode_images(tokenizer, params, np.stack([images[i]["image"] for i in chosen]))
        for index, expected in zip(chosen, np.asarray(codes), strict=True):
            np.testing.assert_array_equal(cached[index]["codes"], expected)
            assert cached[index]["label"] == images[index]["label"]


def test_the_same_cache_is_kept_and_another_refused(runs, tmp_path):
    meta = runs.codes / "train" / "meta.json"
    before = meta.stat().st_mtime_ns
    cache_codes(runs.tokenizer, runs.codes)
    assert meta.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds codes of another data"):
        cache_codes(runs.tokenizer, runs.codes, source="embedded")
    with pytest.raises(ValueError, match=r"--copies=2 would be equal"):
        cache_codes(runs.tokenizer, tmp_path / "new", copies=2)
    with pytest.raises(ValueError, match="holds codes; name the images"):
        cache_codes(runs.tokenizer, tmp_path / "new", source=f"codes:{runs.codes}")
    with pytest.raises(ValueError, match="holds a generator"):
        cache_codes(runs.generator, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_eight_devices_train_as_one_and_codes_as_their_images(runs):
    expected = losses_on_one_device(runs.tokenizer_config(), {})
    assert len(expected) == 4
    np.testing.assert_allclose(losses(runs.tokenizer), expected, rtol=2e-5)
    frozen = {"tokenizer": load_tokenizer(runs.tokenizer)[2]}
    expected = losses_on_one_device(runs.generator_config(runs.source), frozen)
    np.testing.assert_allclose(losses(runs.generator), expected, rtol=2e-5)


def test_images_depend_on_seed_position_and_label_alone(runs, tmp_path):
    config, system, params = load_system(runs.generator)
    sampler = CachedSampler.create(system, params)
    knobs, guidance = sampling_of(config, {"top_k": 8})
    labels = balanced_labels(12, 10)

    def draw(
        seed: int, first: int = 0, batch_size: int = 12, scratch: Path | None = None
    ) -> Generated:
        with jax.default_matmul_precision(config.precision):
            return generate(
                sampler,
                labels[first:],
                seed=seed,
                first=first,
                batch_size=batch_size,
                knobs=knobs,
                guidance=guidance,
                scratch=scratch,
            )

    whole = draw(3)
    assert whole.images.shape == (12, 28, 28, 1) and whole.images.dtype == np.uint8
    assert whole.codes.shape == (12, system.schedule.length)
    for first in (0, 5):  # the last batch is filled up
        part = draw(3, first, BATCH)
        np.testing.assert_array_equal(part.codes, whole.codes[first:])
        np.testing.assert_array_equal(part.labels, whole.labels[first:])
        # Another batch size rounds otherwise: a pixel on the edge may move.
        difference = np.abs(part.images.astype(int) - whole.images[first:])
        assert difference.max() <= 1 and (difference > 0).mean() < 1e-2
    on_disk = draw(3, scratch=tmp_path).images
    assert isinstance(on_disk, np.memmap) and not list(tmp_path.iterdir())  # the file has no name
    np.testing.assert_array_equal(on_disk, whole.images)
    assert (draw(4, batch_size=BATCH).codes != whole.codes).any()


def test_sample_files(runs, tmp_path):
    out, npz = tmp_path / "a" / "grid.png", tmp_path / "b" / "samples.npz"
    drawn = sample_workdir(
        runs.generator, out, labels=[7, 2], per_class=3, batch_size=BATCH, npz=npz, strip=True,
        sampling={"guidance.scale": 1.5, "temperature": 0},
    )  # fmt: skip
    with np.load(npz) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], drawn.images)
        np.testing.assert_array_equal(arrays["arr_1"], [7, 7, 7, 2, 2, 2])
        assert arrays["arr_0"].dtype == np.uint8 and arrays["arr_1"].dtype == np.int64
    # Greedy: equal for equal labels.
    np.testing.assert_array_equal(drawn.codes[:3], drawn.codes[[0, 0, 0]])
    side = 28 * 3 + 2
    with Image.open(out) as picture:
        assert picture.size == (3 * side - 2, 2 * side - 2)
    with Image.open(out.with_name("grid_strip.png")) as picture:
        stages = {"var": 4, "llamagen": 10}[runs.system]
        assert picture.size == (stages * side - 2, 2 * side - 2)
    with pytest.raises(ValueError, match=r"samples\.npz exists"):
        sample_workdir(runs.generator, tmp_path / "new.png", npz=npz)
    with pytest.raises(ValueError, match=r"grid\.png exists"):
        sample_workdir(runs.generator, out)
    with pytest.raises(ValueError, match="label 10 is no class: the generator knows 0 to 9"):
        sample_workdir(runs.generator, out, labels=[3, 10], overwrite=True)
    with pytest.raises(ValueError, match="holds a tokenizer"):
        sample_workdir(runs.tokenizer, tmp_path / "new.png")
    with pytest.raises(ValueError, match=r"config\.json does not exist: is .*gone the --workdir"):
        sample_workdir(tmp_path / "gone", tmp_path / "new.png")
    with pytest.raises(ValueError, match="no checkpoint of step 3"):
        sample_workdir(runs.generator, tmp_path / "new.png", step=3)
    assert not (tmp_path / "new.png").exists()


@pytest.mark.slow
def test_edited_files(runs, tmp_path):
    """Through the script: what lies off the mask stays, and inversion gives the codes again."""
    config, system, params = load_system(runs.generator)
    source = from_config(dict(config.data, source=runs.source), "test").source
    images = np.stack([source[i]["image"] for i in range(2)])
    labels = np.array([source[i]["label"] for i in range(2)])
    np.savez(tmp_path / "some.npz", images, labels)
    save_png(tmp_path / "one.png", images[0])
    npz, gif = tmp_path / "a.npz", tmp_path / "a.gif"
    flags = [f"--checkpoint={runs.generator}", f"--out={tmp_path / 'a.png'}"]
    edited = ["--mask=box:4,8,20,24", "--labels=7,2,1", "--per_class=2", "--feather=1"]
    edited += [f"--edit={tmp_path / 'one.png'}", f"--npz={npz}", f"--frames={gif}"]
    with script("sample", *flags, *edited) as sample:
        sample.main(["sample"])
    with np.load(npz) as arrays:
        np.testing.assert_array_equal(arrays["arr_1"], [7, 7, 2, 2, 1, 1])
        outside = np.ones((28, 28), bool)
        outside[4:20, 8:24] = False
        assert (arrays["arr_0"][:, outside] == images[0][outside]).all()
        assert (arrays["arr_0"][:, ~outside] != images[0][~outside]).mean() > 0.1
    with Image.open(gif) as opened:
        assert len(ImageSequence.all_frames(opened)) > 2
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (8 * 86 - 2, 84)
    with script("sample", *flags, "--invert") as sample, pytest.raises(app.UsageError):
        sample.main(["sample"])
    made = edit_workdir(
        runs.generator, tmp_path / "b.png", image=tmp_path / "some.npz", inverted=True
    )
    np.testing.assert_array_equal(made.labels, labels)
    np.testing.assert_array_equal(
        made.codes, encode_images(system.tokenizer, params["tokenizer"], images)
    )
    with pytest.raises(ValueError, match=r"one\.png needs --mask"):
        edit_workdir(runs.generator, tmp_path / "c.png", image=tmp_path / "one.png")
    with pytest.raises(ValueError, match=r"one\.png does not say .* give --labels"):
        edit_workdir(runs.generator, tmp_path / "c.png", image=tmp_path / "one.png", mask="all")


def test_the_demo_writes_what_it_promises(runs, tmp_path):
    folder = runs.folder
    report = read_report(folder)
    values = {
        name: {key: entry["value"] for key, entry in section.get("metrics", {}).items()}
        for name, section in report.items()
    }
    assert list(report) == [
        "model", "generation", "memorisation", "likelihood", "reconstruction", "bound", "training",
    ]  # fmt: skip
    last = read_jsonl(runs.generator / "metrics.jsonl")[-1]
    length = values["model"]["codes_per_image"]
    likelihood = values["likelihood"]
    # Training evaluated the same parameters on the same test images.
    np.testing.assert_allclose(likelihood["nats_per_image"], last["eval/nll"] * length, rtol=1e-4)
    np.testing.assert_allclose(likelihood["token_accuracy"], last["eval/accuracy"], atol=2e-3)
    np.testing.assert_allclose(likelihood["bits_per_code"], last["eval/nll"] / np.log(2), rtol=1e-4)
    ratio = likelihood["nats_per_image"] / likelihood["train_nats_per_image"]
    np.testing.assert_allclose(likelihood["overfit_gap"], ratio - 1)
    rows = report["likelihood"]["tables"]["Part by part of the codes"]["rows"]
    scales = {"var": ["1x1", "2x2", "4x4", "7x7"], "llamagen": [f"row {i}" for i in range(1, 8)]}
    assert [row[0] for row in rows] == scales[runs.system]
    generation, bound = values["generation"], values["bound"]
    np.testing.assert_allclose(
        generation["frechet_ratio"],
        generation["classifier_frechet_distance"] / generation["frechet_floor"],
    )
    assert generation["frechet_floor"] == bound["frechet_floor"]
    assert bound["reconstruction_frechet_distance"] > bound["frechet_floor"]
    assert 0.8 < generation["test_class_accuracy"] <= 1
    with np.load(folder / "samples.npz") as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        assert arrays["arr_0"].shape == (SAMPLES, 28, 28, 1)
        np.testing.assert_array_equal(np.bincount(arrays["arr_1"]), [SAMPLES // 10] * 10)
    text = (folder / "report.md").read_text()
    for picture in (
        "samples", "formation", "class_accuracy", "memorisation", "likelihood", "reconstructions",
        "training_curves",
    ):  # fmt: skip
        assert f"]({picture}.png)" in text
        with Image.open(folder / f"{picture}.png") as opened:
            assert min(opened.size) > 28
    assert "20 generated images, 2 of each class" in text
    assert "EMA parameters of step 4" in text
    with pytest.raises(ValueError, match=r"report\.json exists"):
        evaluate_workdir(runs.generator, folder)
    with pytest.raises(ValueError, match="--num_images=55 cannot be balanced over 10.*use 50"):
        evaluate_workdir(runs.generator, tmp_path / "new", num_images=55)


def test_the_demo_reports_on_its_tokenizer(runs):
    folder = runs.tokenizer / "evaluation"
    report = read_report(folder)
    assert list(report) == ["model", "reconstruction", "codebook", "bound", "training"]
    last = read_jsonl(runs.tokenizer / "metrics.jsonl")[-1]
    # The report measures on images rounded to uint8.
    psnr = report["reconstruction"]["metrics"]["psnr"]
    np.testing.assert_allclose(psnr["value"], last["eval/psnr"], atol=0.02)
    assert f"{TEST_IMAGES:,} test images" in psnr["measured"]
    rows = report["codebook"]["tables"]["Per step of the schedule"]["rows"]
    cells = {"var": [1, 4, 16, 49], "llamagen": [49]}[runs.system]
    assert [row[1] for row in rows] == [n * TEST_IMAGES for n in cells]
    for picture in ("reconstructions", "codebook", "training_curves"):
        assert (folder / f"{picture}.png").exists()


def test_unknown_images_are_not_judged(runs, tmp_path):
    section = load_tokenizer(runs.tokenizer)[0].data
    assert section.num_classes == 10
    report = evaluate_workdir(
        runs.generator,
        tmp_path,
        num_images=10,
        likelihood_images=8,
        batch_size=BATCH,
        source=f"codes:{runs.codes}",
    )
    assert list(report) == ["model", "generation", "likelihood", "training", "left_out"]
    assert "There are codes but no images" in report["left_out"]["about"]
    assert "8 test images" in report["likelihood"]["about"]
    assert (tmp_path / "samples.npz").exists()
    with pytest.raises(ValueError, match="a tokenizer needs images"):
        evaluate_workdir(runs.tokenizer, tmp_path / "new", source=f"codes:{runs.codes}")


def test_scripts(runs, tmp_path, capsys):
    grid = tmp_path / "grid.png"
    where = (f"--checkpoint={runs.generator}", f"--out={grid}")
    knobs = ("--temperature=0", "--guidance=1.5", "--guidance_kind=linear", f"--batch_size={BATCH}")
    with script("sample", *where, *knobs, "--labels=4", "--num_images=5") as sample:
        sample.main(["sample"])
    assert f"5 images: {grid}" in capsys.readouterr().out
    with Image.open(grid) as picture:
        assert picture.size == (256, 170)
    with script("sample", *where, "--labels=Bag") as sample, pytest.raises(app.UsageError):
        sample.main(["sample"])
    refused = pytest.raises(ValueError, match=r"sampling\.top_p is 2\.0")
    with script("sample", *where, "--top_p=2", "--overwrite") as sample, refused:
        sample.main(["sample"])
    where = (f"--checkpoint={runs.tokenizer}", f"--out={runs.codes}")
    with script("cache_codes", *where) as cache:
        cache.main(["cache_codes"])
    assert f"--config.data.source=codes:{runs.codes}" in capsys.readouterr().out
    where = (f"--checkpoint={runs.tokenizer}", f"--out={tmp_path / 'report'}")
    with script("evaluate", *where, "--num_images=20", f"--batch_size={BATCH}") as evaluate:
        evaluate.main(["evaluate"])
    report = tmp_path / "report" / "report.md"
    assert f"report: {report}" in capsys.readouterr().out
    assert "# Tokenizer" in report.read_text()
