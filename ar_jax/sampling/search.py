"""Search at inference: of several draws, the one that a score likes best.

A searching sampler is called as the one that it is made of, so that whatever takes a sampler takes
it. What it draws has no longer the model's distribution: it has the score's favourites.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Cond, Samples
from ar_jax.sampling.around import AroundSampler

# (images float32 [B, H, W, C] in [-1, 1], condition of B rows) -> float [B], the larger the better.
Score = Callable[[Array, Cond], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BestOf(AroundSampler):
    """Draws whole images and keeps the best (best of N, random search).

    Attributes:
        sampler: of any kind.
        score: of finished images.
        candidates: N, draws for every image that is wanted, drawn one batch after another.

    Raises:
        ValueError: ``candidates`` below 1.
    """

    score: Score
    candidates: int

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ValueError(f"candidates is {self.candidates}; it must be at least 1")

    def __call__(self, cond: Cond, keys: Array, **settings: Any) -> Samples:
        """As the sampler is called, but for ``noise``: every candidate has keys of its own.

        The first candidate has ``keys`` themselves, so that one candidate is plain sampling and
        more are never worse.

        Raises:
            ValueError: ``noise`` is given.
        """
        if settings.get("noise") is not None:
            raise ValueError("noise leaves nothing to choose from: give keys")
        best, highest = None, jnp.zeros(())
        for number in range(self.candidates):
            drawn = self.sampler(cond, candidate_keys(keys, number), **settings)
            score = self.score(drawn.images, cond)
            if best is None:
                best, highest = drawn, score
                continue
            best = _better(score > highest, drawn, best)
            highest = jnp.maximum(score, highest)
        assert best is not None
        return best


def candidate_keys(keys: Array, number: int) -> Array:
    """Those of candidate ``number`` of every image [B]; of number 0 ``keys`` themselves."""
    if number == 0:
        return keys
    # Samplers fold in the numbers of steps: splitting gives none of these.
    return jax.vmap(lambda key: jax.random.split(key, number + 1)[number])(keys)


def _better(rows: Array, new: Samples, old: Samples) -> Samples:
    """``new`` in the rows [B] where it is better, else ``old``."""

    def choose(new: Array, old: Array) -> Array:
        return jnp.where(rows.reshape(-1, *(1,) * (new.ndim - 1)), new, old)

    return jax.tree.map(choose, new, old)
