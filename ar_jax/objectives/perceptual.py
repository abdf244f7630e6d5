"""The perceptual term of tokenizers: how far reconstructions are in the features of a network.

Its networks are not trained here: their parameters travel in ``frozen['perceptual']``.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Params
from ar_jax.nn.classifier import ConvClassifier, stage_features
from ar_jax.nn.lpips import NETWORKS, check_images, layer_distances, lpips, param_shapes

PERCEPTUAL = "perceptual"  # its name in ``frozen``, and of the metric
# The shipped classifier of Fashion-MNIST, and the images that it knows.
CLASSIFIER, CLASSIFIER_IMAGES = "classifier", (28, 28, 1)
OFFICIAL = {
    "vgg": ("vgg16-397923af.pth", "vgg.pth"),
    "alexnet": ("alexnet-owt-7be5be79.pth", "alex.pth"),
}


def check_perceptual(objective: Any) -> None:
    """Checks the fields 'perceptual', 'perceptual_network' and 'perceptual_weights'.

    Raises:
        ValueError: names the field; where weights are missing, says how to get them.
    """
    network = objective.perceptual_network
    if network not in (*NETWORKS, CLASSIFIER):
        known = ", ".join((*NETWORKS, CLASSIFIER))
        raise ValueError(f"objective.perceptual_network is {network!r}; it must be one of {known}")
    if not objective.perceptual:
        return
    shape = tuple(objective.tokenizer.image_shape)
    if network == CLASSIFIER:
        if shape != CLASSIFIER_IMAGES:
            raise ValueError(
                f"objective.perceptual_network is {network!r}, which knows images "
                f"{CLASSIFIER_IMAGES}, but config.tokenizer is for {shape}: take 'vgg'"
            )
        return
    try:
        check_images(shape, network=network)
    except ValueError as error:
        raise ValueError(f"objective.perceptual_network is {network!r}: {error}") from error
    if not objective.perceptual_weights:
        raise ValueError(f"objective.perceptual_weights is empty. {how_to_get(objective)}")


def how_to_get(objective: Any) -> str:
    """Where the weights of the objective's network come from, and how to do without."""
    term = f"objective.perceptual={objective.perceptual:g}"
    network = objective.perceptual_network
    without = "or set --config.objective.perceptual=0 to train without it"
    if network == CLASSIFIER:
        return (
            f"{term} needs a classifier of experiments/train_classifier.py; leave it empty for "
            f"the shipped one, {without}"
        )
    backbone, linear = OFFICIAL[network]
    return (
        f"{term} needs the trained weights of LPIPS, which are not part of this project: get "
        f"{backbone}, torchvision's ImageNet weights of that network, and {linear} from "
        "lpips/weights/v0.1 of https://github.com/richzhang/PerceptualSimilarity, convert them by\n"
        f"    python experiments/convert.py --family=lpips --files={backbone},{linear} "
        f"--out=lpips_{network}.npz\n"
        f"and set --config.objective.perceptual_weights=lpips_{network}.npz, {without}"
    )


def perceptual_distance(
    frozen: Params, images: Array, reconstructions: Array, *, network: str
) -> Array:
    """Distance of each reconstruction from its image, float32 [B].

    LPIPS; with 'classifier', what LPIPS is without its linear layers in the features of ours.

    Args:
        frozen: of the objective.
        images, reconstructions: float32 [B, H, W, C] in [-1, 1], reconstructions beyond it too.
        network: `perceptual_network`.
    """
    params = frozen[PERCEPTUAL]
    if network == CLASSIFIER:
        ours, theirs = (
            stage_features(ConvClassifier(), params, x) for x in (reconstructions, images)
        )
        return layer_distances(ours, theirs).sum(-1)
    return lpips(params, reconstructions, images, network=network)


def frozen_shapes(objective: Any) -> dict[str, Any]:
    """ShapeDtypeStructs of what a tokenizer's objective takes as ``frozen``; {} without a term."""
    if not objective.perceptual:
        return {}
    if objective.perceptual_network == CLASSIFIER:
        images = jax.ShapeDtypeStruct((1, *CLASSIFIER_IMAGES), jnp.uint8)
        params = jax.eval_shape(ConvClassifier().init, jax.random.key(0), images)["params"]
        return {PERCEPTUAL: params}
    return {PERCEPTUAL: param_shapes(objective.perceptual_network)}
