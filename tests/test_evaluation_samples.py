"""Which images are drawn and how, and what their files hold: everything that needs no model."""

from __future__ import annotations

import numpy as np
import pytest

from ar_jax.evaluation.labels import balanced_labels, choose_labels
from ar_jax.evaluation.measure import group_names, group_sizes
from ar_jax.evaluation.samples import describe_sampling, sampling_of, save_npz, stages
from ar_jax.io.checkpoint import tree_digest
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"labels": [4, 1]}, [4, 1]),
        ({"labels": [4, 1], "per_class": 2}, [4, 4, 1, 1]),
        ({"labels": [4, 1], "num_images": 5}, [4, 1, 4, 1, 4]),
        ({"per_class": 2}, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]),
        ({"num_images": 7}, [0, 1, 2, 3, 4, 0, 1]),
        ({}, [label for label in range(5) for _ in range(10)]),
    ],
)
def test_labels(fields, expected):
    labels = choose_labels(5, **fields)
    np.testing.assert_array_equal(labels, expected)
    assert labels.dtype == np.int32


def test_default_of_many_classes_is_ten_spread_evenly():
    labels = choose_labels(1000)
    np.testing.assert_array_equal(labels, np.arange(0, 1000, 100).repeat(10))


@pytest.mark.parametrize("count", [1, 10, 37])
def test_balanced_labels(count):
    counts = np.bincount(balanced_labels(count, 10), minlength=10)
    assert counts.sum() == count and counts.max() - counts.min() <= 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"labels": [0, 5]}, "label 5 is no class: the generator knows 0 to 4"),
        ({"labels": [-1]}, "label -1 is no class"),
        ({"labels": []}, "at least one"),
        ({"labels": [0.5]}, "class numbers"),
        ({"per_class": 0}, "--per_class=0 must be at least 1"),
        ({"num_images": -2}, "--num_images=-2 must be at least 1"),
        ({"num_images": 2, "per_class": 2}, "give one of them"),
    ],
)
def test_bad_labels(fields, message):
    with pytest.raises(ValueError, match=message):
        choose_labels(5, **fields)


CONFIG = {"sampling": {"temperature": 0.9, "top_k": 5, "guidance": {"scale": 2.0}}}


def test_flags_replace_fields_and_none_leaves_them():
    assert sampling_of(CONFIG) == (Knobs(temperature=0.9, top_k=5), Guidance(scale=2.0))
    replaced = {"top_k": 0, "temperature": None, "guidance.kind": "linear", "min_p": 0.1}
    knobs, guidance = sampling_of(CONFIG, replaced)
    assert knobs == Knobs(temperature=0.9, top_k=0, min_p=0.1)
    assert guidance == Guidance(scale=2.0, kind="linear")
    assert CONFIG["sampling"]["guidance"] == {"scale": 2.0}
    assert sampling_of({"sampling": {}}, {"guidance.scale": 3.0})[1] == Guidance(scale=3.0)
    text = describe_sampling(knobs, guidance)
    assert text == "guidance 2 (linear), temperature 0.9, min-p 0.1"


def test_a_report_says_all_of_the_guidance():
    guidance = Guidance(scale=9.5, kind="power_cosine", power=2.75, start=3, stop=20)
    text = describe_sampling(Knobs(), guidance)
    assert text == "guidance 9.5 (power_cosine, power 2.75, start 3, stop 20), temperature 1"
    text = describe_sampling(Knobs(step_temperatures=(1.0, 0.5)), Guidance())
    assert text == "guidance 1 (constant), temperature 1, times 1, 0.5 by step"
    knobs = Knobs(step_top_k=(0, 3), entropy_gain=2.5, entropy_width=3.0, entropy_floor=0.6)
    text = describe_sampling(knobs, Guidance(kind="steps", steps=(1.0, 2.5)))
    assert text == (
        "guidance 1, 2.5 (steps), temperature 1, entropy gain 2.5, entropy width 3, "
        "entropy floor 0.6, top-k 0, 3 by step"
    )


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("temperature", -1.0, r"sampling\.temperature is -1\.0"),
        ("top_q", 1, r"sampling\.top_q = 1 is unknown"),
        ("guidance.strength", 1, r"sampling\.guidance\.strength = 1 is unknown"),
        ("guidance.kind", "cubic", r"sampling\.guidance\.kind is 'cubic'"),
    ],
)
def test_bad_sampling(field, value, message):
    with pytest.raises(ValueError, match=message):
        sampling_of(CONFIG, {field: value})


@pytest.mark.parametrize("steps", [1, 4, 10, 11, 49, 256])
def test_stages_end_with_the_whole_image(steps):
    shown = stages(steps)
    assert shown[0] == 1 and shown[-1] == steps
    assert len(shown) == min(steps, 10) and list(shown) == sorted(set(shown))


def test_parts_of_the_codes():
    assert group_sizes(((1, 1), (2, 3))) == [1, 6]
    assert group_names(((1, 1), (2, 3))) == ["1x1", "2x3"]
    assert group_sizes(((2, 3),)) == [3, 3]
    assert group_names(((2, 3),)) == ["row 1", "row 2"]


def test_npz(tmp_path):
    images = np.arange(2 * 4 * 4 * 3).reshape(2, 4, 4, 3).astype(np.uint8)
    path = tmp_path / "new" / "samples.npz"
    save_npz(path, images, np.array([3, 1], np.int32))
    with np.load(path) as arrays:
        assert arrays.files == ["arr_0", "arr_1"]
        np.testing.assert_array_equal(arrays["arr_0"], images)
        assert arrays["arr_1"].dtype == np.int64
        np.testing.assert_array_equal(arrays["arr_1"], [3, 1])
    before = path.read_bytes()
    save_npz(path, images, np.array([3, 1]))
    assert path.read_bytes() == before
    with pytest.raises(ValueError, match="float32"):
        save_npz(path, images.astype(np.float32), np.array([3, 1]))
    with pytest.raises(ValueError, match=r"labels \(3,\)"):
        save_npz(path, images, np.array([3, 1, 0]))


def test_a_digest_tells_values_names_and_shapes_apart():
    tree = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.float32)}
    others = [
        {**tree, "b": np.array([1, 2], np.float32)},
        {"a": tree["a"], "c": tree["b"]},
        {**tree, "a": tree["a"].reshape(3, 2)},
    ]
    digests = {tree_digest(t) for t in (tree, dict(reversed(tree.items())), *others)}
    assert len(digests) == 4
