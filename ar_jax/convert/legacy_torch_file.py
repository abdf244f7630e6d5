"""The format of `torch.save` before 1.6, read without torch.

Five pickles one after the other: a magic number, a protocol number, facts about the machine, the
object, and the list of its storages' keys; then, for each key, the number of numbers as int64 and
their bytes. Storages are memory-mapped.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.convert import inert_pickle, torch_tensors
from ar_jax.convert.torch_tensors import Storage, Tensor

MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read(path: str | Path) -> Any:
    """The content of a file: nested plain containers with read-only arrays.

    Raises:
        ValueError: the file is broken or holds something else; does not name the file.
    """
    with open(path, "rb") as file:
        stream = io.BytesIO(file.read(inert_pickle.MAX_BYTES))
    if inert_pickle.load(stream, torch_tensors.CONSTRUCTORS) != MAGIC_NUMBER:
        raise ValueError("it is a pickle that torch.save did not write")
    protocol = inert_pickle.load(stream, {})
    if protocol != PROTOCOL:
        raise ValueError(f"its protocol is {protocol!r:.200}: only {PROTOCOL} is known")
    machine = inert_pickle.load(stream, {})
    if not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise ValueError("its byte order is not little: only 'little' is read")
    storages: dict[str, Storage] = {}

    def persistent(identifier: Any) -> Storage:
        storage = torch_tensors.storage(identifier, 6)
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"its pickle describes storage {storage.key!r} in two ways")
        return storage

    tree = inert_pickle.load(stream, torch_tensors.CONSTRUCTORS, persistent)
    keys = inert_pickle.load(stream, {})
    data = _storages(path, keys, storages, stream.tell())

    def array(tensor: Tensor) -> np.ndarray:
        return torch_tensors.view(tensor, data[tensor.storage.key])

    return torch_tensors.resolve(tree, array)


def _storages(
    path: str | Path, keys: Any, storages: dict[str, Storage], position: int
) -> dict[str, np.ndarray]:
    """Key -> uint8 [n], the bytes that follow ``position``."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("its list of storages is broken")
    if len(set(keys)) < len(keys):
        raise ValueError("its list of storages names one twice")
    if missing := sorted(storages.keys() - set(keys)):
        raise ValueError(f"its pickle refers to storage {missing[0]!r}, which is missing")
    if unknown := sorted(set(keys) - storages.keys()):
        raise ValueError(f"its storage {unknown[0]!r} belongs to no tensor")
    content = np.memmap(path, np.uint8, mode="r")
    data = {}
    for key in keys:
        storage = storages[key]
        begin = position + 8
        position = begin + storage.nbytes
        if position > content.size:
            raise ValueError(
                f"it is truncated: storage {key!r} ends at byte {position:,} of {content.size:,}"
            )
        numel = int.from_bytes(content[begin - 8 : begin].tobytes(), "little", signed=True)
        if numel != storage.numel:
            raise ValueError(
                f"storage {key!r} has {numel:,} numbers, but its pickle says {storage.numel:,}"
            )
        data[key] = content[begin:position]
    if position != content.size:
        raise ValueError(f"it has {content.size - position:,} bytes behind its last storage")
    return data
