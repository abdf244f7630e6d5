"""Weight files in the layouts that torch and safetensors write, made without either.

The pickles are made by Python's own pickler, of stand-ins for torch's classes under torch's names,
so they have the opcodes, the memo and the argument lists of real files.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import pickle
import struct
import sys
import types
import zipfile
from collections.abc import Iterator
from typing import Any

import numpy as np

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_MACHINE = {
    "protocol_version": 1001,
    "little_endian": True,
    "type_sizes": {"short": 2, "int": 4, "long": 4},
}
STORAGE_TYPES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
UNTYPED_DTYPES = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")


def _function(module: str, name: str) -> Any:
    def function(*args):
        raise AssertionError(f"{module}.{name} was called")

    function.__module__, function.__qualname__, function.__name__ = module, name, name
    return function


def _named(module: str, name: str) -> Any:
    return type(name, (), {"__module__": module})


def _dtype(name: str) -> Any:
    """Pickled as a bare name, as torch's dtypes are."""
    made = type(name, (), {"__module__": "torch", "__reduce__": lambda self: name})()
    return made


MODULES = {
    "torch": {
        **{name: _named("torch", name) for name in (*STORAGE_TYPES.values(), "QInt8Storage")},
        **{name: _dtype(name) for name in UNTYPED_DTYPES},
        "Size": _named("torch", "Size"),
    },
    "torch._utils": {
        name: _function("torch._utils", name)
        for name in (
            *("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_tensor_v3"),
            *("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_sparse_tensor"),
        )
    },
    "torch.nn.modules.linear": {"Linear": _function("torch.nn.modules.linear", "Linear")},
    "torch.storage": {"UntypedStorage": _named("torch.storage", "UntypedStorage")},
}
UTILS = MODULES["torch._utils"]


class Storage:
    """A flat array; ``fields`` replaces parts of what the pickle says of it."""

    def __init__(self, numbers: np.ndarray, kind: Any = None, **fields: Any):
        self.numbers = np.ascontiguousarray(numbers).reshape(-1)
        self.kind = kind or MODULES["torch"][STORAGE_TYPES[self.numbers.dtype.name]]
        self.fields = fields


class Call:
    """An object that unpickling makes by ``function(*args)``."""

    def __init__(self, function: Any, *args: Any):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def tensor(numbers: Any, **fields: Any) -> Call:
    """A tensor with a storage of its own; ``fields``: storage, offset, shape, strides."""
    numbers = np.asarray(numbers)
    item = numbers.dtype.itemsize
    hooks: Any = collections.OrderedDict()
    place = fields.get("storage")
    if numbers.dtype.name in UNTYPED_DTYPES:
        place = Storage(numbers.view(np.uint8), MODULES["torch.storage"]["UntypedStorage"])
    args = (
        Storage(numbers) if place is None else place,
        fields.get("offset", 0),
        tuple(fields.get("shape", numbers.shape)),
        tuple(fields.get("strides", [s // item for s in np.empty_like(numbers).strides])),
    )
    if numbers.dtype.name in UNTYPED_DTYPES:
        dtype = MODULES["torch"][numbers.dtype.name]
        return Call(UTILS["_rebuild_tensor_v3"], *args, False, hooks, dtype)
    return Call(UTILS["_rebuild_tensor_v2"], *args, False, hooks)


@contextlib.contextmanager
def _torch_names() -> Iterator[None]:
    """The stand-ins can be imported, as the pickler demands."""
    before = {name: sys.modules.get(name) for name in MODULES}
    for name, content in MODULES.items():
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
    try:
        yield
    finally:
        for name, module in before.items():
            del sys.modules[name]
            if module is not None:
                sys.modules[name] = module


def dumps(content: Any, *, legacy: bool = False, protocol: int = 2) -> tuple[bytes, list[Storage]]:
    """The pickle of ``content``, and its storages in the order of their keys '0', '1', ..."""
    storages: list[Storage] = []

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if not isinstance(item, Storage):
                return None
            if item not in storages:
                storages.append(item)
            key = item.fields.get("key", str(storages.index(item)))
            numel = item.fields.get("numel", item.numbers.size)
            identifier = ("storage", item.kind, key, "cuda:0", numel)
            return (*identifier, item.fields.get("view")) if legacy else identifier

    stream = io.BytesIO()
    with _torch_names():
        Pickler(stream, protocol).dump(content)
    return stream.getvalue(), storages


def zip_file(
    content: Any = None,
    *,
    pickled: bytes | None = None,
    byte_order: bytes = b"little",
    method: int = zipfile.ZIP_STORED,
    protocol: int = 2,
    members: tuple[tuple[str | zipfile.ZipInfo, bytes], ...] = (),
    left_out: str | None = None,
) -> bytes:
    """A file as torch.save writes it today.

    Args:
        content: what is saved; or ``pickled``: its pickle.
        members: more of them.
        left_out: the key of a storage that shall be missing.
    """
    storages: list[Storage] = []
    if pickled is None:
        pickled, storages = dumps(content, protocol=protocol)
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        archive.writestr("weights/data.pkl", pickled)
        archive.writestr("weights/byteorder", byte_order)
        for key, storage in enumerate(storages):
            if str(key) != left_out:
                archive.writestr(f"weights/data/{key}", storage.numbers.tobytes())
        archive.writestr("weights/version", b"3\n")
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def legacy_file(
    content: Any = None,
    *,
    pickled: bytes | None = None,
    protocol: int = 2,
    machine: Any = LEGACY_MACHINE,
    keys: list[str] | None = None,
    number: int = 1001,
) -> bytes:
    """A file as torch.save wrote it before 1.6."""
    storages: list[Storage] = []
    if pickled is None:
        pickled, storages = dumps(content, legacy=True, protocol=protocol)
    order = sorted(str(key) for key in range(len(storages)))
    parts = [pickle.dumps(item, protocol) for item in (LEGACY_MAGIC, number, machine)]
    parts += [pickled, pickle.dumps(order if keys is None else keys, protocol)]
    for key in order:
        numbers = storages[int(key)].numbers
        parts += [struct.pack("<q", numbers.size), numbers.tobytes()]
    return b"".join(parts)


def header_file(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file: a header, as JSON or as it is, and the bytes of its tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data
