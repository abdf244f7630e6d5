"""Writes the zip format of `torch.save` without torch, for code that calls `torch.load`.

The pickle is a fixed program: dicts, strings, numbers and calls of `_rebuild_tensor_v2`, which
`torch.load(..., weights_only=True)` accepts.
"""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.convert.atomic_file import little_endian_bytes, replacing
from ar_jax.convert.torch_tensors import STORAGES

ALIGNMENT = 64  # of the storages, so that torch can map them
LOCAL_HEADER, EXTRA_HEADER, ZIP64_EXTRA = 30, 4, 20
ZIP64_FROM = 1 << 30
TYPES = {dtype: name.replace(" ", "\n") for name, dtype in STORAGES.items()}

Leaf = tuple[Mapping[str, Any], str]  # a mapping and the key of an array in it
Written = dict[int, tuple[Mapping[str, Any], bytes]]  # by identity: a mapping and its program


def write(path: str | Path, container: Mapping[str, Any]) -> None:
    """Writes a file whole or not at all, one tensor after the other.

    Args:
        container: nested mappings of arrays and str, int, float, bool or None, such as a state_dict
            or {'model': state_dict}. Each array is asked for twice, for its shape and for its
            numbers: a mapping that makes them when asked keeps one at a time in memory. A mapping
            that is held twice is written once, and its tensors share their storages.

    Raises:
        ValueError: something else, or a type of array that torch's storages do not have.
    """
    leaves: list[Leaf] = []
    try:
        program = b"\x80\x02" + _dict(container, leaves, {}) + b"."
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        _member(archive, "archive/data.pkl", memoryview(program))
        _member(archive, "archive/byteorder", memoryview(b"little"))
        for index, (mapping, key) in enumerate(leaves):
            data = little_endian_bytes(np.asarray(mapping[key]))
            _member(archive, f"archive/data/{index}", data)
        _member(archive, "archive/version", memoryview(b"3\n"))


def _member(archive: zipfile.ZipFile, name: str, data: memoryview) -> None:
    info = zipfile.ZipInfo(name)
    large = data.nbytes >= ZIP64_FROM
    begin = archive.fp.tell() + LOCAL_HEADER + len(name) + EXTRA_HEADER  # type: ignore[union-attr]
    padding = -(begin + ZIP64_EXTRA * large) % ALIGNMENT
    # A field of its own kind, which readers skip.
    info.extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    with archive.open(info, "w", force_zip64=large) as member:
        member.write(data)


def _dict(mapping: Mapping[str, Any], leaves: list[Leaf], written: Written) -> bytes:
    """The program of a mapping, which is that of the same mapping before."""
    if id(mapping) in written:
        return written[id(mapping)][1]
    items = []
    for key in mapping:
        if not isinstance(key, str):
            raise ValueError(f"the key {key!r} is no string")
        items += [_string(key), _value(mapping, key, leaves, written)]
    program = b"}(" + b"".join(items) + b"u"
    written[id(mapping)] = mapping, program  # kept alive, so that its identity stays its own
    return program


def _value(mapping: Mapping[str, Any], key: str, leaves: list[Leaf], written: Written) -> bytes:
    value = mapping[key]
    if isinstance(value, Mapping):
        return _dict(value, leaves, written)
    if value is None or isinstance(value, bool):
        return {None: b"N", True: b"\x88", False: b"\x89"}[value]
    if type(value) is int:
        return _integer(value)
    if type(value) is float:  # not one of numpy
        return b"G" + struct.pack(">d", value)
    if isinstance(value, str):
        return _string(value)
    array = np.asarray(value)
    dtype = array.dtype.newbyteorder("=") if array.dtype.byteorder == ">" else array.dtype
    if dtype not in TYPES:
        raise ValueError(f"tensor {key!r} ({dtype}) cannot be written in torch's format")
    leaves.append((mapping, key))
    strides = np.empty(array.shape, "V1").strides  # of a row-major array: in numbers
    return b"".join(
        (
            b"ctorch._utils\n_rebuild_tensor_v2\n(",
            *(b"(", _string("storage"), f"c{TYPES[dtype]}\n".encode()),
            *(_string(str(len(leaves) - 1)), _string("cpu"), _integer(array.size), b"tQ"),
            *(b"K\x00", _tuple(array.shape), _tuple(strides)),
            b"\x89ccollections\nOrderedDict\n)RtR",
        )
    )


def _tuple(numbers: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, numbers)) + b"t"


def _integer(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def _string(text: str) -> bytes:
    data = text.encode()
    return b"X" + struct.pack("<I", len(data)) + data
