"""How close reconstructions are to their originals: MSE, PSNR, SSIM.

Everything is measured on uint8 images, as they would be stored, in float64. A tokenizer's float
output is rounded first (`to_uint8`); unrounded outputs would score slightly differently.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import correlate1d

SSIM_WINDOW = 11
SSIM_SIGMA = 1.5
_C1 = (0.01 * 255.0) ** 2
_C2 = (0.03 * 255.0) ** 2


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Float images in [-1, 1], clipped, to the nearest uint8: the inverse of x / 127.5 - 1."""
    images = np.asarray(images)
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"images: dtype {images.dtype}, expected floats in [-1, 1]")
    if not np.isfinite(images).all():
        raise ValueError("images: NaN or infinity, which no pixel value can stand for")
    scaled = (images.astype(np.float64) + 1.0) * 127.5
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def _check_pair(originals: np.ndarray, reconstructions: np.ndarray) -> None:
    for name, images in (("originals", originals), ("reconstructions", reconstructions)):
        if images.dtype != np.uint8:
            raise ValueError(f"{name}: dtype {images.dtype}, expected uint8 (see to_uint8)")
        if images.ndim != 4:
            raise ValueError(f"{name}: shape {images.shape}, expected [N, H, W, C]")
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"originals and reconstructions disagree: {originals.shape}, {reconstructions.shape}"
        )


def mse(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Mean squared error of uint8 images [N, H, W, C] taken to [0, 1]; float64 [N]."""
    _check_pair(originals, reconstructions)
    difference = (originals.astype(np.float64) - reconstructions.astype(np.float64)) / 255.0
    return np.square(difference).mean(axis=(1, 2, 3))


def psnr(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """-10 log10 of the MSE (data range 1) in dB; float64 [N], infinite for identical images."""
    with np.errstate(divide="ignore"):
        return -10.0 * np.log10(mse(originals, reconstructions))


def _window() -> np.ndarray:
    """The Gaussian along an axis, [11], of sum 1."""
    offsets = np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2
    weights = np.exp(-np.square(offsets) / (2.0 * SSIM_SIGMA**2))
    return weights / weights.sum()


def ssim(originals: np.ndarray, reconstructions: np.ndarray) -> np.ndarray:
    """Structural similarity of Wang et al. 2004; float64 [N], 1 for identical images.

    11 x 11 Gaussian window of sigma 1.5, K1 = 0.01, K2 = 0.03, windows that lie wholly inside the
    image, weighted (not sample) variances; every channel on its own, then the mean.

    Raises:
        ValueError: images that are not uint8 or disagree, or smaller than the window.
    """
    _check_pair(originals, reconstructions)
    height, width = originals.shape[1:3]
    if min(height, width) < SSIM_WINDOW:
        raise ValueError(
            f"originals: {height}x{width} pixels, but SSIM's window takes at least "
            f"{SSIM_WINDOW}x{SSIM_WINDOW}"
        )
    window, inner = _window(), slice(SSIM_WINDOW // 2, -(SSIM_WINDOW // 2))

    def blur(image: np.ndarray) -> np.ndarray:
        """[N, H, W, C] -> [N, H - 10, W - 10, C]."""
        down = correlate1d(image, window, axis=1)[:, inner]
        return correlate1d(down, window, axis=2)[:, :, inner]

    x, y = originals.astype(np.float64), reconstructions.astype(np.float64)  # [N, H, W, C]
    mean_x, mean_y = blur(x), blur(y)
    variance_x = blur(x * x) - mean_x**2
    variance_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    similarity = ((2 * mean_x * mean_y + _C1) * (2 * covariance + _C2)) / (
        (mean_x**2 + mean_y**2 + _C1) * (variance_x + variance_y + _C2)
    )
    return similarity.mean(axis=(1, 2, 3))


@dataclass(frozen=True)
class ReconstructionResult:
    """Means over images.

    Attributes:
        count: images.
        mse: mean squared error in [0, 1].
        psnr: mean over images of each image's PSNR, in dB; infinite if one is reproduced exactly.
        psnr_of_mse: PSNR of the mean MSE, the other convention; never above `psnr`.
        ssim: mean structural similarity; None of images smaller than its window.
    """

    count: int
    mse: float
    psnr: float
    psnr_of_mse: float
    ssim: float | None


class ReconstructionMeter:
    """Adds up MSE, PSNR and SSIM over batches of uint8 images of one size."""

    def __init__(self) -> None:
        """Nothing measured yet."""
        self._count = 0
        self._mse = self._psnr = 0.0
        self._ssim: float | None = 0.0

    def add(self, originals: np.ndarray, reconstructions: np.ndarray) -> None:
        """Takes in uint8 images [n, H, W, C]; ValueError if they are not, or disagree."""
        _check_pair(originals, reconstructions)
        if min(originals.shape[1:3]) < SSIM_WINDOW:
            self._ssim = None
        if self._ssim is not None:
            self._ssim += float(ssim(originals, reconstructions).sum())
        self._mse += float(mse(originals, reconstructions).sum())
        self._psnr += float(psnr(originals, reconstructions).sum())
        self._count += len(originals)

    def result(self) -> ReconstructionResult:
        """Means over everything added; ValueError if that is nothing."""
        if self._count == 0:
            raise ValueError("no images were added")
        mean = self._mse / self._count
        return ReconstructionResult(
            count=self._count,
            mse=mean,
            psnr=self._psnr / self._count,
            psnr_of_mse=-10.0 * math.log10(mean) if mean > 0 else math.inf,
            ssim=None if self._ssim is None else self._ssim / self._count,
        )


def evaluate_reconstruction(
    originals: np.ndarray, reconstructions: np.ndarray, batch_size: int = 512
) -> ReconstructionResult:
    """MSE, PSNR and SSIM of uint8 images [N, H, W, C] that are all at hand."""
    _check_pair(originals, reconstructions)
    meter = ReconstructionMeter()
    for start in range(0, len(originals), batch_size):
        chunk = slice(start, start + batch_size)
        meter.add(originals[chunk], reconstructions[chunk])
    return meter.result()
