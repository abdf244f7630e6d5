"""Where every official tensor lives in our parameters: one table, read in both directions.

A table maps an official key to a `Place`. Functions of a place only move numbers (transpose,
reshape, slice), so official -> ours -> official gives the same bits, and the shapes of a whole
release can be worked out without its numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

Tensors = Mapping[str, np.ndarray]
Function = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]
WEIGHTS = tuple(np.dtype(kind) for kind in (np.float32, np.float16, ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an official tensor lives in our parameters.

    Attributes:
        paths: our leaves, 'backbone/stack/...'; with several, the official tensor is their
            concatenation on axis 0.
        ours, official: the change of layout (of each piece), and its inverse.
        layer: index into the stacked leaf of a scanned stack, None for leaves of their own.
        sizes: rows of the official tensor that each path takes; None: equal parts.
    """

    paths: tuple[str, ...]
    ours: Function
    official: Function
    layer: int | None = None
    sizes: tuple[int, ...] | None = None


Places = dict[str, Place]


def same(path: str, layer: int | None = None) -> Place:
    """The same layout."""
    return Place((path,), lambda a: a, lambda a: a, layer)


def reshaped(path: str, ours: Shape, official: Shape, layer: int | None = None) -> Place:
    """The same order of numbers in another shape."""
    return Place((path,), lambda a: a.reshape(ours), lambda a: a.reshape(official), layer)


def dense(
    path: str, shape: Shape | None = None, inputs: int = 1, layer: int | None = None
) -> Place:
    """A linear weight [out, in] -> our kernel of ``shape``, whose first ``inputs`` axes are in."""

    def ours(a: np.ndarray) -> np.ndarray:
        return a.T.reshape(a.T.shape if shape is None else shape)

    def official(a: np.ndarray) -> np.ndarray:
        return a.reshape(int(np.prod(a.shape[:inputs])), -1).T

    return Place((path,), ours, official, layer)


def fused(
    path: str,
    shape: Shape,
    layer: int | None = None,
    *,
    names: tuple[str, ...] = ("query", "key", "value"),
    sizes: tuple[int, ...] | None = None,
) -> Place:
    """A weight [sum of sizes, in] of several linear layers -> our kernels PATH/NAME/kernel.

    Args:
        shape: of each kernel, [in, H, K]; -1 where the pieces differ.
        sizes: outputs of each layer; None: equal.
    """
    kernel = dense("", shape, 1)
    paths = tuple(f"{path}/{name}/kernel" for name in names)
    return Place(paths, kernel.ours, kernel.official, layer, sizes)


def fused_bias(
    path: str,
    shape: Shape,
    layer: int | None = None,
    *,
    names: tuple[str, ...] = ("query", "key", "value"),
    sizes: tuple[int, ...] | None = None,
) -> Place:
    """The bias [sum of sizes] that goes with `fused` -> our biases PATH/NAME/bias of ``shape``."""
    paths = tuple(f"{path}/{name}/bias" for name in names)
    return Place(paths, lambda a: a.reshape(shape), lambda a: a.reshape(-1), layer, sizes)


def convolution(*paths: str) -> Place:
    """A convolution's weight, OIHW -> HWIO; several leaves share the outputs equally."""
    return Place(paths, lambda a: a.transpose(2, 3, 1, 0), lambda a: a.transpose(3, 2, 0, 1))


def split(*paths: str) -> Place:
    """One official vector in several of our leaves."""
    return Place(paths, lambda a: a, lambda a: a)


def to_ours(places: Places, tensors: Tensors, expected: Any) -> dict[str, Any]:
    """Our parameters of official tensors, as nested dicts of fresh float32 arrays.

    Tensors are read one at a time and stacked layers filled in place, so that beside the result
    there is never more than one tensor in memory. Halves are widened, which keeps their values.

    Args:
        places: a place for every official tensor.
        tensors: exactly those; float32, or float16 or bfloat16.
        expected: pytree of things with a shape, the parameters to fill; see `check_cover`.

    Raises:
        ValueError: names the official key and our path (with both shapes) where a key is missing,
            unknown, of another shape or no float of 32 or 16 bits.
    """
    wanted = official_shapes(places, expected)
    for key in tensors:
        if key not in places:
            raise ValueError(f"tensor {key!r} {tuple(tensors[key].shape)} has no place in ours")
    for key, place in places.items():
        if key not in tensors:
            raise ValueError(f"tensor {key!r} is missing; our {_where(place)} needs it")
    leaves = {
        path: np.empty(leaf.shape, np.float32) for path, leaf in flat_leaves(expected).items()
    }
    for key, place in places.items():
        tensor = tensors[key]
        if tuple(tensor.shape) != wanted[key]:
            raise ValueError(
                f"tensor {key!r} has the shape {tuple(tensor.shape)}, but our {_where(place)} "
                f"({', '.join(str(leaves[path].shape) for path in place.paths)}) needs "
                f"{wanted[key]}"
            )
        if tensor.dtype not in WEIGHTS:
            raise ValueError(
                f"tensor {key!r} is {tensor.dtype}, but our {_where(place)} takes floats of "
                f"32 or 16 bits: {', '.join(map(str, WEIGHTS))}"
            )
        for path, piece in zip(place.paths, _pieces(place, np.asarray(tensor)), strict=True):
            leaf = leaves[path] if place.layer is None else leaves[path][place.layer]
            leaf[...] = place.ours(piece)
    return nest(leaves)


