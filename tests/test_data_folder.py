"""Folders of class folders: layouts, splits, channels, and every way to be damaged."""

from __future__ import annotations

import pathlib
import pickle

import numpy as np
import pytest
from PIL import Image

from ar_jax.data import UnreadableItem, open_source
from ar_jax.data.transforms import ImageTransform


def draw(path: pathlib.Path, value: int = 0, *, size=(9, 7), mode: str = "RGB") -> None:
    """Writes a one-colour image; the suffix chooses the format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value if mode == "L" else (value,) * len(mode)).save(path)


def tree(root: pathlib.Path, counts: dict[str, int]) -> None:
    for name, count in counts.items():
        for i in range(count):
            draw(root / name / f"{i:03d}.png", i % 256)


def files(source) -> set[str]:
    return {source.describe(i) for i in range(len(source))}


def test_class_folders_sorted_with_labels(tmp_path):
    tree(tmp_path, {"zebra": 30, "Ant": 40, "cat": 20})
    draw(tmp_path / "cat" / "photo.JPEG", 200, size=(30, 20))
    draw(tmp_path / "cat" / "photo.webp", 100)
    source = open_source(f"folder:{tmp_path}", "train", holdout=0.001)
    assert source.class_names == ("Ant", "cat", "zebra")
    assert (source.num_classes, source.channels, source.image_size) == (3, 3, None)
    for i in range(len(source)):
        name = pathlib.Path(source.describe(i)).parent.name
        assert source.class_names[int(source[i]["label"])] == name
    item = source[len(source) - 1]
    assert item["image"].shape == (7, 9, 3) and item["image"].dtype == np.uint8
    assert item["label"].dtype == np.int32
    sizes = {source[i]["image"].shape for i in range(len(source))}
    assert (20, 30, 3) in sizes
    np.testing.assert_array_equal(
        pickle.loads(pickle.dumps(source))[3]["image"], source[3]["image"]
    )


def test_hash_split_is_disjoint_complete_and_stable(tmp_path):
    tree(tmp_path / "a", {"cat": 150, "dog": 150, "rare": 1})
    spec = f"folder:{tmp_path / 'a'}"
    train, test = open_source(spec, "train"), open_source(spec, "test")
    assert not files(train) & files(test)
    assert len(train) + len(test) == 301
    assert 15 <= len(test) <= 45, "about a tenth is held out"
    assert train.class_names == test.class_names == ("cat", "dog", "rare")
    held = {name.split("/a/")[1] for name in files(test)}
    tree(tmp_path / "b", {"cat": 160, "dog": 150, "rare": 1})
    moved = open_source(f"folder:{tmp_path / 'b'}", "test")
    assert {n.split("/b/")[1] for n in files(moved)} >= held, "additions move no image"


def test_no_class_loses_all_its_training_images(tmp_path):
    # A tenth of 40 lone images would be held out.
    tree(tmp_path, {"cat": 40} | {f"rare{i:02d}": 1 for i in range(40)})
    train, test = (open_source(f"folder:{tmp_path}", split) for split in ("train", "test"))
    assert {int(train[i]["label"]) for i in range(len(train))} == set(range(41))
    assert len(train) + len(test) == 80 and train.class_names == test.class_names


@pytest.mark.parametrize("held_out", ["val", "test", "validation"])
def test_split_folders(tmp_path, held_out):
    tree(tmp_path / "train", {"cat": 3, "dog": 4})
    tree(tmp_path / held_out, {"dog": 2})
    spec = f"folder:{tmp_path}"
    train, test = open_source(spec, "train"), open_source(spec, "val")
    assert (len(train), len(test)) == (7, 2)
    assert test.class_names == ("cat", "dog")
    assert [int(test[i]["label"]) for i in range(2)] == [1, 1], "labels follow the training names"


def test_a_class_may_be_called_train(tmp_path):
    tree(tmp_path, {"train": 30, "bus": 30})
    assert open_source(f"folder:{tmp_path}", "train").class_names == ("bus", "train")


def test_mixed_channels_are_refused_or_converted(tmp_path):
    draw(tmp_path / "train" / "cat" / "a.png", 10)
    draw(tmp_path / "train" / "cat" / "b.png", 20, mode="L")
    draw(tmp_path / "train" / "cat" / "c.png", 30, mode="RGBA")
    spec = f"folder:{tmp_path}"
    source = open_source(spec, "train", on_error="skip")
    with pytest.raises(ValueError, match=r"b\.png: has 1 channel\(s\).*has 3; set data.channels"):
        source[1]
    for channels in (1, 3):
        source = open_source(spec, "train", channels=channels)
        assert {source[i]["image"].shape for i in range(3)} == {(7, 9, channels)}
        assert source[1]["image"].max() == 20
    with pytest.raises(ValueError, match="channels=2; image files give channels=1 or 3"):
        open_source(spec, "train", channels=2)


def test_corrupt_image_is_named_or_skipped_and_counted(tmp_path):
    tree(tmp_path / "train", {"cat": 4})
    bad = tmp_path / "train" / "cat" / "002.png"
    bad.write_bytes(bad.read_bytes()[:30])
    spec = f"folder:{tmp_path}"
    with pytest.raises(UnreadableItem, match=r"cat/002\.png: cannot be decoded.*on_error='skip'"):
        open_source(spec, "train")[2]
    source = open_source(spec, "train", on_error="skip")
    np.testing.assert_array_equal(source[2]["image"], source[3]["image"])
    assert source.skipped == 1
    (tmp_path / "train" / "cat" / "001.png").unlink()
    with pytest.raises(UnreadableItem, match=r"001\.png: cannot be read"):
        source._source[1]  # type: ignore[attr-defined]
    np.testing.assert_array_equal(source[1]["image"], source[3]["image"])
    assert source.skipped == 2


def test_first_image_corrupt(tmp_path):
    tree(tmp_path / "train", {"cat": 2})
    (tmp_path / "train" / "cat" / "000.png").write_bytes(b"")
    assert open_source(f"folder:{tmp_path}", "train", on_error="skip").channels == 3
    (tmp_path / "train" / "cat" / "001.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"its first 2 images are unreadable: .*001\.png"):
        open_source(f"folder:{tmp_path}", "train")


def test_layout_faults_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"folder:/nowhere/at/all: no such directory"):
        open_source("folder:/nowhere/at/all", "train")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty: holds no class folders.*<class>/x\.png"):
        open_source(f"folder:{empty}", "train")

    hollow = tmp_path / "hollow"
    tree(hollow, {"cat": 20})
    (hollow / "dog").mkdir()
    (hollow / "dog" / "notes.txt").write_text("soon")
    (hollow / ".git").mkdir()
    with pytest.raises(ValueError, match=r"hollow/dog: class folder without images"):
        open_source(f"folder:{hollow}", "train")

    strange = tmp_path / "strange"
    tree(strange / "train", {"cat": 2})
    with pytest.raises(ValueError, match=r"has train/ but none of test/, val/"):
        open_source(f"folder:{strange}", "test")
    tree(strange / "val", {"cats": 2})
    with pytest.raises(ValueError, match=r"val/cats: class 'cats' is not among the 1 classes"):
        open_source(f"folder:{strange}", "test")

    tiny = tmp_path / "tiny"
    tree(tiny, {"cat": 1})
    with pytest.raises(ValueError, match=r"holds no images; .*val/<class>/"):
        open_source(f"folder:{tiny}", "test")
    with pytest.raises(ValueError, match="holdout=0 must be a fraction"):
        open_source(f"folder:{tiny}", "test", holdout=0)
    with pytest.raises(
        ValueError, match=r"data.num_classes=5, but folder.* set data.num_classes=1"
    ):
        open_source(f"folder:{tiny}", "train", num_classes=5)


def test_stray_files_are_ignored_with_a_warning(tmp_path, caplog):
    tree(tmp_path / "train", {"cat": 2})
    (tmp_path / "train" / "cat" / "labels.csv").write_text("")
    (tmp_path / "train" / "cat" / ".DS_Store").write_text("")
    (tmp_path / "README").write_text("")
    with caplog.at_level("WARNING"):
        assert len(open_source(f"folder:{tmp_path}", "train")) == 2
    assert "ignored 1 entries that are not images, such as labels.csv" in caplog.text


def test_wrong_size_without_a_crop_names_the_file(tmp_path):
    from ar_jax.data import train_iterator

    tree(tmp_path / "train", {"cat": 3})
    source = open_source(f"folder:{tmp_path}", "train")
    iterator = train_iterator(source, ImageTransform(size=8), batch_size=2, seed=0)
    with pytest.raises(ValueError, match=r"cat/00\d\.png: is 7x9 pixels while data.image_size=8"):
        next(iterator)
    with pytest.raises(ValueError, match="closed"):
        next(iterator)
