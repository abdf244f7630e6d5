"""Stored images by ADM's rules: what is read, what a number is called, what is refused."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from ar_jax.evaluation import adm, inception
from ar_jax.evaluation.adm import Comparison, Rules, Standard, check_balance, check_number
from ar_jax.evaluation.features import Extractor, Features, InceptionFeatures
from ar_jax.evaluation.files import evaluate_reconstructions, evaluate_samples
from ar_jax.evaluation.frechet import frechet_distance, gaussian_stats
from ar_jax.evaluation.image_set import ImageSet, of_arrays, open_images
from ar_jax.evaluation.manifold import precision_recall
from ar_jax.evaluation.reference import Reference, of_images, open_reference
from ar_jax.evaluation.samples import save_npz
from ar_jax.evaluation.standard import record_samples
from tests.quick_compilation import quick_compilation  # noqa: F401

WIDTH, SPATIAL, CLASSES = 6, 5, 4
SHAPE = (12, 12, 3)


class Toy:
    """An extractor of random projections of the pixels, which counts what it holds at a time."""

    name, prefix, width = "toy projections", "", WIDTH

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self.matrix = rng.normal(size=(int(np.prod(SHAPE)), WIDTH + SPATIAL + CLASSES)) / 20
        self.largest = 0

    def __call__(self, images: np.ndarray, /) -> Features:
        assert images.dtype == np.uint8
        self.largest = max(self.largest, len(images))
        flat = images.reshape(len(images), -1) / 255.0
        out = (flat @ self.matrix).astype(np.float32)
        return Features(
            out[:, :WIDTH], out[:, WIDTH : WIDTH + SPATIAL], out[:, WIDTH + SPATIAL :] * 5
        )


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SHAPE), dtype=np.uint8)


def labels(count: int) -> np.ndarray:
    return np.arange(count) % CLASSES


def images(count: int, seed: int = 0) -> ImageSet:
    return of_arrays(f"set {seed}", pixels(count, seed), labels(count))


def small(**fields: Any) -> Rules:
    return Rules(**{"num_images": 40, "num_classes": CLASSES, "batch_size": 7, **fields})


def compare(toy: Extractor, samples: ImageSet, reference: Reference, rules: Rules) -> Comparison:
    real = adm.measure_reference(toy, samples.shape, reference, rules)
    return adm.compare(toy, samples, real, rules)


def write_reference(path: Path, *, statistics: bool = True, **changes: Any) -> Path:
    """As ADM's: a few images, and statistics of more."""
    out = Toy()(pixels(200, seed=9))
    arrays: dict[str, Any] = {"arr_0": pixels(50, seed=9)}
    if statistics:
        assert out.spatial is not None
        for end, features in (("", out.pool), ("_s", out.spatial)):
            stats = gaussian_stats(features)
            arrays |= {f"mu{end}": stats.mean, f"sigma{end}": stats.covariance}
    arrays |= changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def test_npz_files_are_read_as_adm_writes_them(tmp_path):
    path = tmp_path / "samples.npz"
    made = pixels(11)
    save_npz(path, made, labels(11))
    found = open_images(path)
    assert (found.count, found.shape, found.size) == (11, SHAPE, path.stat().st_size)
    np.testing.assert_array_equal(found.labels, labels(11))
    for size in (3, 100):
        np.testing.assert_array_equal(np.concatenate(list(found.read(size))), made)
    np.testing.assert_array_equal(np.concatenate(list(found.first(7, 3))), made[:7])
    with np.load(path) as stored:  # what ADM's evaluator looks for, and no statistics
        assert stored["arr_0"].dtype == np.uint8 and "mu" not in stored.files
    np.savez_compressed(tmp_path / "small.npz", arr_0=made)  # reference batches may be compressed
    compressed = open_images(tmp_path / "small.npz")
    assert compressed.labels is None and compressed.digest != found.digest
    np.testing.assert_array_equal(np.concatenate(list(compressed.read(4))), made)


def test_folders_hold_png(tmp_path):
    made = pixels(3)
    for number, image in enumerate(made):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / "a" / f"{number}.png")
    found = open_images(tmp_path)
    np.testing.assert_array_equal(np.concatenate(list(found.read(2))), made)
    assert found.labels is None and found.digest == open_images(tmp_path).digest
    Image.fromarray(made[0, :8]).save(tmp_path / "a" / "3.png")
    with pytest.raises(ValueError, match=r"3\.png: \(8, 12, 3\), but 0\.png is \(12, 12, 3\)"):
        list(open_images(tmp_path).read(2))
    Image.fromarray(made[0]).save(tmp_path / "b.jpg")
    with pytest.raises(ValueError, match="JPEG and WebP change the pixels"):
        open_images(tmp_path)


