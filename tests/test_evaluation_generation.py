"""The shipped classifier, and what it says of real, broken and copied samples."""

from __future__ import annotations

import dataclasses
import gzip
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.data import open_source
from ar_jax.data.embedded import CLASS_NAMES
from ar_jax.evaluation.classifier import (
    FASHION_MNIST,
    Classifier,
    accuracy,
    fold_batch_norm,
    load_classifier,
    round_to_shipped,
    save_classifier,
)
from ar_jax.evaluation.frechet import balanced_subset
from ar_jax.evaluation.generation import (
    LabelledImages,
    class_accuracies,
    evaluate_generation,
)
from ar_jax.evaluation.memorisation import evaluate_memorisation, nearest
from ar_jax.nn.classifier import ConvClassifier

ROOT = Path(__file__).resolve().parent.parent


def embedded(split: str, count: int | None = None) -> LabelledImages:
    source = open_source("embedded", split)
    items = [source[i] for i in range(len(source) if count is None else count)]
    return LabelledImages(
        np.stack([item["image"] for item in items]),
        np.array([item["label"] for item in items], np.int32),
    )


@pytest.fixture(scope="module")
def classifier() -> Classifier:
    return load_classifier()


@pytest.fixture(scope="module")
def train() -> LabelledImages:
    return embedded("train", 2500)


@pytest.fixture(scope="module")
def test() -> LabelledImages:
    return embedded("test")


def draw(data: LabelledImages, count: int, seed: int = 0) -> LabelledImages:
    chosen = balanced_subset(data.labels, count, 10, np.random.default_rng(seed))
    return LabelledImages(data.images[chosen], data.labels[chosen])


def test_the_shipped_classifier_reaches_its_stated_accuracy(
    classifier: Classifier, test: LabelledImages
) -> None:
    stated = classifier.meta["test_accuracy"]
    assert stated >= 0.92
    # Other machines round otherwise: an image or two may fall on the other side.
    assert abs(accuracy(classifier, test.images, test.labels) - stated) <= 2 / len(test)
    assert classifier.class_names == CLASS_NAMES
    assert FASHION_MNIST.stat().st_size < 2 * 2**20


def test_batches_do_not_change_the_answer(classifier: Classifier, test: LabelledImages) -> None:
    images = test.images[:70]
    whole, parts = classifier(images, batch_size=70), classifier(images, batch_size=32)
    np.testing.assert_allclose(whole.logits, parts.logits, atol=1e-4)
    np.testing.assert_allclose(whole.features, parts.features, atol=1e-4)
    assert whole.features.shape == (70, classifier.module.num_features)
    assert (whole.features >= 0).all()
    np.testing.assert_allclose(whole.probabilities.sum(axis=1), 1.0, rtol=1e-12)
    np.testing.assert_array_equal(whole.predictions, whole.probabilities.argmax(axis=1))


def test_folding_the_normalisation_changes_nothing() -> None:
    module = ConvClassifier(widths=(4, 6), num_features=5, batch_norm=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (3, 8, 12, 3), dtype=np.uint8)
    # Drawn, because freshly made statistics are 0 and 1, which would hide an error.
    variables = jax.tree.map(
        lambda x: jnp.asarray(rng.uniform(0.1, 0.9, x.shape), jnp.float32),
        jax.eval_shape(module.init, jax.random.key(0), images),
    )
    want = jax.jit(module.apply)(variables, images)
    folded = fold_batch_norm(variables["params"], variables["batch_stats"])
    plain = module.clone(batch_norm=False)
    got = jax.jit(plain.apply)({"params": folded}, images)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-4), got, want)
    expected = jax.eval_shape(plain.init, jax.random.key(0), images)["params"]
    shapes = jax.tree.map(lambda x: x.shape, expected)
    assert shapes == jax.tree.map(jnp.shape, folded)


def test_weights_round_trip_and_refuse_what_does_not_fit(
    classifier: Classifier, tmp_path: Path
) -> None:
    path = tmp_path / "copy.npz"
    save_classifier(classifier, path)
    again = load_classifier(path)
    assert dataclasses.replace(again, params=None) == dataclasses.replace(classifier, params=None)
    jax.tree.map(np.testing.assert_array_equal, again.params, round_to_shipped(again.params))
    jax.tree.map(np.testing.assert_array_equal, again.params, classifier.params)
    assert path.with_suffix(".json").read_bytes() == FASHION_MNIST.with_suffix(".json").read_bytes()

    meta = json.loads(path.with_suffix(".json").read_text())
    meta["module"]["num_features"] = 32
    path.with_suffix(".json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match=r"'features/bias' has shape \(64,\), expected \(32,\)"):
        load_classifier(path)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"copy\.json: no such file"):
        load_classifier(path)


