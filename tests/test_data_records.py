"""ArrayRecord files: round trip and damage."""

from __future__ import annotations

import json
import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from ar_jax.data import UnreadableItem, open_source
from ar_jax.data.records import source_items, write_records


def images(count: int, channels: int = 3) -> list[tuple[np.ndarray, int]]:
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (6 + i, 5, channels), dtype=np.uint8), i % 2) for i in range(count)
    ]


def test_round_trip_over_shards(tmp_path):
    items = images(10)
    assert write_records(tmp_path / "train", items, class_names=["cat", "dog"], shard_size=4) == 10
    source = open_source(f"arrayrecord:{tmp_path}", "train")
    assert (len(source), source.num_classes, source.channels) == (10, 2, 3)
    assert source.class_names == ("cat", "dog") and source.image_size is None
    for reader in (source, pickle.loads(pickle.dumps(source))):
        for i, (image, label) in enumerate(items):
            np.testing.assert_array_equal(reader[i]["image"], image)
            assert reader[i]["label"] == label and reader[i]["label"].dtype == np.int32
    assert source.describe(9).endswith("data-00002.arrayrecord record 1")
    grey = open_source(f"arrayrecord:{tmp_path}", "train", channels=1)
    assert grey[0]["image"].shape == (6, 5, 1)


def test_folder_keeps_its_bytes(tmp_path):
    for name, value in (("cat", 10), ("dog", 200)):
        (tmp_path / "in" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (value, 0, 90)).save(tmp_path / "in/train" / name / "a.jpg")
    folder = open_source(f"folder:{tmp_path / 'in'}", "train")
    write_records(tmp_path / "out/train", source_items(folder), class_names=folder.class_names)
    records = open_source(f"arrayrecord:{tmp_path / 'out'}", "train")
    assert records.class_names == folder.class_names
    for i in range(2):
        np.testing.assert_array_equal(records[i]["image"], folder[i]["image"])
        jpeg = pathlib.Path(folder.describe(i)).read_bytes()
        assert records._records[i][4:] == jpeg  # type: ignore[attr-defined]


def test_writer_refuses_what_it_must_not_write(tmp_path):
    with pytest.raises(ValueError, match=r"label 2 of item 0 is out of range.*0\.\.1"):
        write_records(tmp_path / "a", [(images(1)[0][0], 2)], class_names=["x", "y"])
    with pytest.raises(ValueError, match="no items to write"):
        write_records(tmp_path / "b", [], class_names=["x"])
    write_records(tmp_path / "c", images(2), class_names=["x", "y"])
    with pytest.raises(ValueError, match="already holds a finished data set"):
        write_records(tmp_path / "c", images(2), class_names=["x", "y"])
    (tmp_path / "c" / "meta.json").unlink()
    with pytest.raises(ValueError, match="is not an empty directory"):
        write_records(tmp_path / "c", images(2), class_names=["x", "y"])
    with pytest.raises(ValueError, match="shard_size=0"):
        write_records(tmp_path / "d", images(1), class_names=["x"], shard_size=0)


def test_incomplete_directories_are_named(tmp_path):
    spec = f"arrayrecord:{tmp_path}"
    with pytest.raises(ValueError, match=r"train: no such directory"):
        open_source(spec, "train")
    write_records(tmp_path / "train", images(10), class_names=["x", "y"], shard_size=4)
    shard = tmp_path / "train" / "data-00001.arrayrecord"
    sound = shard.read_bytes()
    shard.write_bytes(sound[: len(sound) // 2])
    with pytest.raises(ValueError, match=r"data-00001.arrayrecord: holds 0 readable records where"):
        open_source(spec, "train")
    shard.unlink()
    with pytest.raises(ValueError, match=r"data-00001.arrayrecord: missing; meta.json lists"):
        open_source(spec, "train")
    shard.write_bytes(sound)
    with pytest.raises(ValueError, match="channels=2; image files give 1 or 3"):
        open_source(spec, "train", channels=2)
    meta = tmp_path / "train" / "meta.json"
    content = json.loads(meta.read_text())
    for change, message in [
        ({"format": "other"}, "format is 'other', expected 'ar_jax.images.1'"),
        ({"class_names": 3}, "class_names is 3, expected list"),
        ({"shards": [["a.arrayrecord", "4"]]}, "expected .file name, number of items."),
        ({"shards": []}, "shards lists no items"),
    ]:
        meta.write_text(json.dumps(content | change))
        with pytest.raises(ValueError, match=f"meta.json: .*{message}"):
            open_source(spec, "train")
    meta.write_text("{")
    with pytest.raises(ValueError, match="meta.json: cannot be read as JSON"):
        open_source(spec, "train")
    meta.unlink()
    with pytest.raises(ValueError, match="meta.json: missing.*not finished"):
        open_source(spec, "train")


def test_damaged_records_are_named_or_skipped(tmp_path):
    items: list[tuple[bytes | np.ndarray, int]] = [*images(40)]
    items[3] = (b"no image", 0)
    write_records(tmp_path / "train", items, class_names=["x", "y"])
    shard = tmp_path / "train" / "data-00000.arrayrecord"
    content = bytearray(shard.read_bytes())
    source = open_source(f"arrayrecord:{tmp_path}", "train")
    at = content.find(source._records[30][20:60])  # type: ignore[attr-defined]
    assert at > 0
    content[at : at + 8] = b"\0" * 8
    shard.write_bytes(content)
    source = open_source(f"arrayrecord:{tmp_path}", "train")
    with pytest.raises(UnreadableItem, match=r"arrayrecord record 3: cannot be decoded"):
        source[3]
    with pytest.raises(UnreadableItem, match=r"arrayrecord record 30: damaged"):
        source[30]
    skipping = open_source(f"arrayrecord:{tmp_path}", "train", on_error="skip")
    for i in (3, 30):
        np.testing.assert_array_equal(skipping[i]["image"], items[i + 1][0])
    assert skipping.skipped == 2


def test_label_beyond_the_class_names(tmp_path):
    write_records(tmp_path / "train", images(2), class_names=["x", "y"])
    meta = tmp_path / "train" / "meta.json"
    meta.write_text(meta.read_text().replace('"y"', "").replace('"x",', '"x"'))
    with pytest.raises(ValueError, match=r"record 1: label 1 is out of range; .*names 1 classes"):
        open_source(f"arrayrecord:{tmp_path}", "train", on_error="skip")[1]
