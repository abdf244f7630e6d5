"""The safetensors format.

Eight bytes: the length n of the header, little-endian; n bytes of JSON, {key: {"dtype", "shape",
"data_offsets": [begin, end]}, "__metadata__": {...}}; then the numbers. Tensors follow each other
without gaps and without overlap, counted from the end of the header.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ar_jax.convert.atomic_file import little_endian_bytes, replacing

MAX_HEADER = 100_000_000  # the bound of the format's own library
MAX_DIMENSIONS = 32
METADATA = "__metadata__"
ALIGNMENT = 8

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Key -> read-only array, memory-mapped, in the order of the header.

    Raises:
        ValueError: the file is broken; does not name the file.
    """
    size = Path(path).stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(
                f"its header should have {length:,} bytes, but the file has {size:,}: it is "
                "truncated, or no safetensors file"
            )
        if length > MAX_HEADER:
            raise ValueError(f"its header has {length:,} bytes, more than {MAX_HEADER:,}")
        header = _header(file.read(length))
    header.pop(METADATA, None)
    # An empty file cannot be mapped, and a header is never empty.
    data = np.memmap(path, np.uint8, mode="r")[8 + length :]
    tensors = {key: _entry(key, entry) for key, entry in header.items()}
    end, before = 0, "the header"
    for key, (_, _, start, stop) in sorted(tensors.items(), key=lambda item: item[1][2:]):
        if start != end:
            what = "overlap" if start < end else f"leave {start - end:,} bytes between them"
            raise ValueError(f"{before} and tensor {key!r} {what}")
        end, before = stop, f"tensor {key!r}"
        if stop > data.size:
            raise ValueError(
                f"tensor {key!r} ends at byte {stop:,} of {data.size:,}: the file is truncated"
            )
    if end != data.size:
        raise ValueError(f"it has {data.size - end:,} bytes behind its last tensor")
    return {
        key: np.ndarray(shape, dtype, data, start) if stop > start else np.empty(shape, dtype)
        for key, (dtype, shape, start, stop) in tensors.items()
    }


def write(
    path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a file whole or not at all, one tensor after the other.

    Args:
        tensors: each is asked for twice, for its shape and for its numbers: a mapping that makes
            them when asked keeps one at a time in memory.
        metadata: text beside the tensors.

    Raises:
        ValueError: a tensor of a type that the format does not have, or a reserved key.
    """
    kinds = {}
    for key in tensors:
        array = np.asarray(tensors[key])
        dtype = array.dtype.newbyteorder("=") if array.dtype.byteorder == ">" else array.dtype
        if dtype not in NAMES or key == METADATA:
            raise ValueError(f"{path}: tensor {key!r} ({dtype}) cannot be written as safetensors")
        kinds[key] = (dtype, array.shape)
    # The widest types first, so that every tensor begins at a multiple of its width.
    order = sorted(kinds, key=lambda key: (-kinds[key][0].itemsize, key))
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    end = 0
    for key in order:
        dtype, shape = kinds[key]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[key] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for key in order:
            array = np.asarray(tensors[key])
            if array.shape != kinds[key][1]:
                raise ValueError(f"{path}: tensor {key!r} changed while it was written")
            file.write(little_endian_bytes(array))


def _header(text: bytes) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r:.200} is there twice")
        return found

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not the JSON of safetensors: {error}") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not the JSON of safetensors: no object")
    return header


def _entry(key: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
    """(dtype, shape, first byte, last byte + 1) of a tensor."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {key!r} is not described by dtype, shape and data_offsets")
    if entry["dtype"] not in list(DTYPES):
        raise ValueError(
            f"tensor {key!r} has the dtype {entry['dtype']!r:.200}: read are {', '.join(DTYPES)}"
        )
    dtype = DTYPES[entry["dtype"]]
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"tensor {key!r} has the shape {shape!r:.200}")
    if not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {key!r} has the data_offsets {offsets!r:.200}")
    begin, end = offsets
    needed = math.prod(shape) * dtype.itemsize
    if end - begin != needed:
        raise ValueError(
            f"tensor {key!r} is {entry['dtype']} {shape} of {needed:,} bytes, but its data_offsets "
            f"{offsets} hold {end - begin:,}"
        )
    return dtype, tuple(shape), begin, end


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62 for n in value
    )
