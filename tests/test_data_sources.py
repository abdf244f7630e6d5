"""Embedded, idx and synthetic sources, specs, and skipping of unreadable items."""

from __future__ import annotations

import gzip
import hashlib
import importlib.resources
import pathlib
import pickle
import struct
import subprocess
import sys

import numpy as np
import pytest

from ar_jax.data import open_source
from ar_jax.data.embedded import CLASS_NAMES
from ar_jax.data.source import MAX_SKIPS_IN_A_ROW, Item, SkipUnreadable, Source, UnreadableItem

ROOT = pathlib.Path(__file__).parents[1]


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()


def write_idx(directory: pathlib.Path, count: int = 6, *, top: int = 2, zipped: bool = True):
    """An idx directory of `count` training and 3 test images of 5x4 pixels, labels up to `top`."""
    rng = np.random.default_rng(0)
    for prefix, n in (("train", count), ("t10k", 3)):
        images = rng.integers(0, 256, (n, 5, 4), dtype=np.uint8)
        labels = (np.arange(n) % (top + 1)).astype(np.uint8)
        for part, array in (("images-idx3", images), ("labels-idx1", labels)):
            content = idx_bytes(array)
            name = f"{prefix}-{part}-ubyte" + (".gz" if zipped else "")
            (directory / name).write_bytes(gzip.compress(content) if zipped else content)


class Damaged(Source):
    """Ten items; those in `bad` are unreadable."""

    def __init__(self, bad: set[int], count: int = 10) -> None:
        self.name, self.class_names, self.num_classes, self.channels = "damaged", ("a",), 1, 1
        self._bad, self._count = bad, count

    def __len__(self) -> int:
        return self._count

    def describe(self, index: int) -> str:
        return f"file {index}"

    def fetch(self, index: int, rng: np.random.Generator | None = None) -> Item:
        if index in self._bad:
            raise UnreadableItem(f"file {index} is corrupt")
        return {"image": np.full((2, 2, 1), index, np.uint8), "label": np.int32(0)}


@pytest.mark.parametrize(
    ("split", "count", "first", "whole"),
    [
        ("train", 20_000, "5bd44e331a6d6998", "875aff164cd2ac5f"),
        ("test", 4_000, "ffc7351ed0f8bae5", "f434683db46474cd"),
    ],
)
def test_embedded_is_the_first_of_fashion_mnist(split, count, first, whole):
    # The checksums were taken from the original idx files, not from the archive.
    source = open_source("embedded", split)
    assert len(source) == count
    assert (source.num_classes, source.channels, source.image_size) == (10, 1, (28, 28))
    assert source.class_names == CLASS_NAMES
    assert source[0]["image"].dtype == np.uint8 and source[0]["label"].dtype == np.int32
    images = np.stack([source[i]["image"] for i in range(count)])
    labels = np.stack([source[i]["label"] for i in range(count)])
    assert np.unique(labels).tolist() == list(range(10))
    assert np.bincount(labels).min() > 0.09 * count, "classes are nearly balanced"
    assert hashlib.sha256(images[0].tobytes()).hexdigest().startswith(first)
    digest = hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()
    assert digest.startswith(whole)


def test_embedded_carries_its_licence_and_is_small():
    folder = importlib.resources.files("ar_jax.data.embedded")
    licence = (folder / "LICENSE").read_text()
    assert "MIT License" in licence and "Copyright (c) 2017 Zalando SE" in licence
    assert len((folder / "fashion_mnist.npz").read_bytes()) < 15_000_000


def test_embedded_builder_gives_the_same_bytes(tmp_path):
    write_idx(tmp_path)
    outputs = [tmp_path / "a.npz", tmp_path / "b.npz"]
    for output in outputs:
        subprocess.run(
            [sys.executable, str(ROOT / "experiments" / "build_embedded.py"), "--train=4",
             "--test=2", f"--source={tmp_path}", f"--output={output}"],
            check=True, capture_output=True, cwd=ROOT,
        )  # fmt: skip
    assert outputs[0].read_bytes() == outputs[1].read_bytes()
    arrays = np.load(outputs[0])
    source = open_source(f"idx:{tmp_path}", "train")
    assert arrays["train_images"].shape == (4, 5, 4) and arrays["test_labels"].shape == (2,)
    np.testing.assert_array_equal(arrays["train_images"][3], source[3]["image"][..., 0])


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_directory(tmp_path, zipped):
    write_idx(tmp_path, zipped=zipped)
    train = open_source(f"idx:{tmp_path}", "train", channels=3)
    assert (len(train), train.num_classes, train.channels, train.image_size) == (6, 3, 3, (5, 4))
    assert [int(train[i]["label"]) for i in range(6)] == [0, 1, 2, 0, 1, 2]
    grey = open_source(f"idx:{tmp_path}", "train", num_classes=7)
    assert grey.num_classes == 7, "idx files do not say: the caller may know of more classes"
    np.testing.assert_array_equal(train[4]["image"], np.repeat(grey[4]["image"], 3, -1))
    assert len(open_source(f"idx:{tmp_path}", "test")) == 3
    copy = pickle.loads(pickle.dumps(train))
    np.testing.assert_array_equal(copy[5]["image"], train[5]["image"])


