"""Cached codes: the streaming writer, one that goes on, the reader, and damage."""

from __future__ import annotations

import json
import pickle
from typing import Any

import numpy as np
import pytest
from grain.sources import ArrayRecordDataSource

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
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert names == [*(f"codes-0000{n}.arrayrecord" for n in range(4)), "meta.json"]
    record = ArrayRecordDataSource([str(tmp_path / "train" / names[1])])[2]
    kind = "<u2" if vocabulary <= 65_536 else "<i4"
    assert record == labels[10].astype("<i4").tobytes() + codes[10].astype(kind).tobytes()
    assert source.describe(24).endswith("codes-00003.arrayrecord record 0")
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


def interrupt(directory, codes: np.ndarray, labels: np.ndarray, **changes) -> None:
    """Writes some images in two files of 4, and begins a third."""
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        CodesWriter(directory, "train", **(FIELDS | {"shard_size": 4} | changes)) as writer,
    ):
        writer.write(codes[:9], labels[:9])
        raise RuntimeError("out of memory")


def test_an_interrupted_writer_leaves_nothing_that_reads(tmp_path):
    interrupt(tmp_path / "train", codes_of(9), np.zeros(9, int))
    names = sorted(path.name for path in (tmp_path / "train").iterdir())
    assert names == ["codes-00000.arrayrecord", "codes-00001.arrayrecord", "unfinished.json"]
    with pytest.raises(ValueError, match=r"meta.json: missing.*not finished"):
        open_source(f"codes:{tmp_path}", "train")
    faults: list[tuple[dict[str, Any], str]] = [
        ({"copies": 1}, "of another copies: 2 there, 1 now; remove it"),
        ({"shard_size": 5}, "of another shard_size: 4 there, 5 now"),
        ({"tokenizer": {"name": "vq", "fingerprint": "b"}}, "tokenizer.fingerprint: 'abc' there"),
        ({"tokenizer": {"name": "vq"}}, "tokenizer.fingerprint: 'abc' there, None now"),
    ]
    for changes, message in faults:
        with pytest.raises(ValueError, match=message):
            CodesWriter(tmp_path / "train", "train", **(FIELDS | {"shard_size": 4} | changes))
    (tmp_path / "train" / "unfinished.json").unlink()
    with pytest.raises(ValueError, match="is not an empty directory"):
        CodesWriter(tmp_path / "train", "train", **FIELDS)


@pytest.mark.parametrize("damage", ["none", "killed", "cut", "gone"])
def test_a_writer_goes_on_after_the_files_that_are_whole(tmp_path, damage):
    """What it leaves in the end is what an uninterrupted one does, byte by byte."""
    codes, labels = write(tmp_path / "whole", 11, shard_size=4)
    folder, begun = tmp_path / "train", 8
    interrupt(folder, codes, labels)
    second = folder / "codes-00001.arrayrecord"
    if damage == "killed":  # a file that nobody ended, under the name it is written under
        second.with_name(".codes-00002.arrayrecord.partial").write_bytes(second.read_bytes()[:500])
    elif damage == "cut":  # after a loss of power, say
        second.write_bytes(second.read_bytes()[:300])
        begun = 4
    elif damage == "gone":
        (folder / "codes-00000.arrayrecord").unlink()
        begun = 0
    with CodesWriter(folder, "train", **(FIELDS | {"shard_size": 4})) as writer:
        assert writer.written == begun
        writer.write(codes[begun:], labels[begun:])
    there = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert there == {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}


def test_a_writer_that_had_all_files_only_finishes(tmp_path):
    codes, labels = write(tmp_path / "whole", 8, shard_size=4)
    interrupt(tmp_path / "train", codes[:8], labels[:8])
    with CodesWriter(tmp_path / "train", "train", **(FIELDS | {"shard_size": 4})) as writer:
        assert writer.written == 8
    assert len(open_source(f"codes:{tmp_path}", "train")) == 8


