"""What tokenizers of every kind can minimise of their reconstructions besides l1 and l2."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from ar_jax.api import Array, Params, weighted_mean
from ar_jax.objectives.perceptual import PERCEPTUAL, check_perceptual, perceptual_distance
from ar_jax.objectives.ranges import check_epsilon, check_weight


def check_image_terms(objective: Any) -> None:
    """Checks the fields that `image_terms` reads; raises ValueError that names one."""
    for term in ("charbonnier", "perceptual"):
        check_weight(term, getattr(objective, term))
    check_epsilon("charbonnier_epsilon", objective.charbonnier_epsilon)
    check_perceptual(objective)


def image_terms(
    objective: Any, frozen: Params, images: Array, reconstruction: Array, mask: Array | None
) -> tuple[Array, dict[str, Array]]:
    """(their weighted sum, name -> mean of each) of the terms whose weight is not 0.

    Args:
        objective: with the fields of `ar_jax.objectives.tokenizer.TokenizerObjective`.
        frozen: see `ar_jax.objectives.perceptual.frozen_shapes`.
        images, reconstruction: float32 [B, H, W, C] in [-1, 1], the reconstruction beyond it too.
        mask: float32 [B], 0 for padding rows.
    """
    metrics = {}
    if objective.charbonnier:
        error = charbonnier(reconstruction - images, objective.charbonnier_epsilon)
        metrics["charbonnier"] = weighted_mean(error, mask)
    network = objective.perceptual_network
    if objective.perceptual:
        distance = perceptual_distance(frozen, images, reconstruction, network=network)
        metrics[PERCEPTUAL] = weighted_mean(distance, mask)
    terms = [getattr(objective, name) * value for name, value in metrics.items()]
    return sum(terms, jnp.zeros(())), metrics


def charbonnier(error: Array, epsilon: float) -> Array:
    """sqrt(error^2 + epsilon^2): the absolute error far from zero, a parabola near it."""
    return jnp.sqrt(jnp.square(error) + epsilon**2)
