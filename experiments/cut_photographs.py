"""Cuts a few large photographs into a folder of tiles that tokenizers can be tried on.

    python experiments/cut_photographs.py --photographs=china.jpg,flower.jpg,coffee.png \
        --out=data/photographs
    python experiments/train.py --config=configs/folder/tokenizer_vq.py:demo --workdir=runs/mine \
        --config.data.source=folder:data/photographs --config.data.num_classes=3

Every photograph is a class. The right part of each, --held_out of its width, gives the tiles of
val/, and no tile of train/ reaches into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from absl import app, flags
from PIL import Image

from ar_jax.data.decode import decode_image

PHOTOGRAPHS = flags.DEFINE_list("photographs", None, "Image files.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory that gets train/ and val/.", required=True)
SIDE = flags.DEFINE_integer("side", 80, "Of a tile, in pixels.", lower_bound=1)
STRIDE = flags.DEFINE_integer("stride", 20, "Between tiles of train/, in pixels.", lower_bound=1)
HELD_OUT = flags.DEFINE_float("held_out", 0.25, "Part of the width.", 0.0, 1.0)


def tiles(image: np.ndarray, side: int, stride: int) -> Iterator[np.ndarray]:
    """All tiles [side, side, 3] of an image [H, W, 3] at multiples of the stride, row by row."""
    height, width = image.shape[:2]
    for top in range(0, height - side + 1, stride):
        for left in range(0, width - side + 1, stride):
            yield image[top : top + side, left : left + side]


def cut(path: Path, directory: Path, side: int, stride: int, held_out: float) -> dict[str, int]:
    """Writes the tiles of one photograph; tiles of every split.

    Raises:
        ValueError: no image, or one in which a split has no room for a tile.
    """
    image = decode_image(path.read_bytes(), str(path), 3)
    border = round(image.shape[1] * (1 - held_out))
    counts = {}
    # Held-out tiles do not overlap: their number is that of different images.
    for split, part, step in (
        ("train", image[:, :border], stride),
        ("val", image[:, border:], side),
    ):
        found = list(tiles(part, side, step))
        if not found:
            raise ValueError(
                f"{path}: {part.shape[0]}x{part.shape[1]} pixels for {split}/, in which no tile of "
                f"--side={side} fits; take a larger photograph, or change --side or --held_out"
            )
        folder = directory / split / path.stem
        folder.mkdir(parents=True)
        for index, tile in enumerate(found):
            Image.fromarray(tile).save(folder / f"{index:05d}.png")
        counts[split] = len(found)
    return counts


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    directory = Path(OUT.value)
    if directory.exists():
        raise app.UsageError(f"--out={directory} exists already; name another directory")
    names = [Path(name).stem for name in PHOTOGRAPHS.value]
    if len(set(names)) < len(names):
        raise app.UsageError(f"--photographs: two have one name: {', '.join(sorted(names))}")
    for name in PHOTOGRAPHS.value:
        counts = cut(Path(name), directory, SIDE.value, STRIDE.value, HELD_OUT.value)
        print(f"{name}: " + ", ".join(f"{count:,} tiles of {s}/" for s, count in counts.items()))


if __name__ == "__main__":
    app.run(main)
