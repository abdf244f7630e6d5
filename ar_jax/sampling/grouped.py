"""Grouped acceptance (arXiv:2508.07747): drafts judged by the codes like them. Lossy.

A draft that an exact rule keeps with min(1, p / q) is kept with min(1, p(C) / q(C)), C a group of
codes beside it. The groups of two codes overlap, so what is drawn has NOT the model's distribution.
Of the tests' toy (256 images, 40,000 draws) the total variation from the enumerated joint is 0.055
with the default group and 0.31 with groups of all codes, where exact draws give 0.024 by chance.
How far off a trained model's images are, `experiments/benchmarks/speculation.py` measures.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Params, System


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grouping:
    """Which codes are a draft's group: those that all three fields allow.

    Attributes:
        size: neighbours in the order of p, half of them on each side; 0 is the exact rule.
        difference: of probabilities, below this.
        distance: squared, of the tokenizer's code vectors, below this share of its mean over all
            pairs. (The release compares rows of the model's own embedding, below 0.5.)

    Raises:
        ValueError: a field below 0.
    """

    size: int = 14
    difference: float = 0.15
    distance: float = 0.5

    def __post_init__(self) -> None:
        for name in ("size", "difference", "distance"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"grouping.{name} is {getattr(self, name)}; it must be >= 0")


def code_distances(system: System, params: Params) -> Array:
    """Squared distances of code vectors in shares of their mean, float32 [V, V]."""
    codes = jnp.arange(system.head.vocab_size)
    vectors = system.tokenizer.apply(
        {"params": params["tokenizer"]},
        codes,
        method=lambda tokenizer, codes: tokenizer.quantizer.code_vectors(codes),
    )  # [V, C]
    squares = jnp.square(vectors).sum(-1)
    distances = jnp.maximum(squares[:, None] + squares[None] - 2 * vectors @ vectors.T, 0.0)
    return distances / jnp.maximum(distances.mean(), 1e-12)


def group_ratio(
    log_p: Array, log_q: Array, codes: Array, grouping: Grouping, distances: Array
) -> Array:
    """p(C) / q(C) [W] of drafts [W] under distributions [W, V]; see `Grouping`."""

    def one(log_p: Array, log_q: Array, code: Array) -> Array:
        rank = jnp.argsort(jnp.argsort(-log_p))
        like = jnp.abs(rank - rank[code]) <= grouping.size // 2
        like &= jnp.abs(jnp.exp(log_p) - jnp.exp(log_p[code])) < grouping.difference
        like &= distances[code] < grouping.distance
        like = like.at[code].set(True)
        # Sums of logarithms, so that a group of one gives what the exact rule does to the bit.
        mass_p, mass_q = (jax.nn.logsumexp(jnp.where(like, x, -jnp.inf)) for x in (log_p, log_q))
        return jnp.exp(mass_p - mass_q)

    return jax.vmap(one)(log_p, log_q, codes)
