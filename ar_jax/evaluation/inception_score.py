"""The inception score as the ADM evaluator defines it, from logits that arrive in batches.

exp of the mean divergence of p(class | image) from the marginal of its split; splits are
consecutive images, and the score is the plain mean over splits, a short last one included. Only a
split's sums are kept: sum_i KL(p_i || m) = sum_i sum_c p_ic log p_ic - n sum_c m_c log m_c.
"""

from __future__ import annotations

import numpy as np

SPLIT_SIZE = 5000


class InceptionScore:
    """Adds up logits [n, K], in float64.

    ADM takes the logarithm of float32 probabilities, of which one that underflows makes the score
    NaN; here it is taken of the logits, and stays finite.
    """

    def __init__(self, split_size: int = SPLIT_SIZE) -> None:
        """Nothing seen yet; ValueError for splits below one image."""
        if split_size < 1:
            raise ValueError(f"split_size: {split_size} must be at least 1")
        self._split_size = split_size
        self._scores: list[float] = []  # of complete splits
        self._count = 0  # images of the split under way
        self._negative_entropy = 0.0
        self._marginal = np.zeros(0)  # [K], sum of probabilities

    def add(self, logits: np.ndarray) -> None:
        """Takes in logits [n, K]; ValueError if they are not finite, or of another width."""
        logits = np.asarray(logits)
        if logits.ndim != 2 or not np.isfinite(logits).all():
            raise ValueError(
                f"logits: shape {logits.shape}, expected [N, K] without NaN and infinity"
            )
        if self._marginal.size and logits.shape[1] != self._marginal.size:
            raise ValueError(f"logits: {logits.shape[1]} classes, {self._marginal.size} before")
        while len(logits):
            part = logits[: self._split_size - self._count]
            logits = logits[len(part) :]
            logs = log_softmax(part)
            probabilities = np.exp(logs)
            self._negative_entropy += float((probabilities * logs).sum())
            total = probabilities.sum(axis=0)
            self._marginal = self._marginal + total if self._marginal.size else total
            self._count += len(part)
            if self._count == self._split_size:
                self._scores.append(self._split_score())
                self._count, self._negative_entropy = 0, 0.0
                self._marginal = np.zeros_like(self._marginal)

    def result(self) -> float:
        """The score so far, in [1, K]; ValueError if nothing was added."""
        scores = self._scores + ([self._split_score()] if self._count else [])
        if not scores:
            raise ValueError("an inception score of no images")
        return float(np.mean(scores))

    def _split_score(self) -> float:
        marginal = self._marginal / self._count
        log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))  # 0 log 0 is 0
        divergence = self._negative_entropy / self._count - float(marginal @ log_marginal)
        return float(np.exp(max(divergence, 0.0)))


def inception_score(logits: np.ndarray, split_size: int = SPLIT_SIZE) -> float:
    """The score of logits [N, K] that are all at hand; raises as `InceptionScore` does."""
    score = InceptionScore(split_size)
    score.add(logits)
    return score.result()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Logarithms of the probabilities, float64 [N, K]."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
