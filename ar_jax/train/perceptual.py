"""The frozen network of a tokenizer's perceptual term, from its file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ar_jax.api import Params
from ar_jax.io.checkpoint import PARAMS, load_tree
from ar_jax.io.network_file import check_network, read_network
from ar_jax.objectives.perceptual import CLASSIFIER, PERCEPTUAL, frozen_shapes, how_to_get

WEIGHTS = Path(__file__).parent.parent / "evaluation" / "weights"
SHIPPED = WEIGHTS / "fashion_mnist_classifier.npz"


def load_perceptual(objective: Any, workdir: str | Path) -> Params:
    """``{'perceptual': parameters}``: the workdir's once it keeps some; {} without the term.

    Raises:
        ValueError: there is no file ``config.objective.perceptual_weights``, or it is of another
            network; says where the weights come from.
    """
    source, shapes = objective.perceptual_weights, frozen_shapes(objective)
    if not shapes:
        return {}
    kept = Path(workdir) / PERCEPTUAL / PARAMS
    if kept.exists():
        return {PERCEPTUAL: load_tree(kept)}
    network = objective.perceptual_network
    if network == CLASSIFIER:
        source = source or SHIPPED
    try:
        about, params = read_network(source)
        if network != CLASSIFIER and about.get("network") != network:
            raise ValueError(f"{source} is of the network {about.get('network')!r}, not {network}")
        check_network(source, params, shapes[PERCEPTUAL])
    except ValueError as error:
        raise ValueError(
            f"config.objective.perceptual_weights: {error}. {how_to_get(objective)}"
        ) from error
    return {PERCEPTUAL: params}