def test_reader_checks_completeness(tmp_path):
    write(tmp_path / "train")
    spec, folder = f"codes:{tmp_path}", tmp_path / "train"
    meta, shard = folder / "meta.json", folder / "codes-00001.arrayrecord"
    content = json.loads(meta.read_text())
    for change, message in [
        ({"sizes": [1, 4]}, r"sizes \[1, 4\] sum to 5, not to length=14"),
        ({"vocabulary_size": "256"}, "vocabulary_size is '256', expected int"),
        ({"copies": True}, "copies is True, expected int"),
        ({"split": "test"}, "split is 'test', but the directory is named 'train'"),
        ({"class_names": []}, "0 class_names for num_classes=3"),
        ({"format": "ar_jax.codes.0"}, "is 'ar_jax.codes.0', expected 'ar_jax.codes.2'"),
    ]:
        meta.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=message):
            open_source(spec, "train")
    meta.write_text(json.dumps(content | {"copies": 3}))
    with pytest.raises(UnreadableItem, match=r"00000.arrayrecord record 1: 60 bytes.* says 88"):
        open_source(spec, "train")[1]
    meta.write_text(json.dumps(content | {"num_classes": 1, "class_names": ["a"]}))
    with pytest.raises(ValueError, match=r"00000.arrayrecord record 1: label 1 is out of range"):
        open_source(spec, "train", on_error="skip")[1]
    meta.write_text(json.dumps(content))
    sound = shard.read_bytes()
    for damaged in (sound[:-9], sound[:40], b""):
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"codes-00001.arrayrecord: holds 0 readable records"):
            open_source(spec, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"codes-00001.arrayrecord: missing; meta.json lists it"):
        open_source(spec, "train")
    shard.write_bytes(sound)
    with pytest.raises(ValueError, match=r"data.channels=3, but codes.*set data.channels=1"):
        open_source(spec, "train", channels=3)


def test_a_flipped_bit_is_named_or_skipped(tmp_path):
    """A code that is as possible as the one that was written."""
    codes, _ = write(tmp_path / "train")
    shard = tmp_path / "train" / "codes-00001.arrayrecord"
    content = bytearray(shard.read_bytes())
    at = content.find(codes[10].astype("<u2").tobytes())
    assert at > 0
    content[at + 6] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UnreadableItem, match=r"codes-00001.arrayrecord record 2: damaged"):
        open_source(f"codes:{tmp_path}", "train")[10]
    skipping = open_source(f"codes:{tmp_path}", "train", on_error="skip")
    np.testing.assert_array_equal(skipping[10]["codes"], codes[11, 0])
    assert skipping.skipped == 1


def test_codes_beyond_the_vocabulary_are_damage(tmp_path):
    write(tmp_path / "train")
    meta = tmp_path / "train" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"vocabulary_size": 100}))
    with pytest.raises(UnreadableItem, match=r"00001.arrayrecord record 2: .*vocabulary_size=100"):
        open_source(f"codes:{tmp_path}", "train")[10]


def test_bits_are_kept_eight_a_byte(tmp_path):
    """Of 14 codes of 5 bits, 70 bits in 9 bytes; what comes back is int8."""
    bits = np.random.default_rng(0).integers(0, 2, (25, 2, 14, 5))
    fields = FIELDS | {"vocabulary_size": 0, "bits": 5, "shard_size": 8}
    with CodesWriter(tmp_path / "train", "train", **fields) as writer:
        writer.write(bits, np.arange(25) % 3)
        with pytest.raises(ValueError, match=r"codes span 0..2, outside the bits 0 and 1"):
            writer.write(2 * bits[:1], np.zeros(1, int))
    source = open_source(f"codes:{tmp_path}", "train")
    assert isinstance(source, CodesSource)
    assert (source.bits, source.width, source.vocabulary_size) == (5, 0, 0)
    for i in range(25):
        item = source[i]
        assert item["codes"].dtype == np.int8
        np.testing.assert_array_equal(item["codes"], bits[i, 0])
    draws = [source.fetch(5, np.random.default_rng(seed))["codes"] for seed in range(8)]
    assert any(np.array_equal(draw, bits[5, 1]) for draw in draws)
    record = ArrayRecordDataSource([str(tmp_path / "train" / "codes-00001.arrayrecord")])[2]
    assert len(record) == 4 + 2 * 9 and record[4:13] == np.packbits(bits[10, 0]).tobytes()
    with pytest.raises(ValueError, match="vocabulary_size=256 with bits=5: codes are integers"):
        CodesWriter(tmp_path / "b", "train", **FIELDS, bits=5)