def test_images_the_classifier_refuses(classifier: Classifier) -> None:
    with pytest.raises(ValueError, match="dtype float32"):
        classifier(np.zeros((2, 28, 28, 1), np.float32))
    with pytest.raises(ValueError, match=r"shape \(2, 32, 32, 1\)"):
        classifier(np.zeros((2, 32, 32, 1), np.uint8))


def test_real_samples_score_the_floor_and_broken_ones_far_above(
    classifier: Classifier, train: LabelledImages, test: LabelledImages
) -> None:
    half = len(test) // 2
    real = draw(LabelledImages(test.images[:half], test.labels[:half]), 500)
    rest = LabelledImages(test.images[half : half + 1000], test.labels[half : half + 1000])
    good = evaluate_generation(classifier, real, train, rest, floor_draws=5)
    assert good.count == good.frechet_floor.count == 500
    assert good.class_accuracy > 0.88
    assert abs(good.class_accuracy - good.test_class_accuracy) < 0.05
    assert 0.7 < good.frechet_ratio < 1.4
    assert good.frechet_test_all < good.classifier_frechet_distance  # more images, less bias
    np.testing.assert_allclose(good.class_accuracy_per_class.mean(), good.class_accuracy)
    assert good.class_counts.tolist() == [50] * 10

    noise = np.random.default_rng(0).integers(0, 256, real.images.shape, dtype=np.uint8)
    broken = {
        "noise": LabelledImages(noise, real.labels),
        "mirrored": LabelledImages(real.images[:, :, ::-1], real.labels),
        "one class": LabelledImages(np.repeat(real.images[:50], 10, axis=0), real.labels),
        "one image a class": LabelledImages(
            real.images[[np.argmax(real.labels == c) for c in real.labels]], real.labels
        ),
    }
    for name, samples in broken.items():
        bad = evaluate_generation(classifier, samples, train, rest, floor_draws=1)
        assert bad.frechet_ratio > 4, name
    wrong = LabelledImages(real.images, (real.labels + 1) % 10)
    relabelled = evaluate_generation(classifier, wrong, train, rest, floor_draws=1)
    assert relabelled.class_accuracy < 0.1
    assert relabelled.label_probability < 0.2 < 0.8 < good.label_probability
    # Distances do not see labels: only the accuracy does.
    np.testing.assert_allclose(
        relabelled.classifier_frechet_distance, good.classifier_frechet_distance, rtol=1e-9
    )


Change = Callable[[LabelledImages], LabelledImages]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: LabelledImages(d.images / 255.0, d.labels), "generated.images: dtype float64"),
        (lambda d: LabelledImages(d.images[:-1], d.labels), r"labels: shape \(20,\) for 19 images"),
        (lambda d: LabelledImages(d.images[:-1], d.labels[:-1]), "unbalanced, class 6 has 1"),
        (lambda d: LabelledImages(d.images[..., 0], d.labels), r"expected \[N, H, W, C\]"),
        (lambda d: LabelledImages(d.images, d.labels + 1), "10 is out of range for 10 classes"),
        (lambda d: LabelledImages(d.images, d.labels * 1.0), "expected integers"),
        (lambda d: LabelledImages(d.images[:, :24], d.labels), r"train.images: \(28, 28, 1\)"),
        (lambda d: LabelledImages(d.images[:0], d.labels[:0]), "N > 0"),
    ],
)
def test_generated_sets_that_are_refused(
    classifier: Classifier, test: LabelledImages, change: Change, message: str
) -> None:
    samples = change(draw(test, 20))
    with pytest.raises(ValueError, match=message):
        evaluate_generation(classifier, samples, test, test)


def test_unbalanced_labels_and_floors_of_fewer_images_must_be_asked_for(
    classifier: Classifier, test: LabelledImages
) -> None:
    small = LabelledImages(test.images[:200], test.labels[:200])
    with pytest.raises(ValueError, match="unbalanced"):
        evaluate_generation(classifier, small, small, small)
    balanced = draw(test, 300)
    with pytest.raises(ValueError, match="300 balanced images take 30 of each"):
        evaluate_generation(classifier, balanced, small, small)
    result = evaluate_generation(
        classifier, small, small, small, allow_unbalanced=True, floor_count=50
    )
    assert (result.count, result.frechet_floor.count) == (200, 50)


