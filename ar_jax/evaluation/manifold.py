"""Improved precision and recall of features, as the ADM evaluator computes them.

A set's manifold is the union of balls around its members, each as wide as the distance to the third
nearest other one. Precision is the share of samples inside the reference's manifold, recall the
share of reference images inside the samples'. Distances are squared and never kept: a block of rows
against a block of columns is all that memory holds beside the features.

ADM computes distances in float16, and a block with an overflow in float32. Ours are float32;
`half_distances` is its way, which moves both numbers by the rounding of near ties.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NEIGHBOURS = 3
# Of a block: 80 MB of distances. ADM's are 10,000 x 10,000, which matters to its float16 alone.
ROWS = 2_000
COLUMNS = 10_000

# features [n, F], [m, F] -> squared distances [n, m]
Distances = Callable[[jax.Array, jax.Array], jax.Array]


class PrecisionRecall(NamedTuple):
    """See the module."""

    precision: float
    recall: float


def precision_recall(
    reference: np.ndarray,
    samples: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    distances: Distances | None = None,
    block: tuple[int, int] = (ROWS, COLUMNS),
) -> PrecisionRecall:
    """Precision and recall of sample features [N, F] against reference features [M, F].

    Args:
        neighbours: the ball around a member reaches its neighbour of this number.
        distances: of a block; None: `squared_distances`.
        block: rows and columns of a block.

    Raises:
        ValueError: features that are not finite, of other widths, or too few for the neighbours.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"features {reference.shape} and {samples.shape}: expected [N, F] of one F"
        )
    options: Any = {"distances": distances, "block": block}
    own = manifold_radii(reference, neighbours, name="reference features", **options)
    theirs = manifold_radii(samples, neighbours, name="sample features", **options)
    return PrecisionRecall(
        precision=float(inside(samples, reference, own, **options).mean()),
        recall=float(inside(reference, samples, theirs, **options).mean()),
    )


def manifold_radii(
    features: np.ndarray,
    neighbours: int = NEIGHBOURS,
    *,
    name: str = "features",
    distances: Distances | None = None,
    block: tuple[int, int] = (ROWS, COLUMNS),
) -> np.ndarray:
    """Squared distance of each of the features [N, F] to its third nearest other one, [N].

    The row itself is the nearest of its own set; it is neither left out nor set to 0, as in ADM.

    Raises:
        ValueError: not finite, or not more of them than ``neighbours``.
    """
    if not np.isfinite(features).all():
        raise ValueError(f"{name}: NaN or infinity; no distance to them means anything")
    if len(features) <= neighbours:
        raise ValueError(f"{name}: {len(features)} of them have no neighbour number {neighbours}")
    found = []
    for rows in _blocks(features, block[0]):
        nearest = jnp.zeros((len(rows), 0))
        for columns in _blocks(features, block[1]):
            nearest = _nearest(nearest, (distances or squared_distances)(rows, columns), neighbours)
        found.append(np.asarray(nearest[:, neighbours], np.float32))
    return np.concatenate(found)


def inside(
    points: np.ndarray,
    members: np.ndarray,
    radii: np.ndarray,
    *,
    distances: Distances | None = None,
    block: tuple[int, int] = (ROWS, COLUMNS),
) -> np.ndarray:
    """Whether each point [N, F] lies in a closed ball around one of the members [M, F]."""
    found = []
    for rows in _blocks(points, block[0]):
        hit = jnp.zeros(len(rows), bool)
        places = zip(_blocks(members, block[1]), _blocks(radii, block[1]), strict=True)
        for columns, reach in places:
            hit = _hit(hit, (distances or squared_distances)(rows, columns), reach)
        found.append(np.asarray(hit))
    return np.concatenate(found)


@jax.jit
def squared_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """|u|^2 - 2 u.v + |v|^2 of every pair, never negative; float32 [n, m]."""
    rows, columns = rows.astype(jnp.float32), columns.astype(jnp.float32)
    product = jnp.matmul(rows, columns.T, precision=jax.lax.Precision.HIGHEST)
    lengths = jnp.square(rows).sum(1)[:, None], jnp.square(columns).sum(1)[None]
    return jnp.maximum(lengths[0] - 2 * product + lengths[1], 0)


def half_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """The same with every intermediate rounded to float16, or in float32 if one overflows.

    Not compiled as a whole, which would leave roundings out. Sums and products are accumulated in
    float32.
    """
    whole = rough_distances(rows, columns)
    return whole if bool(jnp.isfinite(whole).all()) else squared_distances(rows, columns)


def rough_distances(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`half_distances` without the fallback: float16 values, infinities and all, as float32."""
    half = jnp.float16
    rows, columns = rows.astype(half), columns.astype(half)
    product = jnp.matmul(rows, columns.T, preferred_element_type=jnp.float32).astype(half)
    lengths = [jnp.square(x).astype(jnp.float32).sum(1).astype(half) for x in (rows, columns)]
    first = (lengths[0][:, None] - (half(2) * product)).astype(half)
    return jnp.maximum((first + lengths[1][None]).astype(half), half(0)).astype(jnp.float32)


def _blocks(array: np.ndarray, size: int) -> Iterator[jax.Array]:
    for start in range(0, len(array), size):
        yield jnp.asarray(array[start : start + size])


@functools.partial(jax.jit, static_argnums=2)
def _nearest(nearest: jax.Array, distances: jax.Array, neighbours: int) -> jax.Array:
    """The smallest of [n, k] and [n, m] together, ascending, at most neighbours + 1 of them."""
    together = jnp.concatenate([nearest, distances], axis=1)
    return -jax.lax.top_k(-together, min(neighbours + 1, together.shape[1]))[0]


@jax.jit
def _hit(hit: jax.Array, distances: jax.Array, radii: jax.Array) -> jax.Array:
    return hit | (distances <= radii[None]).any(axis=1)
