"""LPIPS: torchvision's backbone and the linear layers of lpips/weights/v0.1."""

from __future__ import annotations

import re
from collections.abc import Mapping

from ar_jax.convert.part import Buffer, Part, shape_of
from ar_jax.convert.places import Places, Shape, Tensors, convolution, reshaped, same
from ar_jax.nn.lpips import NETWORKS, SCALE, SHIFT, param_shapes

# What a state_dict of the whole module holds twice, and torchvision's classifier.
LEFTOVERS = ("lins.*", "classifier.*")


def network(shapes: Mapping[str, Shape]) -> Part:
    """The part that tensors of these shapes are.

    Raises:
        ValueError: neither network's; names the tensor that says so.
    """
    first = shape_of(shapes, "features.0.weight")
    for name, (layer, *_) in NETWORKS.items():
        if first == (layer.features, 3, layer.size, layer.size):
            return network_part(name)
    raise ValueError(f"'features.0.weight' {first} is of none of {', '.join(NETWORKS)}")


def network_part(name: str) -> Part:
    """Of 'vgg' or 'alexnet'."""
    places: Places = {}
    for layer in NETWORKS[name]:
        ours = f"backbone/conv{layer.index}"
        places[f"features.{layer.index}.weight"] = convolution(f"{ours}/kernel")
        places[f"features.{layer.index}.bias"] = same(f"{ours}/bias")
    for i, width in enumerate(layer.features for layer in NETWORKS[name] if layer.tap):
        official = (1, width, 1, 1)
        places[f"lin{i}.model.1.weight"] = reshaped(f"linear/layer{i}", (width,), official)
    buffers = {
        f"scaling_layer.{key}": Buffer(shape=(1, len(value), 1, 1), made_by="the scaling layer")
        for key, value in (("shift", SHIFT), ("scale", SCALE))
    }
    return Part(section={"network": name}, places=places, buffers=buffers, leftovers=LEFTOVERS)


def expected(part: Part) -> object:
    """Shapes of our parameters."""
    return param_shapes(part.section["network"])


def unwrap(container: Tensors) -> Tensors:
    """The keys of torchvision, also of a state_dict of the module itself ('net.slice1.0.bias')."""
    return {re.sub(r"^net\.slice\d+\.", "features.", key): a for key, a in container.items()}
