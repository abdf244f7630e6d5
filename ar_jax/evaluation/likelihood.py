"""Negative log-likelihood and token accuracy on held-out images, step by step of the schedule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LikelihoodResult:
    """Means over images.

    Attributes:
        count: images.
        nats_per_image: negative log-likelihood of an image's whole code stream.
        bits_per_code: the same in bits, divided by the number of codes (bits per dimension of the
            code stream; not of the pixels, since the tokenizer loses information).
        nll_per_step: nats per code at every step of the schedule, [S].
        accuracy_per_step: fraction of codes that are the model's most probable one, [S].
        accuracy: the same over all codes.
    """

    count: int
    nats_per_image: float
    bits_per_code: float
    nll_per_step: np.ndarray
    accuracy_per_step: np.ndarray
    accuracy: float


class LikelihoodMeter:
    """Adds up per-code losses and hits over batches."""

    def __init__(self, sizes: Sequence[int]) -> None:
        """Nothing measured yet; `sizes` are the codes of every step, which sum to L."""
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes: {tuple(sizes)}, expected one positive size per step")
        self._sizes = np.asarray(sizes)
        self._starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
        self._nll = np.zeros(len(sizes))  # [S]
        self._hits = np.zeros(len(sizes))  # [S]
        self._count = 0

    def add(self, nll: np.ndarray, correct: np.ndarray, mask: np.ndarray | None = None) -> None:
        """Takes in one batch.

        Args:
            nll: nats of every code, [B, L].
            correct: whether the most probable code is the true one, bool or 0/1, [B, L].
            mask: 1 for images, 0 for rows that only fill up the batch, [B].

        Raises:
            ValueError: shapes that disagree, or a NaN in `nll` (infinity is a legitimate loss).
        """
        nll, correct = np.asarray(nll, np.float64), np.asarray(correct, np.float64)
        length = int(self._sizes.sum())
        if nll.ndim != 2 or nll.shape[1] != length or correct.shape != nll.shape:
            raise ValueError(
                f"nll {nll.shape} and correct {correct.shape}: expected [B, {length}] both"
            )
        if mask is not None:
            rows = np.asarray(mask) > 0
            if rows.shape != (len(nll),):
                raise ValueError(f"mask: shape {rows.shape}, expected ({len(nll)},)")
            nll, correct = nll[rows], correct[rows]
        if np.isnan(nll).any():
            raise ValueError(f"nll: NaN for image {self._count + np.isnan(nll).any(1).argmax()}")
        self._nll += np.add.reduceat(nll.sum(axis=0), self._starts)
        self._hits += np.add.reduceat(correct.sum(axis=0), self._starts)
        self._count += len(nll)

    def result(self) -> LikelihoodResult:
        """Means over everything added; ValueError if that is nothing."""
        if self._count == 0:
            raise ValueError("no images were added")
        length = int(self._sizes.sum())
        nats = float(self._nll.sum() / self._count)
        return LikelihoodResult(
            count=self._count,
            nats_per_image=nats,
            bits_per_code=nats / (length * math.log(2.0)),
            nll_per_step=self._nll / (self._count * self._sizes),
            accuracy_per_step=self._hits / (self._count * self._sizes),
            accuracy=float(self._hits.sum() / (self._count * length)),
        )
