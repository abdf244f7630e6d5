"""Cached codes: the streaming writer, the reader, and damage."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest

from ar_jax.data import CodesSource, CodesWriter, UnreadableItem, open_source

FIELDS: dict[str, Any] = {
    "sizes": (1, 4, 9),
    "copies": 2,
    "vocabulary_size": 256,
    "num_classes": 3,
    "tokenizer": {"name": "vq", "fingerprint": "abc"},
    "image_size": 28,
    "channels": 1,
}


def codes_of(count: int, copies: int = 2, length: int = 14, vocabulary: int = 256) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocabulary, (count, copies, length))


def write(directory, count: int = 25, **changes) -> tuple[np.ndarray, np.ndarray]:
    fields = FIELDS | {"shard_size": 8} | changes
    codes = codes_of(count, fields["copies"], sum(fields["sizes"]), fields["vocabulary_size"])
    labels = np.arange(count) % fields["num_classes"]
    with CodesWriter(directory, "train", **fields) as writer:
        for start in range(0, count, 7):
            writer.write(codes[start : start + 7], labels[start : start + 7])
    return codes, labels


@pytest.mark.parametrize("vocabulary", [256, 65_536, 100_000])
def test_round_trip(tmp_path, vocabulary):
    codes, labels = write(tmp_path / "train", vocabulary_size=vocabulary)
    source = open_source(f"codes:{tmp_path}", "train", num_classes=3, channels=1)
    assert isinstance(source, CodesSource) and source.kind == "codes"
    assert (len(source), source.length, source.copies) == (25, 14, 2)
    assert (source.sizes, source.vocabulary_size) == ((1, 4, 9), vocabulary)
    assert source.tokenizer == {"name": "vq", "fingerprint": "abc"}
    assert source.class_names == ("0", "1", "2")
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for i in range(25):
            item = reader[i]
            np.testing.assert_array_equal(item["codes"], codes[i, 0])
            assert item["codes"].dtype == np.int32 and item["label"].dtype == np.int32
            assert item["label"] == labels[i]
    stored = np.load(tmp_path / "train" / "codes-00000.npy")
    assert stored.dtype == (np.uint16 if vocabulary <= 65_536 else np.int32)
    assert stored.shape == (8, 2, 14)
    assert source.describe(24).endswith("codes-00003.npy row 0")
    assert len(pickle.dumps(source)) < 4096, "a pickled source carries no codes"


def test_one_of_the_copies_is_drawn(tmp_path):
    codes, _ = write(tmp_path / "train")
    source = open_source(f"codes:{tmp_path}", "train")
    draws = [source.fetch(5, np.random.default_rng(seed))["codes"] for seed in range(40)]
    firsts = [np.array_equal(draw, codes[5, 0]) for draw in draws]
    assert 8 < sum(firsts) < 32
    assert all(
        first or np.array_equal(draw, codes[5, 1])
        for first, draw in zip(firsts, draws, strict=True)
    )


def test_a_single_copy_may_be_two_dimensional(tmp_path):
    with CodesWriter(tmp_path / "test", "test", **(FIELDS | {"copies": 1})) as writer:
        writer.write(codes_of(3, 1)[:, 0], np.zeros(3, int))
        writer.write(np.zeros((0, 14), int), np.zeros(0, int))
    assert len(open_source(f"codes:{tmp_path}", "val")) == 3


def test_writer_checks_what_it_is_given(tmp_path):
    writer = CodesWriter(tmp_path / "a", "train", **FIELDS)
    zeros = np.zeros(4, int)
    for codes, labels, message in [
        (codes_of(4, 3), zeros, r"int64 \[4, 3, 14\].*expected integers \[n, 2, 14\]"),
        (codes_of(4)[:, 0], zeros, r"\[4, 14\]"),
        (codes_of(4).astype(float), zeros, "float64"),
        (codes_of(4), zeros[:3], r"int64 \[3\]"),
        (codes_of(4) + 200, zeros, r"codes span .*, outside vocabulary_size=256"),
        (codes_of(4) - 1, zeros, r"codes span -1.*, outside vocabulary_size=256"),
        (codes_of(4), zeros + 3, r"label 3 of item 0 is out of range for num_classes=3"),
    ]:
        with pytest.raises(ValueError, match=message):
            writer.write(codes, labels)
    with pytest.raises(ValueError, match="no codes were written"):
        writer.close()
    faults: list[tuple[dict[str, Any], str]] = [
        ({"copies": 0}, "copies=0 must be at least 1"),
        ({"sizes": ()}, r"sizes=\[\] must be positive step sizes"),
        ({"sizes": (1, 0)}, r"sizes=\[1, 0\]"),
        ({"class_names": ["x"]}, "1 class names for num_classes=3"),
    ]
    for changes, message in faults:
        with pytest.raises(ValueError, match=message):
            CodesWriter(tmp_path / "b", "train", **(FIELDS | changes))
    with pytest.raises(ValueError, match="split='val'; use 'train' or 'test'"):
        CodesWriter(tmp_path / "b", "val", **FIELDS)
    write(tmp_path / "c")
    with pytest.raises(ValueError, match="already holds a finished data set"):
        CodesWriter(tmp_path / "c", "train", **FIELDS)


def test_an_interrupted_writer_leaves_nothing_that_reads(tmp_path):
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        CodesWriter(tmp_path / "train", "train", **(FIELDS | {"shard_size": 4})) as writer,
    ):
        writer.write(codes_of(9), np.zeros(9, int))
        raise RuntimeError("out of memory")
    assert (tmp_path / "train" / "codes-00001.npy").exists()
    with pytest.raises(ValueError, match=r"meta.json: missing.*not finished"):
        open_source(f"codes:{tmp_path}", "train")
    with pytest.raises(ValueError, match="is not an empty directory"):
        CodesWriter(tmp_path / "train", "train", **FIELDS)


def test_reader_checks_completeness(tmp_path):
    write(tmp_path / "train")
    spec, folder = f"codes:{tmp_path}", tmp_path / "train"
    meta, shard, labels = folder / "meta.json", folder / "codes-00001.npy", folder / "labels.npy"
    content = json.loads(meta.read_text())
    for change, message in [
        ({"sizes": [1, 4]}, r"sizes \[1, 4\] sum to 5, not to length=14"),
        ({"vocabulary_size": "256"}, "vocabulary_size is '256', expected int"),
        ({"copies": True}, "copies is True, expected int"),
        ({"split": "test"}, "split is 'test', but the directory is named 'train'"),
        ({"class_names": []}, "0 class_names for num_classes=3"),
        ({"copies": 3}, r"codes-00000.npy: uint16 \[8, 2, 14\], but meta.json says"),
    ]:
        meta.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            open_source(spec, "train")
    meta.write_text(json.dumps(content))
    sound = shard.read_bytes()
    for damaged in (sound[:-9], sound[:40], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"codes-00001.npy: damaged"):
            open_source(spec, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"codes-00001.npy: missing; the cache is incomplete"):
        open_source(spec, "train")
    shard.write_bytes(sound)
    np.save(labels, np.zeros(24, np.int32))
    with pytest.raises(ValueError, match=r"labels.npy: shape \[24\] for 25 images"):
        open_source(spec, "train")
    np.save(labels, np.full(25, 3, np.int32))
    with pytest.raises(ValueError, match=r"labels.npy: label 3 of item 0 is out of range"):
        open_source(spec, "train")
    with pytest.raises(ValueError, match=r"data.channels=3, but codes.*set data.channels=1"):
        np.save(labels, np.zeros(25, np.int32))
        open_source(spec, "train", channels=3)


def test_codes_beyond_the_vocabulary_are_damage(tmp_path):
    write(tmp_path / "train")
    shard = tmp_path / "train" / "codes-00001.npy"
    codes = np.load(shard)
    codes[2, 0, 3] = 256
    np.save(shard, codes)
    with pytest.raises(UnreadableItem, match=r"codes-00001.npy row 2: .*vocabulary_size=256"):
        open_source(f"codes:{tmp_path}", "train")[10]
    skipping = open_source(f"codes:{tmp_path}", "train", on_error="skip")
    np.testing.assert_array_equal(skipping[10]["codes"], skipping[11]["codes"])
    assert skipping.skipped == 1
