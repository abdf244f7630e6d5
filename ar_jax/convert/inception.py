"""FID's Inception-v3: the published PyTorch copy (pt_inception-2015-12-05-6726825d.pth)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ar_jax.convert.part import Buffer, Part
from ar_jax.convert.places import Places, Shape, Tensors, convolution, dense, flat_leaves, same
from ar_jax.nn.inception import param_shapes

# Ours -> theirs, of a unit.
NAMES = {
    "kernel": "conv.weight",
    "scale": "bn.weight",
    "bias": "bn.bias",
    "mean": "bn.running_mean",
    "var": "bn.running_var",
}
COUNTER = "bn.num_batches_tracked"


def network(shapes: Mapping[str, Shape]) -> Part:
    """The part; there is one size."""
    places: Places = {}
    buffers = {}
    for path in flat_leaves(param_shapes()):
        if path.startswith("fc_"):
            continue
        unit, _, leaf = path.rpartition("/")
        key = unit.replace("/", ".")
        place = convolution if leaf == "kernel" else same
        places[f"{key}.{NAMES[leaf]}"] = place(path)
        buffers[f"{key}.{COUNTER}"] = Buffer(shape=(), made_by="torch")
    places["fc.weight"] = dense("fc_kernel")
    places["fc.bias"] = same("fc_bias")
    return Part(section={}, places=places, buffers=buffers)


def expected(part: Part) -> Any:
    """Shapes of our parameters."""
    return param_shapes()


def unwrap(container: Tensors) -> Tensors:
    """The file is the state_dict."""
    return container