def to_official(places: Places, params: Any) -> dict[str, np.ndarray]:
    """All official tensors of ``params`` (or of gradients alike), in the order of ``places``."""
    check_cover(places, params)
    return {key: official_tensor(places, params, key) for key in places}


def official_tensor(places: Places, params: Any, key: str) -> np.ndarray:
    """The part of ``params`` (or of gradients alike) that is the official tensor ``key``."""
    place, pieces = places[key], []
    for path in place.paths:
        leaf: Any = params
        for name in path.split("/"):
            leaf = leaf[name]
        leaf = np.asarray(leaf if place.layer is None else leaf[place.layer])
        pieces.append(place.official(leaf))
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def official_shapes(places: Places, expected: Any) -> dict[str, Shape]:
    """Shape of every official tensor that parameters of the shapes ``expected`` have.

    Raises:
        ValueError: see `check_cover`.
    """
    check_cover(places, expected)
    # Arrays of a type without bytes go through the same functions as the numbers, at no cost.
    hollow = {path: np.empty(leaf.shape, "V0") for path, leaf in flat_leaves(expected).items()}
    tree = nest(hollow)
    shapes = {}
    for key, place in places.items():
        try:
            shapes[key] = official_tensor(places, tree, key).shape
        except (ValueError, IndexError) as error:
            found = ", ".join(str(hollow[path].shape) for path in place.paths)
            raise ValueError(
                f"our {_where(place)} ({found}) cannot be the official {key!r}: {error}"
            ) from error
    return shapes


def check_cover(places: Places, expected: Any) -> None:
    """Checks that the places fill every parameter of the tree ``expected`` exactly once.

    Raises:
        ValueError: names a parameter (or layer of one) that no tensor fills or that two fill, or a
            place in no parameter, with the official keys.
    """
    leaves = flat_leaves(expected)
    filled: dict[tuple[str, int | None], str] = {}
    layers: dict[str, set[int]] = {}
    for key, place in places.items():
        for path in place.paths:
            if path not in leaves:
                raise ValueError(f"tensor {key!r} belongs in {path!r}, which ours has not")
            spot = (path, place.layer)
            if spot in filled:
                raise ValueError(f"tensors {filled[spot]!r} and {key!r} both fill our {path!r}")
            filled[spot] = key
            if place.layer is not None:
                layers.setdefault(path, set()).add(place.layer)
    for path, leaf in leaves.items():
        if (path, None) in filled:
            if path in layers:
                raise ValueError(f"tensor {filled[path, None]!r} and layers fill our {path!r}")
        elif layers.get(path, set()) != set(range(leaf.shape[0] if path in layers else 1)):
            held = f"{leaf.shape[0]} layers" if path in layers else "the parameter"
            raise ValueError(
                f"our {path!r} {tuple(leaf.shape)} is not filled: of {held}, tensors fill "
                f"{sorted(layers.get(path, ()))}"
            )


def flat_leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """'a/b/c' -> leaf of nested dicts."""
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        flat |= flat_leaves(branch, f"{prefix}/{name}" if prefix else name)
    return flat


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Undoes `flat_leaves`."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[name] = leaf
    return tree


def _pieces(place: Place, tensor: np.ndarray) -> list[np.ndarray]:
    if place.sizes is None:
        return np.split(tensor, len(place.paths))
    return np.split(tensor, np.cumsum(place.sizes)[:-1].tolist())


def _where(place: Place) -> str:
    layer = "" if place.layer is None else f" of layer {place.layer}"
    return " and ".join(repr(path) for path in place.paths) + layer
