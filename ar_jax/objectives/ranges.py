"""Ranges of an objective's fields."""

from __future__ import annotations

import math


def check_share(field: str, value: float) -> None:
    """Raises ValueError that names ``config.objective``'s field unless 0 <= value <= 1."""
    if not 0 <= value <= 1:
        raise ValueError(f"objective.{field} is {value}; it must lie in [0, 1]")


def check_decay(field: str, value: float) -> None:
    """Raises ValueError unless 0 <= value < 1: at 1 nothing would ever change."""
    if not 0 <= value < 1:
        raise ValueError(f"objective.{field} is {value}; it must lie in [0, 1)")


def check_weight(field: str, value: float) -> None:
    """Raises ValueError unless the weight of a term is finite and not negative."""
    if not 0 <= value < math.inf:
        raise ValueError(f"objective.{field} is {value}; it must be >= 0")


def check_epsilon(field: str, value: float) -> None:
    """Raises ValueError unless the value is finite and positive."""
    if not 0 < value < math.inf:
        raise ValueError(f"objective.{field} is {value}; it must be positive")
