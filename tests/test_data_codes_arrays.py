"""Cached codes in .npy files, as they were written before ArrayRecord: still read and checked."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from ar_jax.data import UnreadableItem, open_source

COUNTS = (4, 4, 1)


def write(directory: Path, width: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Three files of 9 images in 2 copies, 5 codes each."""
    rng, shape = np.random.default_rng(0), (9, 2, 5)
    codes: np.ndarray = rng.integers(0, 256, shape).astype(np.uint16)
    if width:
        codes = rng.standard_normal((*shape, width), np.float32)
    labels = np.arange(9, dtype=np.int32) % 3
    directory.mkdir()
    shards = [(f"codes-{number:05d}.npy", count) for number, count in enumerate(COUNTS)]
    for (name, _), part in zip(shards, np.split(codes, np.cumsum(COUNTS)[:-1]), strict=True):
        np.save(directory / name, part)
    np.save(directory / "labels.npy", labels)
    meta = {
        "format": "ar_jax.codes.1",
        "split": "train",
        "shards": shards,
        "copies": 2,
        "length": 5,
        "vocabulary_size": 0 if width else 256,
        "sizes": [1, 4],
        "num_classes": 3,
        "class_names": ["a", "b", "c"],
        "tokenizer": {"digest": "x"},
        "image_size": 8,
        "channels": 1,
    } | ({"width": width} if width else {})
    (directory / "meta.json").write_text(json.dumps(meta))
    return codes, labels


@pytest.mark.parametrize("width", [0, 3])
def test_is_read(tmp_path, width):
    codes, labels = write(tmp_path / "train", width)
    source = open_source(f"codes:{tmp_path}", "train", num_classes=3, channels=1)
    assert len(pickle.dumps(source)) < 4096, "a pickled source carries no codes"
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for index in range(9):
            item = reader[index]
            np.testing.assert_array_equal(item["codes"], codes[index, 0])
            assert item["codes"].dtype == (np.float32 if width else np.int32)
            assert item["label"] == labels[index] and item["label"].dtype == np.int32
    drawn = {source.fetch(5, np.random.default_rng(n))["codes"].tobytes() for n in range(20)}
    kept = codes[5] if width else codes[5].astype(np.int32)
    assert drawn == {copy.tobytes() for copy in kept}
    assert source.describe(8).endswith("codes-00002.npy row 0")


def test_completeness_is_checked(tmp_path):
    write(tmp_path / "train")
    spec, folder = f"codes:{tmp_path}", tmp_path / "train"
    meta, shard, labels = folder / "meta.json", folder / "codes-00001.npy", folder / "labels.npy"
    content = meta.read_text()
    meta.write_text(content.replace('"copies": 2', '"copies": 3'))
    with pytest.raises(
        ValueError, match=r"codes-00000.npy: uint16 \[4, 2, 5\], but meta.json says"
    ):
        open_source(spec, "train")
    meta.write_text(content)
    sound = shard.read_bytes()
    for damaged in (sound[:-9], sound[:40], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"codes-00001.npy: damaged"):
            open_source(spec, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"codes-00001.npy: missing; the cache is incomplete"):
        open_source(spec, "train")
    shard.write_bytes(sound)
    np.save(labels, np.zeros(8, np.int32))
    with pytest.raises(ValueError, match=r"labels.npy: shape \[8\] for 9 images"):
        open_source(spec, "train")
    np.save(labels, np.full(9, 3, np.int32))
    with pytest.raises(ValueError, match=r"labels.npy: label 3 of item 0 is out of range"):
        open_source(spec, "train")


def test_impossible_values_are_damage(tmp_path):
    for folder, width, value, message in (
        ("codes", 0, 256, r"codes-00001.npy row 2: .*vocabulary_size=256"),
        ("floats", 3, np.nan, r"codes-00001.npy row 2: .*NaN or infinity"),
    ):
        (tmp_path / folder).mkdir()
        write(tmp_path / folder / "train", width)
        shard = tmp_path / folder / "train" / "codes-00001.npy"
        codes = np.load(shard)
        codes[2, 0, 3] = value
        np.save(shard, codes)
        with pytest.raises(UnreadableItem, match=message):
            open_source(f"codes:{tmp_path / folder}", "train")[6]
