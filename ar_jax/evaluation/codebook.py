"""How much of its codebook a tokenizer uses, step by step of the schedule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CodebookResult:
    """Usage and perplexity per step of the schedule (a scale, for next-scale) and overall.

    Attributes:
        vocab_size: entries in the codebook, V.
        codes: codes counted at every step, [S].
        usage: fraction of the entries used at least once at that step, [S]. It cannot exceed
            codes / V: compare steps with many codes only.
        perplexity: exp of the entropy of that step's code frequencies, [S]; between 1 and V.
        overall_usage: fraction of the entries used at any step.
        overall_perplexity: exp of the entropy of the frequencies of all codes together.
    """

    vocab_size: int
    codes: np.ndarray
    usage: np.ndarray
    perplexity: np.ndarray
    overall_usage: float
    overall_perplexity: float


def perplexity(counts: np.ndarray) -> np.ndarray:
    """exp of the entropy of counts [..., V] along the last axis; NaN where nothing was counted."""
    counts = np.asarray(counts, np.float64)
    total = counts.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = counts / total
        terms = np.where(counts > 0, p * np.log(p), 0.0)
    return np.where(total[..., 0] > 0, np.exp(-terms.sum(axis=-1)), np.nan)


def codebook_result(counts: np.ndarray) -> CodebookResult:
    """Usage and perplexity from counts [S, V] of every code at every step."""
    counts = np.asarray(counts)
    if counts.ndim != 2 or counts.size == 0:
        raise ValueError(f"counts: shape {counts.shape}, expected [S, V]")
    if counts.min() < 0 or counts.sum() == 0:
        raise ValueError("counts: expected non-negative counts that are not all zero")
    overall = counts.sum(axis=0)  # [V]
    return CodebookResult(
        vocab_size=counts.shape[1],
        codes=counts.sum(axis=1),
        usage=(counts > 0).mean(axis=1),
        perplexity=perplexity(counts),
        overall_usage=float((overall > 0).mean()),
        overall_perplexity=float(perplexity(overall)),
    )


class CodeCounter:
    """Counts codes [B, L] batch by batch; L is laid out step after step as `sizes` says."""

    def __init__(self, sizes: Sequence[int], vocab_size: int) -> None:
        """No codes yet.

        Args:
            sizes: codes of every step of the schedule; their sum is L.
            vocab_size: entries in the codebook.
        """
        if not sizes or min(sizes) < 1:
            raise ValueError(f"sizes: {tuple(sizes)}, expected one positive size per step")
        if vocab_size < 1:
            raise ValueError(f"vocab_size: {vocab_size}, expected a positive number")
        self._bounds = np.concatenate([[0], np.cumsum(sizes)])
        self.counts = np.zeros((len(sizes), vocab_size), np.int64)  # [S, V]

    def add(self, codes: np.ndarray) -> None:
        """Takes in integer codes [B, L].

        Raises:
            ValueError: not integers, another L than the sizes' sum, a code outside the codebook.
        """
        codes = np.asarray(codes)
        if not np.issubdtype(codes.dtype, np.integer):
            raise ValueError(f"codes: dtype {codes.dtype}, expected integers")
        if codes.ndim != 2 or codes.shape[1] != self._bounds[-1]:
            raise ValueError(
                f"codes: shape {codes.shape}, expected [B, {self._bounds[-1]}] "
                f"(the sum of the sizes {tuple(np.diff(self._bounds).tolist())})"
            )
        vocab_size = self.counts.shape[1]
        if codes.size and not (codes.min() >= 0 and codes.max() < vocab_size):
            raise ValueError(
                f"codes: values from {codes.min()} to {codes.max()}, but the codebook has "
                f"{vocab_size} entries"
            )
        for step in range(len(self.counts)):
            part = codes[:, self._bounds[step] : self._bounds[step + 1]]
            self.counts[step] += np.bincount(part.reshape(-1), minlength=vocab_size)

    def result(self) -> CodebookResult:
        """Usage and perplexity of everything added; ValueError if that is nothing."""
        return codebook_result(self.counts)
