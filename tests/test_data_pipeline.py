"""The training stream: order, randomness, hosts, resume."""

from __future__ import annotations

import itertools
import json

import grain
import numpy as np
import pytest

from ar_jax.data import CodesWriter, open_source, train_iterator
from ar_jax.data.pipeline import HostBlocks, TrainIterator
from tests.numbered_source import TRANSFORM, Numbered, batches, equal, labels


def test_shapes_and_types():
    (batch,) = batches(1)
    assert sorted(batch) == ["image", "label"]
    assert batch["image"].shape == (8, 4, 4, 1) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (8,) and batch["label"].dtype == np.int32


def test_same_seed_same_stream_whatever_the_threads():
    one = batches(12)
    for threads in (0, 1, 4):
        assert equal(one, batches(12, num_threads=threads))
    assert not np.array_equal(labels(one), labels(batches(12, seed=4)))


@pytest.mark.parametrize("batch_size", [8, 7, 30])
def test_every_epoch_is_a_fresh_permutation(batch_size):
    stream = labels(batches(24 * 3 // batch_size + 2, batch_size=batch_size))[: 24 * 2]
    epochs = stream.reshape(2, 24)
    for epoch in epochs:
        assert sorted(epoch) == list(range(24)), "an epoch loses or repeats items"
        assert not np.array_equal(epoch, np.arange(24))
    assert not np.array_equal(epochs[0], epochs[1])


def test_flips_are_drawn_afresh_each_epoch_and_reproducibly():
    source = Numbered(24)
    flipped = []
    for batch in batches(24):  # 8 epochs
        for image, label in zip(batch["image"], batch["label"], strict=True):
            plain = source[int(label)]["image"]
            mirrored = np.array_equal(image, plain[:, ::-1])
            assert mirrored or np.array_equal(image, plain)
            flipped.append((int(label), mirrored))
    share = np.mean([mirrored for _, mirrored in flipped])
    assert 0.3 < share < 0.7
    seen = {(label, mirrored) for label, mirrored in flipped}
    assert len(seen) > 40, "an item's flip changes between epochs"
    assert equal(batches(24), batches(24))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_hold_disjoint_blocks_of_the_same_global_batches(hosts):
    whole = batches(7)  # crosses two epoch borders
    parts = [batches(7, process_index=h, process_count=hosts) for h in range(hosts)]
    for step, batch in enumerate(whole):
        for key in batch:
            joined = np.concatenate([part[step][key] for part in parts])
            np.testing.assert_array_equal(joined, batch[key])
    epoch = [set(labels(part[:3]).tolist()) for part in parts]
    assert sum(len(s) for s in epoch) == 24 and set().union(*epoch) == set(range(24))


def test_slicing_hosts_before_the_shuffle_would_pin_them():
    """The broken variant that the stream avoids: each host sees the same half for ever."""
    pinned = grain.MapDataset.range(24)[0::2].seed(3).shuffle().repeat(4)
    assert set(pinned) == set(range(0, 24, 2))
    ours = labels(batches(36, process_index=0, process_count=2))
    assert set(ours.tolist()) == set(range(24))


def test_resume_is_exact_and_the_state_is_small_json():
    whole = batches(9)
    for stop in (0, 1, 5):
        with train_iterator(Numbered(24), TRANSFORM, batch_size=8, seed=3) as iterator:
            for _ in range(stop):
                next(iterator)
            state = json.loads(json.dumps(iterator.get_state()))
        assert state == {"next_index": stop, "global_batch": 8, "seed": 3, "items": 24}
        with train_iterator(Numbered(24), TRANSFORM, batch_size=8, seed=3) as iterator:
            next(iterator)  # what it did before must not matter
            iterator.set_state(state)
            assert iterator.get_state() == state
            assert equal(list(itertools.islice(iterator, 9 - stop)), whole[stop:])


def test_resume_on_another_number_of_hosts():
    whole = batches(6)
    state = {"next_index": 4, "global_batch": 8, "seed": 3, "items": 24}
    parts = []
    for host in range(2):
        with train_iterator(
            Numbered(24), TRANSFORM, batch_size=8, seed=3, process_index=host, process_count=2
        ) as iterator:
            iterator.set_state(state)
            parts.append(next(iterator)["label"])
    np.testing.assert_array_equal(np.concatenate(parts), whole[4]["label"])


def test_a_state_of_another_stream_is_refused():
    with train_iterator(Numbered(24), TRANSFORM, batch_size=8, seed=3) as iterator:
        state = iterator.get_state()
        for key, value in (("seed", 4), ("global_batch", 16), ("items", 25)):
            with pytest.raises(ValueError, match=rf"{key}={value} in the checkpoint, "):
                iterator.set_state(state | {key: value})
        with pytest.raises(ValueError, match="global_batch=None in the checkpoint"):
            iterator.set_state({"next_index": 2})
        with pytest.raises(ValueError, match="next_index=-1 is bad"):
            iterator.set_state(state | {"next_index": -1})


class Limited:
    """The first `count` batches, in the form grain's checkpoint test takes."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __iter__(self):
        class First(TrainIterator):
            def __next__(inner):  # noqa: N805
                if inner._next == self.count:
                    inner._stop()
                    raise StopIteration
                return super().__next__()

        iterator = train_iterator(Numbered(10), TRANSFORM, batch_size=4, seed=0)
        iterator.__class__ = First
        return iterator


def test_grain_agrees_that_checkpoints_are_exact():
    grain.experimental.assert_equal_output_after_checkpoint(Limited(6))


def test_codes_draw_their_copy_by_the_seed(tmp_path):
    codes = np.arange(6 * 3 * 4).reshape(6, 3, 4)
    with CodesWriter(
        tmp_path / "train", "train", sizes=[4], copies=3, vocabulary_size=100, num_classes=6,
        tokenizer={}, image_size=8, channels=3,
    ) as writer:  # fmt: skip
        writer.write(codes, np.arange(6))
    source = open_source(f"codes:{tmp_path}", "train")
    got = batches(20, source, None, batch_size=6)
    assert got[0]["codes"].shape == (6, 4) and got[0]["codes"].dtype == np.int32
    copies: dict[int, set[int]] = {}
    for batch in got:
        for row, label in zip(batch["codes"], batch["label"], strict=True):
            (copy,) = np.flatnonzero((codes[label] == row).all(-1))
            copies.setdefault(int(label), set()).add(int(copy))
    assert all(drawn == {0, 1, 2} for drawn in copies.values())
    assert equal(got, batches(20, source, None, batch_size=6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 10, "process_count": 4},
            r"batch_size=10 does not divide over 4 host\(s\); set it to 8 or 12",
        ),
        ({"batch_size": 2, "process_count": 4}, r"batch_size=2 .* set it to 4"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, r"seed=-1 must lie in 0\.\.4294967295"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"num_workers": -1}, "data.num_workers=-1"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"process_index": 1}, r"process_index=1 must lie in 0\.\.0"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        batches(1, **options)


def test_host_blocks_slice_like_any_dataset():
    from ar_jax.data.host import Host

    blocks = HostBlocks(grain.MapDataset.range(20), 6, Host(1, 2))
    assert list(blocks) == [3, 4, 5, 9, 10, 11, 15, 16, 17]
    assert list(blocks[3:6]) == [9, 10, 11]
