"""Tensors of torch as their pickles describe them: storages, and views of them.

Reading has two phases. The pickle gives a tree with `Tensor` descriptions in it (`CONSTRUCTORS`,
`storage`); then, when the file's storages are known, `resolve` puts arrays in their places.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from ar_jax.convert.inert_pickle import (
    Attributes,
    Constructor,
    Name,
    namespace,
    ordered_dict,
    refused,
)

MAX_DIMENSIONS = 32
MAX_DEPTH = 64  # of containers in containers
MAX_NODES = 1_000_000  # of the whole tree, where shared branches count as often as they occur
# A view can repeat the numbers of its storage (stride 0); up to here that is taken to be meant.
MAX_REPEATED = 1 << 20

STORAGES = {
    "torch FloatStorage": np.dtype(np.float32),
    "torch DoubleStorage": np.dtype(np.float64),
    "torch HalfStorage": np.dtype(np.float16),
    "torch BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch LongStorage": np.dtype(np.int64),
    "torch IntStorage": np.dtype(np.int32),
    "torch ShortStorage": np.dtype(np.int16),
    "torch CharStorage": np.dtype(np.int8),
    "torch ByteStorage": np.dtype(np.uint8),
    "torch BoolStorage": np.dtype(np.bool_),
    "torch ComplexFloatStorage": np.dtype(np.complex64),
    "torch ComplexDoubleStorage": np.dtype(np.complex128),
}
UNTYPED = "torch.storage UntypedStorage"
DTYPES = {
    "torch uint16": np.dtype(np.uint16),
    "torch uint32": np.dtype(np.uint32),
    "torch uint64": np.dtype(np.uint64),
    "torch float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "torch float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat array of the file.

    Attributes:
        key: its name in the file.
        dtype: uint8 where only the tensors say.
        numel: how many numbers it holds.
    """

    key: str
    dtype: np.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A strided view of a storage; offset and strides count numbers of ``dtype``."""

    storage: Storage
    dtype: np.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def storage(identifier: Any, fields: int) -> Storage:
    """The storage of a persistent identifier ('storage', type, key, location, numel, ...).

    Args:
        fields: of the identifier: 5 in the zip format, 6 in the legacy one.

    Raises:
        ValueError: it is something else.
    """
    if not isinstance(identifier, tuple) or len(identifier) != fields:
        raise ValueError("its pickle is broken: a storage is not described as torch does it")
    word, kind, key, location, numel, *view = identifier
    if word != "storage" or not isinstance(kind, Name) or not isinstance(location, str):
        raise ValueError("its pickle is broken: a storage is not described as torch does it")
    if not isinstance(key, str) or not re.fullmatch(r"[0-9A-Za-z_]{1,64}", key):
        raise ValueError(f"the key {key!r:.200} of a storage is not a plain name")
    if kind.name not in STORAGES and kind.name != UNTYPED:
        raise ValueError(f"storage {key!r}: {kind.name.replace(' ', '.')} is no type of storage")
    if not _is_count(numel):
        raise ValueError(f"storage {key!r} has the size {numel!r:.200}")
    if any(part is not None for part in view):
        raise ValueError(f"storage {key!r} is a view of another, as torch wrote before 0.4")
    return Storage(key, STORAGES.get(kind.name, np.dtype(np.uint8)), numel)


def view(tensor: Tensor, data: np.ndarray) -> np.ndarray:
    """The array of a tensor, sharing the memory of its storage.

    Args:
        data: uint8 [n], all bytes of the storage.

    Raises:
        ValueError: the tensor does not lie in its storage.
    """
    size, itemsize = tensor.size, tensor.dtype.itemsize
    if size == 0:
        return np.empty(tensor.shape, tensor.dtype)
    numel = data.size // itemsize
    last = tensor.offset + sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.strides, strict=True)
    )
    what = f"a tensor {tensor.shape} with strides {tensor.strides}"
    if last >= numel:
        raise ValueError(
            f"{what} reaches number {last} of storage {tensor.storage.key!r}, which holds {numel}"
        )
    if size > max(numel, MAX_REPEATED):
        raise ValueError(
            f"{what} repeats the {numel} numbers of storage {tensor.storage.key!r} into {size}"
        )
    strides = tuple(s * itemsize for s in tensor.strides)
    # buffer= keeps the bounds checked by numpy as well, and allows any alignment.
    return np.ndarray(tensor.shape, tensor.dtype, data, tensor.offset * itemsize, strides)


def resolve(tree: Any, array: Callable[[Tensor], np.ndarray]) -> Any:
    """A copy of ``tree`` with ``array(tensor)`` in the place of every tensor, dicts of namespaces.

    Raises:
        ValueError: the tree is too deep or too large, contains itself, or holds something that is
            neither a tensor nor plain, or a namespace of anything but plain values.
    """
    nodes = 0

    def copy(node: Any, depth: int, owner: str = "") -> Any:
        """``owner``: the kind of object whose attributes hold the node."""
        nonlocal nodes
        nodes += 1
        if depth > MAX_DEPTH:
            raise ValueError(
                f"its containers are nested more than {MAX_DEPTH} deep, or in a circle"
            )
        if nodes > MAX_NODES:
            raise ValueError(f"it describes more than {MAX_NODES:,} objects")
        if owner and isinstance(node, Tensor | Attributes):
            what = "a tensor" if isinstance(node, Tensor) else "another"
            raise ValueError(f"an {owner} in it holds {what}: only plain values are read there")
        if isinstance(node, Tensor):
            return array(node)
        if isinstance(node, Attributes):
            return {key: copy(v, depth + 1, node.kind) for key, v in (node.held or {}).items()}
        if isinstance(node, dict):
            return {key: copy(value, depth + 1, owner) for key, value in node.items()}
        if isinstance(node, list):
            return [copy(value, depth + 1, owner) for value in node]
        if isinstance(node, tuple):
            return tuple([copy(value, depth + 1, owner) for value in node])
        if node is None or isinstance(node, bool | int | float | str):
            return node
        if isinstance(node, Name):
            raise refused(node.name.replace(" ", "."))
        raise ValueError("it holds a storage that is no tensor")

    return copy(tree, 0)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 62


def _tensor(arguments: tuple[Any, ...], dtype: np.dtype | None = None) -> Tensor:
    place, offset, shape, strides = arguments[:4]
    if not isinstance(place, Storage):
        raise ValueError("its pickle is broken: a tensor without a storage")
    what = f"a tensor of storage {place.key!r}"
    for name, numbers in (("shape", shape), ("strides", strides)):
        if not isinstance(numbers, tuple) or not all(map(_is_count, numbers)):
            raise ValueError(f"{what} has the {name} {numbers!r:.200}: not all are sizes")
    if not _is_count(offset):
        raise ValueError(f"{what} begins at {offset!r:.200}")
    if len(shape) != len(strides) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{what} has {len(shape)} dimensions and {len(strides)} strides")
    return Tensor(place, place.dtype if dtype is None else dtype, offset, shape, strides)


def _rebuild_tensor(arguments: tuple[Any, ...]) -> Tensor:
    """`torch._utils._rebuild_tensor`: storage, offset, shape, strides."""
    if len(arguments) != 4:
        raise ValueError(f"its pickle is broken: a tensor of {len(arguments)} arguments")
    return _tensor(arguments)


def _rebuild_tensor_v2(arguments: tuple[Any, ...]) -> Tensor:
    """..., requires_grad, hooks, and where a view is negated or conjugated, a dict that says so."""
    if len(arguments) not in (6, 7):
        raise ValueError(f"its pickle is broken: a tensor of {len(arguments)} arguments")
    _check_metadata(arguments[6:])
    return _tensor(arguments)


def _rebuild_tensor_v3(arguments: tuple[Any, ...]) -> Tensor:
    """..., requires_grad, hooks, dtype, metadata: of types that have no storage of their own."""
    if len(arguments) not in (7, 8) or not isinstance(arguments[6], Name):
        raise ValueError("its pickle is broken: a tensor without a type")
    _check_metadata(arguments[7:])
    if arguments[6].name not in DTYPES:
        raise ValueError(f"tensors of the type {arguments[6].name.replace(' ', '.')} are not read")
    return _tensor(arguments, DTYPES[arguments[6].name])


def _check_metadata(metadata: tuple[Any, ...]) -> None:
    if any(metadata):
        raise ValueError("a tensor carries metadata (a conjugated or negated view): not read")


def _rebuild_parameter(arguments: tuple[Any, ...]) -> Tensor:
    """`torch.nn.Parameter`: tensor, requires_grad, hooks, and perhaps attributes."""
    if len(arguments) not in (3, 4) or not isinstance(arguments[0], Tensor):
        raise ValueError("its pickle is broken: a parameter that is no tensor")
    return arguments[0]


def _size(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(arguments) != 1 or not isinstance(arguments[0], tuple):
        raise ValueError("its pickle is broken: a torch.Size that is no tuple")
    return arguments[0]


CONSTRUCTORS: dict[str, Constructor | None] = {
    "collections OrderedDict": ordered_dict,
    "argparse Namespace": namespace,
    "torch._utils _rebuild_tensor": _rebuild_tensor,
    "torch._utils _rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils _rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils _rebuild_parameter": _rebuild_parameter,
    "torch._utils _rebuild_parameter_with_state": _rebuild_parameter,
    "torch Size": _size,
    **dict.fromkeys((*STORAGES, UNTYPED, *DTYPES)),
}
