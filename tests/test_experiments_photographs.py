"""A folder of tiles cut out of photographs."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ar_jax.data import open_source
from tests.smoke_runs import script


def photograph(path, height, width):
    """An image whose pixels say where they lie; returns its path."""
    rows, columns = np.indices((height, width))
    Image.fromarray(np.stack([rows, columns, rows * 0], -1).astype(np.uint8)).save(path)
    return path


def cut_photographs(*flags):
    with script("cut_photographs", *flags) as module:
        module.main([])


def columns(folder, split):
    source = open_source(f"folder:{folder}", split, channels=3)
    return [source.fetch(i)["image"][..., 1] for i in range(len(source))]


def test_no_tile_of_one_split_reaches_into_the_other(tmp_path):
    names = [photograph(tmp_path / f"{name}.png", 40, 100) for name in "ab"]
    cut_photographs(
        f"--photographs={names[0]},{names[1]}",
        f"--out={tmp_path}/tiles",
        *("--side=16", "--stride=6", "--held_out=0.25"),
    )
    train, held_out = columns(tmp_path / "tiles", "train"), columns(tmp_path / "tiles", "test")
    assert {tile.shape for tile in (*train, *held_out)} == {(16, 16)}
    # Of each photograph 75 columns give (75 - 16) // 6 + 1 = 10 lefts and 5 tops, 25 give 1 and 2.
    assert (len(train), len(held_out)) == (2 * 5 * 10, 2 * 2 * 1)
    assert max(tile.max() for tile in train) < 75 <= min(tile.min() for tile in held_out)
    assert open_source(f"folder:{tmp_path}/tiles", "train", channels=3).class_names == ("a", "b")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--side=60"], "b.png: 50x75 pixels for train/, in which no tile of --side=60 fits"),
        (["--side=30"], "b.png: 50x25 pixels for val/"),
    ],
)
def test_photographs_that_are_too_small_are_named(flags, message, tmp_path):
    path = photograph(tmp_path / "b.png", 50, 100)
    with pytest.raises(ValueError, match=message):
        cut_photographs(f"--photographs={path}", f"--out={tmp_path}/tiles", *flags)


def test_what_is_there_is_left_alone(tmp_path):
    path = photograph(tmp_path / "b.png", 50, 100)
    with pytest.raises(Exception, match="exists already; name another directory"):
        cut_photographs(f"--photographs={path}", f"--out={tmp_path}", "--side=16")