def test_idx_faults_name_the_file(tmp_path):
    write_idx(tmp_path, zipped=False)
    spec = f"idx:{tmp_path}"
    with pytest.raises(ValueError, match=r"train-labels-idx1-ubyte: label 2 of item 2 .*0\.\.1"):
        open_source(spec, "train", num_classes=2)
    images = tmp_path / "train-images-idx3-ubyte"
    sound = images.read_bytes()
    images.write_bytes(sound[:-7])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: 129 bytes .* needs 136"):
        open_source(spec, "train")
    images.write_bytes(sound[:9])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: ends inside its header"):
        open_source(spec, "train")
    images.write_bytes(b"PK" + sound[2:])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte: not an idx file"):
        open_source(spec, "train")
    images.write_bytes(sound[:2] + b"\x0d" + sound[3:])
    with pytest.raises(ValueError, match=r"idx type 0x0d is not supported"):
        open_source(spec, "train")
    images.write_bytes(idx_bytes(np.zeros((4, 5, 4), np.uint8)))
    with pytest.raises(ValueError, match=r"labels-idx1-ubyte: shape \[6\] .* the 4 images"):
        open_source(spec, "train")
    images.unlink()
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(sound)[:-20])
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte.gz: cannot be read \(EOFError"):
        open_source(spec, "train")
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match=r"no test labels here; looked for t10k-labels-idx1"):
        open_source(spec, "test")
    with pytest.raises(ValueError, match="no such directory"):
        open_source(f"idx:{tmp_path}/nowhere", "train")


def test_synthetic_is_deterministic_and_splits_differ():
    train = open_source("synthetic", "train", image_size=8, num_classes=3)
    assert (train.channels, train.num_classes, train.image_size) == (3, 3, (8, 8))
    again = open_source("synthetic", "train", image_size=8, num_classes=3)
    np.testing.assert_array_equal(train[7]["image"], again[7]["image"])
    assert int(train[7]["label"]) == 1
    test = open_source("synthetic", "test", image_size=8)
    assert not np.array_equal(train[7]["image"], test[7]["image"])
    assert not np.array_equal(train[7]["image"], train[8]["image"])


def test_indexing_is_checked():
    source = open_source("embedded", "test")
    np.testing.assert_array_equal(source[-1]["image"], source[3999]["image"])
    with pytest.raises(IndexError, match="index 4000 is out of range for 4000"):
        source[4000]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "imagenet"}, r"data.source='imagenet' is not known; use one of embedded"),
        ({"spec": "idx"}, r"data.source='idx' is not known"),
        ({"spec": "folder:"}, r"names no directory; write folder:DIR"),
        ({"split": "dev"}, r"split='dev' is not known; use 'train' or 'test'"),
        ({"on_error": "ignore"}, r"data.on_error='ignore'.*'raise' or 'skip'"),
        ({"num_classes": 100}, r"data.num_classes=100, but embedded .* set data.num_classes=10"),
        ({"channels": 4}, r"cannot turn 1 channel\(s\) into channels=4"),
        ({"channels": 0}, r"data.channels=0 must be at least 1"),
        ({"spec": "synthetic"}, r"data.image_size=None: a synthetic source needs"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        open_source(**{"spec": "embedded", "split": "train", **arguments})


def test_skip_replaces_by_the_next_readable_and_counts(tmp_path):
    source = SkipUnreadable(Damaged({3, 4, 9}))
    got = [int(source[i]["image"][0, 0, 0]) for i in range(10)]
    assert got == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert source.skipped == 3, "distinct items, not visits"
    assert [source.describe(i) for i in (2, 3, 9)] == ["file 2", "file 5", "file 0"]
    copy = pickle.loads(pickle.dumps(SkipUnreadable(Damaged({1}))))
    assert int(copy[1]["image"][0, 0, 0]) == 2


def test_skips_of_a_copy_are_counted_by_the_original():
    source = SkipUnreadable(Damaged({3, 4}))
    copy = pickle.loads(pickle.dumps(source))
    copy[3]
    assert source.skipped == 2 and copy.skipped == 2
    log = pathlib.Path(source._log)
    assert log.exists()
    del source
    assert not log.exists(), "the maker removes its temporary file"
    assert copy.skipped == 2
    copy[3]


def test_skip_gives_up_where_all_is_unreadable():
    small = SkipUnreadable(Damaged(set(range(10))))
    with pytest.raises(ValueError, match="10 items in a row from index 2 are unreadable"):
        small[2]
    large = SkipUnreadable(Damaged(set(range(10_000)), 10_000))
    with pytest.raises(ValueError, match=f"{MAX_SKIPS_IN_A_ROW} items in a row"):
        large[0]
    with pytest.raises(UnreadableItem, match="file 3 is corrupt"):
        Damaged({3})[3]
