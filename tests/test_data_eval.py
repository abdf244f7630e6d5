"""Evaluation batches: order, padding, hosts, subsets, augmentation."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ar_jax.data import eval_batches
from ar_jax.data.arrays import ArraySource
from ar_jax.data.transforms import ImageTransform

TRANSFORM = ImageTransform(size=4, flip=True)


def source(count: int = 10) -> ArraySource:
    images = np.arange(count * 16).reshape(count, 4, 4, 1).astype(np.uint8)
    names = tuple(str(i) for i in range(count))
    return ArraySource("numbered", images, np.arange(count), class_names=names)


def run(count: int = 10, **options) -> list[dict]:
    defaults = {"batch_size": 4, "process_index": 0, "process_count": 1}
    return list(eval_batches(source(count), TRANSFORM, **(defaults | options)))


def test_in_order_padded_and_masked():
    got = run()
    assert [batch["label"].tolist() for batch in got] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0]]
    assert [batch["mask"].tolist() for batch in got] == [[1.0] * 4, [1.0] * 4, [1.0, 1.0, 0.0, 0.0]]
    last = got[-1]
    assert last["mask"].dtype == np.float32 and last["label"].dtype == np.int32
    assert last["image"].dtype == np.uint8 and last["image"].shape == (4, 4, 4, 1)
    assert not last["image"][2:].any()
    for batch in got:
        for row, label in enumerate(batch["label"][batch["mask"] > 0]):
            np.testing.assert_array_equal(batch["image"][row], source()[int(label)]["image"])


def test_length_and_repeated_passes():
    evaluation = eval_batches(source(), TRANSFORM, batch_size=4)
    assert len(evaluation) == 3 and evaluation.num_items == 10
    for _ in range(2):
        assert len(list(evaluation)) == 3
    assert len(eval_batches(source(8), TRANSFORM, batch_size=4)) == 2


@pytest.mark.parametrize("seed", [None, 7])
def test_those_after_the_first_are_the_same_in_other_batches(seed):
    def items(**options) -> list[tuple[int, bytes]]:
        return [
            (int(label), image.tobytes())
            for batch in run(augment_seed=seed, **options)
            for label, image in zip(batch["label"], batch["image"], strict=True)
        ]

    expected = items()[:10]
    for first in (0, 3, 9, 10):
        assert items(first=first, batch_size=3)[: 10 - first] == expected[first:]
    evaluation = eval_batches(source(), TRANSFORM, batch_size=4, first=5)
    assert len(evaluation) == 2 and evaluation.num_items == 5
    assert run(first=10) == []
    with pytest.raises(ValueError, match=r"first=11 must lie in 0\.\.10"):
        run(first=11)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_join_to_the_whole_with_equal_counts(hosts):
    whole = run(9)
    parts = [run(9, process_index=h, process_count=hosts) for h in range(hosts)]
    assert {len(part) for part in parts} == {3}, "a host with fewer batches would hang the others"
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])
    assert parts[-1][-1]["mask"].sum() == 0, "a block of padding alone keeps its shape"


def test_a_subset_is_spread_evenly():
    got = np.concatenate([batch["label"] for batch in run(100, max_batches=2)])
    np.testing.assert_array_equal(got, np.arange(8) * 100 // 8)
    assert [batch["label"].tolist() for batch in run(3, max_batches=5)] == [[0, 1, 2, 0]]


def test_augmentation_is_a_function_of_seed_and_item():
    def images(**options):
        return np.concatenate([b["image"][b["mask"] > 0] for b in run(64, **options)])

    plain = images()
    drawn = images(augment_seed=1)
    flipped = np.array([not np.array_equal(a, b) for a, b in zip(plain, drawn, strict=True)])
    assert 16 < flipped.sum() < 48
    np.testing.assert_array_equal(drawn[flipped], plain[flipped][:, :, ::-1])
    np.testing.assert_array_equal(drawn, images(augment_seed=1, batch_size=16))
    assert not np.array_equal(drawn, images(augment_seed=2))


def test_a_pass_left_early_leaves_no_threads():
    def threads() -> int:
        return sum(t.name.startswith("grain") for t in threading.enumerate())

    before = threads()
    for _ in range(5):
        for _ in eval_batches(source(40), TRANSFORM, batch_size=2, num_threads=3):
            break
    deadline = time.monotonic() + 10
    while threads() > before and time.monotonic() < deadline:
        time.sleep(0.02)
    assert threads() <= before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9, "process_count": 2}, r"batch_size=9 .* set it to 8 or 10"),
        ({"max_batches": 0}, "max_batches=0"),
        ({"augment_seed": -1}, "augment_seed=-1"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        run(**options)
