"""What samples are compared with: ADM's reference batches and statistics, or any images.

ADM's reference files hold 10,000 images in arr_0, for precision and recall alone, and the mean and
covariance of all training images in mu and sigma (pool features) and mu_s and sigma_s (spatial
ones). A file without them is compared by the statistics of its images.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from ar_jax.data import Data, from_config, open_source
from ar_jax.evaluation.coding import rows
from ar_jax.evaluation.frechet import GaussianStats
from ar_jax.evaluation.image_set import (
    IMAGES,
    ImageSet,
    file_identity,
    open_images,
    open_zip,
)


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference.

    Attributes:
        name: file, folder or data source.
        digest, size: of the file or the pixels; see `ImageSet`.
        images: None in a file of statistics alone.
        pool, spatial: statistics that the file brings, of more images than it holds; None: those
            of ``images`` are taken. Their count is not known and 0.
    """

    name: str
    digest: str
    size: int
    images: ImageSet | None
    pool: GaussianStats | None = None
    spatial: GaussianStats | None = None

    @property
    def identity(self) -> str:
        """What a report says of it."""
        held = "statistics of images that it does not hold"
        if self.images is None:
            return f"{Path(self.name).name}, sha256 {self.digest}, {self.size:,} bytes, {held}"
        return self.images.identity + (f", and {held}" if self.pool is not None else "")


def of_images(images: ImageSet) -> Reference:
    """Images as a reference."""
    return Reference(images.name, images.digest, images.size, images)


def open_reference(
    path: str | Path | None, shape: tuple[int, int, int] | None = None, split: str = "test"
) -> Reference:
    """A reference by its path, or by a data source as 'folder:PATH' or 'embedded'.

    Args:
        path: an .npz file, a folder of PNG, or a data source; None is refused.
        shape: (H, W, C) that the images of a data source are cut to, from their centre.
        split: of a data source.

    Raises:
        ValueError: names the file and what is wrong.
    """
    if path is None:
        raise ValueError(
            "--reference is needed: ADM's reference batch or, for reconstructions, the originals"
        )
    path = str(path)
    if not Path(path).exists() and (":" in path or path == "embedded"):
        return of_images(_open_source(path, shape, split))
    if Path(path).suffix != ".npz":
        return of_images(open_images(path))
    if not Path(path).is_file():
        raise ValueError(f"{path}: no such file")
    with open_zip(Path(path)) as archive:
        names = {Path(name).stem for name in archive.namelist()}
    if "mu" not in names:
        return of_images(open_images(path))
    with np.load(path) as stored:
        pool = _stats(path, stored, "mu", "sigma")
        spatial = _stats(path, stored, "mu_s", "sigma_s") if "mu_s" in names else None
    images = open_images(path) if IMAGES in names else None
    digest, size = (images.digest, images.size) if images else file_identity(Path(path))
    return Reference(path, digest, size, images, pool, spatial)


def _stats(path: str, stored: np.lib.npyio.NpzFile, mean: str, covariance: str) -> GaussianStats:
    if covariance not in stored.files:
        raise ValueError(f"{path}: {mean} without {covariance}")
    mu = np.asarray(stored[mean], np.float64)
    sigma = np.asarray(stored[covariance], np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"{path}: {mean} {mu.shape} and {covariance} {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError(f"{path}: {mean} or {covariance} holds NaN or infinity")
    return GaussianStats(0, mu, sigma)


def _open_source(spec: str, shape: tuple[int, int, int] | None, split: str) -> ImageSet:
    if shape is None or shape[0] != shape[1]:
        raise ValueError(f"{spec}: images of {shape} cannot be cut from a source; they are square")
    source = open_source(spec, split, channels=shape[2], image_size=shape[0])
    section = {
        "source": spec,
        "image_size": shape[0],
        "channels": shape[2],
        "num_classes": source.num_classes,
        "crop": "none" if source.image_size == shape[:2] else "center",
    }
    return of_data(from_config(section, split))


def of_data(data: Data) -> ImageSet:
    """A split's images as evaluation sees them; read through once, for their SHA-256."""

    def batches(batch_size: int) -> Iterator[Mapping[str, np.ndarray]]:
        size = min(batch_size, len(data.source))
        yield from data.eval_batches(batch_size=size, process_index=0, process_count=1)

    digest, labels, shape = hashlib.sha256(), [], (0, 0, 0)
    for batch in batches(256):
        images = np.ascontiguousarray(rows(batch, "image"))
        digest.update(images.data)
        labels.append(rows(batch, "label"))
        shape = images.shape[1:]
    return ImageSet(
        name=data.source.name,
        count=len(data.source),
        shape=shape,
        labels=np.concatenate(labels),
        digest=digest.hexdigest(),
        size=len(data.source) * int(np.prod(shape)),
        read=lambda batch_size: (rows(batch, "image") for batch in batches(batch_size)),
    )
