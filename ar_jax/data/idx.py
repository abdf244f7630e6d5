"""The idx format of MNIST and its relatives: gzipped or plain, images [N, H, W] or [N, H, W, C]."""

from __future__ import annotations

import gzip
import pathlib
import zlib

import numpy as np

from ar_jax.data.arrays import ArraySource
from ar_jax.data.source import check_labels

# The held-out files are called t10k in MNIST, test in some of its relatives.
PREFIXES = {"train": ("train",), "test": ("t10k", "test")}
UNSIGNED_BYTE = 0x08


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Reads one idx file of unsigned bytes: uint8, of the shape in its header.

    Raises ValueError that names the file where it is damaged, truncated, overlong or not idx.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: cannot be read ({type(error).__name__}: {error}); fetch the file again"
        ) from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{path}: not an idx file; one begins with two zero bytes")
    kind, rank = content[2], content[3]
    if kind != UNSIGNED_BYTE:
        raise ValueError(
            f"{path}: idx type 0x{kind:02x} is not supported; only unsigned bytes (0x08) are"
        )
    header = 4 + 4 * rank
    if len(content) < header:
        raise ValueError(f"{path}: ends inside its header; fetch the file again")
    shape = tuple(int(n) for n in np.frombuffer(content, ">u4", count=rank, offset=4))
    expected = header + int(np.prod(shape, dtype=np.int64))
    if len(content) != expected:
        raise ValueError(
            f"{path}: {len(content)} bytes where its header {list(shape)} needs {expected}; the "
            "file is truncated or damaged, fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def find_idx(directory: pathlib.Path, split: str, part: str, rank: str) -> pathlib.Path:
    """The file of one part ('images' or 'labels') of a split. ValueError where there is none."""
    tried = []
    for prefix in PREFIXES[split]:
        for separator in ("-", "."):
            for suffix in (".gz", ""):
                path = directory / f"{prefix}-{part}{separator}{rank}-ubyte{suffix}"
                if path.is_file():
                    return path
                tried.append(path.name)
    raise ValueError(f"{directory}: no {split} {part} here; looked for {', '.join(tried)}")


def open_idx(
    directory: str, split: str, *, num_classes: int | None, channels: int | None
) -> ArraySource:
    """Opens a directory of idx files.

    Without `num_classes` it is the largest label of the split plus one.
    """
    folder = pathlib.Path(directory)
    if not folder.is_dir():
        raise ValueError(f"idx:{directory}: no such directory")
    image_file = find_idx(folder, split, "images", "idx3")
    label_file = find_idx(folder, split, "labels", "idx1")
    images, labels = read_idx(image_file), read_idx(label_file)
    if images.ndim not in (3, 4):
        raise ValueError(f"{image_file}: shape {list(images.shape)}; images are [N, H, W] or 4-D")
    if labels.shape != (len(images),):
        raise ValueError(
            f"{label_file}: shape {list(labels.shape)} does not match the {len(images)} images of "
            f"{image_file.name}"
        )
    if num_classes is None:
        num_classes = int(labels.max(initial=0)) + 1
    check_labels(str(label_file), labels, num_classes)
    return ArraySource(
        f"idx:{directory} ({split})",
        images if images.ndim == 4 else images[..., None],
        labels,
        class_names=tuple(str(label) for label in range(num_classes)),
        channels=channels,
    )
