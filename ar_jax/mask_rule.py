"""Which share of an image's codes stays masked, as generation goes on. numpy only."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskRule:
    """How many of the codes that are hidden at first still are after every iteration.

    Attributes:
        method: the share that is still hidden, with r the ratio of iterations that are done and n
            the codes that are hidden at first: 'uniform' 1 - r; 'powX', X a positive number,
            1 - r^X; 'cosine' cos(pi r / 2); 'arccos' arccos(r) / (pi / 2); 'log' -log2(r) /
            log2(n); 'exp' 1 - n^(r - 1). Clipped to [1e-6, 1].
        slack: added before the floor. Shares of whole numbers of codes come out just below them
            here and there; 1e-9 makes these whole again. 0 takes float64 as it is.

    Raises:
        ValueError: there is no such method.
    """

    method: str = "cosine"
    slack: float = 0.0

    def __post_init__(self) -> None:
        check_method("schedule.method", self.method)

    def share(self, done: Any, total: Any, count: Any, xp: Any = np) -> Any:
        """The share that is hidden after ``done`` of ``total`` iterations, of ``count`` codes.

        ``xp`` is numpy, or jax.numpy for traced numbers: this file knows no JAX.
        """
        ratio = done / total
        bits = xp.log2(xp.maximum(count, 2))  # of one code nothing is left to decide
        if self.method == "uniform":
            share = 1 - ratio
        elif self.method == "cosine":
            # numpy's cosine, and in this order, as in MAR's code: the floor depends on rounding.
            share = xp.cos(np.pi / 2.0 * done / total)
        elif self.method == "arccos":
            share = xp.arccos(ratio) / (np.pi / 2)
        elif self.method == "log":
            share = -xp.log2(ratio) / bits
        elif self.method == "exp":
            share = 1 - 2.0 ** (-bits * (1 - ratio))
        else:
            share = 1 - ratio ** float(self.method.removeprefix("pow"))
        return xp.clip(share, 1e-6, 1.0)

    def floors(self, count: int | np.ndarray, iterations: int) -> np.ndarray:
        """floor(count share) after every iteration, int [..., S], of counts int [...]."""
        counts = np.asarray(count)[..., None]
        share = self.share(np.arange(1, iterations + 1), iterations, counts)
        return np.floor(counts * share + self.slack).astype(np.int32)

    def lengths(self, count: int | np.ndarray, iterations: int, start: int = 0) -> np.ndarray:
        """Codes that are hidden after the iterations from ``start`` on, int32 [..., S - start].

        Each iteration finds at least one, as long as more than one are left. After the last one,
        too, a code counts as hidden, as in the official code.
        """
        floors = self.floors(count, iterations)
        left, lengths = np.asarray(count), []
        for i in range(start, iterations):
            left = np.maximum(1, np.minimum(left - 1, floors[..., i]))
            lengths.append(left)
        return np.stack(lengths, axis=-1).astype(np.int32)


def check_method(field: str, method: str) -> None:
    """Raises ValueError that names ``field`` unless there is such a `MaskRule.method`."""
    plain = ("uniform", "cosine", "arccos", "log", "exp")
    power = re.fullmatch(r"pow(\d+\.?\d*|\.\d+)", method)
    if method not in plain and not (power and float(power[1]) > 0):
        raise ValueError(
            f"{field} is {method!r}; it must be one of {plain} or 'powX' with a positive number X, "
            "as 'pow2.5'"
        )
