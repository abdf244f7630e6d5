"""Stored images to measure: npz files as ADM writes and reads them, and folders of PNG.

Nothing is held but the batch that is read. A file is known by its SHA-256 and its bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from ar_jax.data.decode import decode_image

IMAGES, LABELS = "arr_0", "arr_1"
LOSSLESS = (".png", ".bmp")
LOSSY = (".jpg", ".jpeg", ".webp")
CHUNK = 1 << 22  # bytes hashed at a time


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size that can be read as often as needed.

    Attributes:
        name: file, folder or data source.
        count: images.
        shape: (H, W, C) of each.
        labels: int [count], or None where they are not known.
        digest: SHA-256 of the file, or of the pixels.
        size: bytes of the file, or of the pixels.
        read: batch size -> batches uint8 [n, H, W, C], in order.
    """

    name: str
    count: int
    shape: tuple[int, int, int]
    labels: np.ndarray | None
    digest: str
    size: int
    read: Callable[[int], Iterator[np.ndarray]]

    def first(self, count: int, batch_size: int) -> Iterator[np.ndarray]:
        """Batches of the first ``count`` images."""
        left = count
        for batch in self.read(batch_size):
            yield batch[:left]
            left -= len(batch)
            if left <= 0:
                return

    @property
    def identity(self) -> str:
        """What a report says of it: SHA-256, bytes, images and resolution."""
        height, width, channels = self.shape
        return (
            f"{Path(self.name).name}, sha256 {self.digest}, {self.size:,} bytes, {self.count:,} "
            f"images of {height}x{width}x{channels}"
        )


def of_arrays(name: str, images: np.ndarray, labels: np.ndarray | None) -> ImageSet:
    """Images uint8 [N, H, W, C] that are at hand."""
    _check_images(name, images.dtype, images.shape)

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(images), batch_size):
            yield images[start : start + batch_size]

    digest = hashlib.sha256()
    for batch in read(256):
        digest.update(np.ascontiguousarray(batch).data)
    shape: Any = images.shape[1:]
    return ImageSet(name, len(images), shape, labels, digest.hexdigest(), images.nbytes, read)


def open_images(path: str | Path) -> ImageSet:
    """An npz file with arr_0, or a folder of PNG, however deep, in the order of their paths.

    Raises:
        ValueError: names the file that is missing, holds something else, or has another size.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if path.suffix != ".npz" or not path.is_file():
        raise ValueError(f"{path}: neither an .npz file nor a folder of images")
    with open_zip(path) as archive:
        names = {Path(name).stem for name in archive.namelist()}
        if IMAGES not in names:
            raise ValueError(f"{path}: no array {IMAGES} of images; it has {', '.join(names)}")
        with archive.open(f"{IMAGES}.npy") as stream:
            shape, dtype = _read_header(stream, path)
        labels = None
        if LABELS in names:
            with archive.open(f"{LABELS}.npy") as stream:
                labels = np.lib.format.read_array(stream, allow_pickle=False)
    _check_images(str(path), dtype, shape)
    if labels is not None and labels.shape != shape[:1]:
        raise ValueError(f"{path}: {LABELS} {labels.shape} for {shape[0]} images")

    def read(batch_size: int) -> Iterator[np.ndarray]:
        with open_zip(path) as archive, archive.open(f"{IMAGES}.npy") as stream:
            _read_header(stream, path)
            for start in range(0, shape[0], batch_size):
                count = min(batch_size, shape[0] - start)
                held = stream.read(count * int(np.prod(shape[1:])))
                yield np.frombuffer(held, np.uint8).reshape(count, *shape[1:])

    digest, size = file_identity(path)
    height, width, channels = shape[1:]
    shown = (height, width, channels)
    return ImageSet(str(path), shape[0], shown, labels, digest, size, read)


def open_zip(path: Path) -> zipfile.ZipFile:
    """An npz file; ValueError if it is none."""
    try:
        return zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: no .npz file ({error})") from error


def file_identity(path: Path) -> tuple[str, int]:
    """(SHA-256, bytes)."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest(), path.stat().st_size


def _read_header(stream: IO[bytes], path: Path) -> tuple[tuple[int, ...], np.dtype]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0
    if version != (1, 0):
        read = np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(stream)
    if fortran:
        raise ValueError(f"{path}: {IMAGES} is stored column by column; save a C-ordered array")
    return shape, dtype


def _check_images(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if dtype != np.uint8:
        raise ValueError(
            f"{name}: images of {dtype}, expected uint8 0..255: distances are of rounded images"
        )
    if len(shape) != 4 or shape[0] < 1:
        raise ValueError(f"{name}: shape {shape}, expected [N, H, W, C], N > 0")


def _open_folder(root: Path) -> ImageSet:
    found = sorted(path for path in root.rglob("*") if path.is_file())
    lossy = [path for path in found if path.suffix.lower() in LOSSY]
    if lossy:
        raise ValueError(
            f"{lossy[0]}: JPEG and WebP change the pixels that are measured; keep PNG or npz "
            "(real photographs are given as a source: folder:PATH)"
        )
    files = [path for path in found if path.suffix.lower() in LOSSLESS]
    if not files:
        raise ValueError(f"{root}: holds no {' or '.join(LOSSLESS)} files")
    shape: Any = _decode(files[0]).shape

    def read(batch_size: int) -> Iterator[np.ndarray]:
        for start in range(0, len(files), batch_size):
            images = []
            for path in files[start : start + batch_size]:
                image = _decode(path)
                if image.shape != shape:
                    raise ValueError(f"{path}: {image.shape}, but {files[0].name} is {shape}")
                images.append(image)
            yield np.stack(images)

    digest, size = hashlib.sha256(), 0
    for path in files:
        held = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(held)} ".encode())
        digest.update(held)
        size += len(held)
    return ImageSet(str(root), len(files), shape, None, digest.hexdigest(), size, read)


def _decode(path: Path) -> np.ndarray:
    return decode_image(path.read_bytes(), str(path), None)