def test_files_that_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    for arrays, message in (
        ({"arr_0": pixels(2) / 255.0}, "images of float64, expected uint8"),
        ({"arr_0": pixels(2)[0]}, r"expected \[N, H, W, C\]"),
        ({"arr_0": pixels(2), "arr_1": labels(3)}, r"arr_1 \(3,\) for 2 images"),
        ({"other": pixels(2)}, "no array arr_0 of images; it has other"),
        ({"arr_0": np.asfortranarray(pixels(2))}, "column by column"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=message):
            open_images(path)
    path.write_text("text")
    with pytest.raises(ValueError, match="no .npz file"):
        open_images(path)
    with pytest.raises(ValueError, match="neither an .npz file nor a folder"):
        open_images(tmp_path / "gone.npz")
    with pytest.raises(ValueError, match="mu without sigma"):
        open_reference(write_reference(path, sigma=None))
    with pytest.raises(ValueError, match="sigma holds NaN"):
        open_reference(write_reference(path, sigma=np.full((WIDTH, WIDTH), np.nan)))
    with pytest.raises(ValueError, match="--reference is needed"):
        open_reference(None)


@pytest.mark.usefixtures("quick_compilation")
def test_statistics_of_a_reference_are_for_fid_and_its_images_for_precision(tmp_path):
    path = write_reference(tmp_path / "reference.npz")
    toy = Toy()
    result = compare(toy, images(40), open_reference(path), small())
    ours, theirs = toy(pixels(40)), toy(pixels(200, seed=9))
    for got, pair in (
        (result.frechet, (ours.pool, theirs.pool)),
        (result.spatial_frechet, (ours.spatial, theirs.spatial)),
    ):
        a, b = (gaussian_stats(np.asarray(x)) for x in pair)
        assert got == pytest.approx(frechet_distance(a, b), rel=1e-6)
    expected = precision_recall(theirs.pool[:50], ours.pool)
    assert (result.precision, result.recall) == expected and result.reference_count == 50
    # Without statistics the images are the reference of everything.
    bare = open_reference(write_reference(tmp_path / "bare.npz", statistics=False))
    other = compare(toy, images(40), bare, small())
    assert other.frechet != result.frechet and other.precision == result.precision
    same = compare(toy, images(40), of_images(images(40)), small())
    assert same.frechet < 1e-12 and same.spatial_frechet is not None
    assert (same.precision, same.recall) == (1.0, 1.0)
    # And the other way round: of statistics alone there is no precision.
    alone = open_reference(write_reference(tmp_path / "alone.npz", arr_0=None))
    result = compare(toy, images(40), alone, small())
    assert result.precision is None and "the reference holds no images" in result.left_out[0]


def test_memory_holds_a_batch_and_statistics():
    toy = Toy()
    rules = small(num_images=300, batch_size=16, precision_recall=False)
    result = compare(toy, images(300), of_images(images(200, seed=1)), rules)
    assert toy.largest == 16 and result.precision is None
    # Batches and their order change nothing but the last digits.
    order = np.random.default_rng(0).permutation(300)
    shuffled = of_arrays("shuffled", pixels(300)[order], labels(300)[order])
    again = compare(toy, shuffled, of_images(images(200, seed=1)), rules)
    np.testing.assert_allclose(again.frechet, result.frechet, rtol=1e-9)
    np.testing.assert_allclose(again.inception_score, result.inception_score, rtol=1e-9)


def test_rounding_is_part_of_what_is_measured():
    """Floats are refused; and half a grey level, cut off in place of rounded, shows in FID."""
    rng = np.random.default_rng(1)
    exact = rng.uniform(0, 255, (300, *SHAPE))
    rounded, cut = np.round(exact).astype(np.uint8), exact.astype(np.uint8)
    reference = of_images(of_arrays("exact", rounded, labels(300)))
    rules = small(num_images=300, precision_recall=False)
    distances = [
        compare(Toy(), of_arrays("set", made, labels(300)), reference, rules).frechet
        for made in (rounded, cut)
    ]
    assert distances[0] < 1e-12 < 1e-6 < distances[1]
    with pytest.raises(ValueError, match="images of float64, expected uint8"):
        of_arrays("floats", exact, None)


def test_names_say_how_many():
    result = compare(Toy(), images(40), of_images(images(50, 1)), small(precision_recall=False))
    assert result.name("fid") == "fid@40"
    assert check_number("samples", 50_000, None) == 50_000
    standard = of_arrays("s", np.zeros((50_000, 1, 1, 1), np.uint8), np.arange(50_000) % 1000)
    assert check_balance(standard, 50_000, Rules()) == "50 of each of 1,000 classes"
    with pytest.raises(ValueError, match=r"holds 10,000 images, but FID is .* fid@10000"):
        check_number("samples", 10_000, None)
    with pytest.raises(ValueError, match="--num_images=41, but samples holds 40"):
        check_number("samples", 40, 41)


def test_comparisons_that_are_refused(tmp_path):
    toy, reference = Toy(), of_images(images(50, seed=1))

    def refused(message: str, samples: ImageSet | None = None, **changes: Any) -> None:
        against = changes.pop("reference", reference)
        with pytest.raises(ValueError, match=message):
            compare(toy, samples or images(40), against, small(precision_recall=False, **changes))

    few = of_arrays("few", pixels(40), labels(40) * (np.arange(40) > 3))
    refused("first 40 samples are unbalanced, 9 images of class 1 and 13 of class 0", few)
    refused("does not say the classes", of_arrays("x", pixels(40), None))
    refused("label 3 is none of 3 classes", num_classes=3)
    refused("0 images of class 4", num_classes=5)
    refused("set 0: 4 images give no covariance of full rank of 6 features", num_images=4)
    refused("set 1: 5 images give no cov", reference=of_images(images(5, seed=1)))
    larger = of_arrays("larger", np.zeros((50, 16, 16, 3), np.uint8), None)
    refused(r"larger holds images \(16, 16, 3\), but the samples are \(12, 12, 3\)",
            reference=of_images(larger))  # fmt: skip
    path = tmp_path / "narrow.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    refused("statistics of 3 features, but toy projections gives 6", reference=open_reference(path))
    unbalanced = compare(toy, few, reference, small(allow_unbalanced=True, precision_recall=False))
    assert unbalanced.balance.startswith("UNBALANCED")

    class Broken(Toy):
        def __call__(self, images: np.ndarray, /) -> Features:
            pool, spatial, logits = super().__call__(images)
            pool[0, 0] = np.nan
            return Features(pool, spatial, logits)

    with pytest.raises(ValueError, match="set 1, pool features: NaN or infinity in row 0"):
        compare(Broken(), images(40), reference, small(precision_recall=False))


@pytest.mark.usefixtures("quick_compilation")
def test_report_of_samples_says_what_was_measured(tmp_path):
    path = tmp_path / "samples.npz"
    save_npz(path, pixels(40), labels(40))
    reference = write_reference(tmp_path / "reference.npz")
    standard = Standard(extractor=Toy(), reference=str(reference), rules=small())
    evaluate_samples(path, tmp_path / "report", standard)
    text = (tmp_path / "report" / "report.md").read_text()
    for said in (
        "| fid@40 | ",
        "| sfid@40 | ",
        "| inception_score@40 | ",
        "| precision@40 | ",
        "40 samples (10 of each of 4 classes)",
        open_images(path).digest,
        open_images(reference).digest,
        f"{reference.stat().st_size:,} bytes, 50 images of 12x12x3, and statistics",
        "how they were drawn is not recorded",
        "ar_jax 0.1.0",
    ):
        assert said in text, said
    record_samples(path, "guidance 2 (constant), EMA parameters of step 7, seed 3")
    with pytest.raises(ValueError, match="--overwrite"):
        evaluate_samples(path, tmp_path / "report", standard)
    evaluate_samples(path, tmp_path / "report", standard, overwrite=True)
    text = (tmp_path / "report" / "report.md").read_text()
    assert "EMA parameters of step 7, seed 3; drawn by ar_jax" in text


def test_reconstructions_are_compared_with_their_originals(tmp_path):
    originals = pixels(40)
    made = np.clip(originals.astype(int) + 3, 0, 255).astype(np.uint8)
    np.savez(tmp_path / "originals.npz", arr_0=originals)
    np.savez(tmp_path / "made.npz", arr_0=made)

    def run(reference: Path, name: str) -> Any:
        standard = Standard(extractor=Toy(), reference=str(reference), rules=small())
        report = evaluate_reconstructions(tmp_path / "made.npz", tmp_path / name, standard)
        return report["reconstruction"]["metrics"]

    metrics = run(tmp_path / "originals.npz", "report")
    assert metrics["psnr"]["value"] > 38 and metrics["rfid@40"]["value"] > 1e-6
    assert run(tmp_path / "made.npz", "same")["rfid@40"]["value"] < 1e-12
    with pytest.raises(ValueError, match="statistics .mu, sigma. of training images"):
        run(write_reference(tmp_path / "virtual.npz"), "refused")
    np.savez(tmp_path / "fewer.npz", arr_0=originals[:39])
    with pytest.raises(ValueError, match="40 reconstructions of 39 originals"):
        run(tmp_path / "fewer.npz", "refused")
    assert json.loads((tmp_path / "report" / "report.json").read_text())["title"]


def test_inception_as_an_extractor(monkeypatch):
    """In batches of one size, and known by its official file; without one, that is said."""
    seen = []

    def apply(function: Any, params: Any, images: np.ndarray, **fields: Any) -> Any:
        seen.append((len(images), fields["batch_size"]))
        shapes = {"pool": 2048, "spatial": 2023, "logits": 1008}
        made = {name: np.ones((len(images), width), np.float32) for name, width in shapes.items()}
        return types.SimpleNamespace(**made)

    monkeypatch.setattr(inception, "apply_in_batches", apply)
    about = {"family": "inception", "files": {"pt_inception.pth": "abc"}}
    network = inception.InceptionNetwork({}, about, tuple(jax.devices()))
    extractor = InceptionFeatures(network, batch_size=16)
    out = extractor(pixels(3))
    assert seen == [(3, 16)]
    assert out.pool.shape == (3, extractor.width)
    assert out.spatial is not None and out.spatial.shape == (3, 2023)
    assert extractor.prefix == "" and "pt_inception.pth sha256 abc" in extractor.name
    nameless = InceptionFeatures(inception.InceptionNetwork({}, {}, network.devices))
    assert "weights of no known file" in nameless.name