def test_accuracy_of_a_class_without_images_is_nan() -> None:
    per_class, counts = class_accuracies(np.array([0, 0, 2]), np.array([0, 2, 2]), 3)
    np.testing.assert_array_equal(per_class, [1.0, np.nan, 0.5])
    assert counts.tolist() == [1, 0, 2]


def test_nearest_neighbours_by_brute_force() -> None:
    rng = np.random.default_rng(0)
    queries, references = rng.normal(size=(7, 5)), rng.normal(size=(50, 5))
    index, distance = nearest(queries, references, chunk=16)
    every = np.linalg.norm(queries[:, None] - references[None], axis=2)
    np.testing.assert_array_equal(index, every.argmin(axis=1))
    np.testing.assert_allclose(distance, every.min(axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="none to search"):
        nearest(queries, references[:0])


def test_copies_of_training_images_are_found(
    classifier: Classifier, train: LabelledImages, test: LabelledImages
) -> None:
    fresh, held_out = test.images[:40], test.images[40:540]
    copied = fresh.copy()
    copied[:20] = train.images[100:120]  # exact
    copied[20:30] = np.clip(train.images[200:210].astype(int) + 3, 0, 255)  # nearly
    honest = evaluate_memorisation(fresh, train.images, held_out, classifier)
    found = evaluate_memorisation(copied, train.images, held_out, classifier)

    assert honest.exact_copies == 0
    assert found.exact_copies == 20
    np.testing.assert_array_equal(found.pixels.index[:20], np.arange(100, 120))
    np.testing.assert_array_equal(found.pixels.index[20:30], np.arange(200, 210))
    np.testing.assert_array_equal(found.pixels.distance[:20], 0.0)
    np.testing.assert_allclose(found.features.distance[:20], 0.0, atol=1e-4)
    assert found.pixels.percentile[:30].max() <= 1.0
    np.testing.assert_array_equal(found.nearest_pixels[:20], copied[:20])

    for neighbours in (honest.pixels, honest.features):
        assert 0.8 < neighbours.ratio < 1.25
        assert 30 < neighbours.percentile.mean() < 70
        assert neighbours.closer_than_usual <= 0.1
    assert found.pixels.ratio < 0.2
    assert found.features.closer_than_usual >= 0.5
    # In units a reader knows: root mean square of pixel values in [0, 1].
    difference = (fresh[0] / 255.0) - (train.images[honest.pixels.index[0]] / 255.0)
    np.testing.assert_allclose(honest.pixels.distance[0], np.sqrt(np.square(difference).mean()))
    with pytest.raises(ValueError, match="held_out: uint8"):
        evaluate_memorisation(fresh, train.images, held_out[:0], classifier)
    with pytest.raises(ValueError, match="train: "):
        evaluate_memorisation(fresh, train.images[:, :20], held_out, classifier)


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


@pytest.mark.slow
def test_the_training_script_writes_a_classifier_that_loads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 96), ("t10k", 40)):
        labels = np.arange(count, dtype=np.uint8) % 2
        images = rng.integers(0, 60, (count, 12, 12), dtype=np.uint8)
        images[labels == 1, 3:9, 3:9] += 150
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images)
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", labels)
    output = tmp_path / "out" / "tiny.npz"
    flags = {
        "source": f"idx:{tmp_path}", "output": str(output), "skip_first": 32, "embedded_test": 10,
        "class_names": "dark,bright", "dataset": "squares", "epochs": 6, "batch_size": 16,
    }  # fmt: skip
    script = ROOT / "experiments" / "train_classifier.py"
    done = subprocess.run(
        [sys.executable, str(script), *(f"--{k}={v}" for k, v in flags.items())],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    tiny = load_classifier(output)
    assert tiny.class_names == ("dark", "bright")
    assert tiny.meta["trained_on"] == "train images 32 to 96 of squares"
    assert tiny.meta["full_test_images"] == 40
    test_set = open_source(f"idx:{tmp_path}", "test")
    images = np.stack([test_set[i]["image"] for i in range(40)])
    labels = np.array([test_set[i]["label"] for i in range(40)])
    assert accuracy(tiny, images, labels) == tiny.meta["full_test_accuracy"] > 0.9
    assert str(tmp_path) not in output.with_suffix(".json").read_text()
