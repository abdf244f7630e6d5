"""Builds the Fashion-MNIST subset that ships inside the package.

    python experiments/build_embedded.py --source=DIR

DIR holds the four idx files of Fashion-MNIST (train-images-idx3-ubyte.gz and so on). The archive
carries no dates, names or permissions of this machine, so the same input and the same zlib give the
same bytes. Plain deflate, so that `np.load` reads it anywhere: PNG-like filters save 6% at best.
"""

from __future__ import annotations

import hashlib
import io
import pathlib
import zipfile

import numpy as np
from absl import app, flags

from ar_jax.data.idx import find_idx, read_idx

SOURCE = flags.DEFINE_string("source", None, "Directory of the idx files.", required=True)
OUTPUT = flags.DEFINE_string(
    "output",
    str(pathlib.Path(__file__).resolve().parents[1] / "ar_jax/data/embedded/fashion_mnist.npz"),
    "File to write.",
)
TRAIN = flags.DEFINE_integer("train", 20_000, "Training images to keep.", lower_bound=1)
TEST = flags.DEFINE_integer("test", 4_000, "Test images to keep.", lower_bound=1)

EPOCH = (1980, 1, 1, 0, 0, 0)  # the earliest date a zip archive can hold


def first(directory: pathlib.Path, split: str, count: int) -> dict[str, np.ndarray]:
    """The first `count` images and labels of a split."""
    images = read_idx(find_idx(directory, split, "images", "idx3"))
    labels = read_idx(find_idx(directory, split, "labels", "idx1"))
    if min(len(images), len(labels)) < count:
        raise ValueError(
            f"{directory}: {len(images)} {split} images and {len(labels)} labels, --{split}={count}"
            " asks for more"
        )
    return {f"{split}_images": images[:count], f"{split}_labels": labels[:count]}


def write_npz(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Like np.savez_compressed, but the bytes depend on the arrays alone."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy", EPOCH)
            entry.create_system = 3
            archive.writestr(entry, buffer.getvalue(), zipfile.ZIP_DEFLATED, compresslevel=9)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    source, output = pathlib.Path(SOURCE.value), pathlib.Path(OUTPUT.value)
    write_npz(output, first(source, "train", TRAIN.value) | first(source, "test", TEST.value))
    content = output.read_bytes()
    print(f"{output}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")


if __name__ == "__main__":
    app.run(main)
