"""The zip format of `torch.save` (since 1.6), read without torch.

    NAME/data.pkl      the pickle; its storages are named by keys
    NAME/byteorder     'little' or 'big'; may be missing
    NAME/data/KEY      the bytes of a storage, not compressed

Nothing is unpacked to disk. Storages are memory-mapped; one that somebody's zip program compressed
is unpacked into memory. Checksums of storages are not compared: that would read all of a file of
which often only a part is wanted.
"""

from __future__ import annotations

import io
import re
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.convert import inert_pickle, torch_tensors
from ar_jax.convert.torch_tensors import Storage, Tensor

MAGIC = b"PK\x03\x04"
LOCAL_HEADER = struct.Struct("<4s5H3L2H")
ENCRYPTED, UTF8 = 0x1, 0x800
# Compressed storages together may be this many times the file: floats shrink by a fifth at best,
# zeros by a factor of 1,000.
MAX_RATIO, ALWAYS_ALLOWED = 20, 16 << 20
# RuntimeError: what zipfile raises for features that it does not know.
BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, struct.error, OverflowError)


def read(path: str | Path) -> Any:
    """The content of a file: nested plain containers with read-only arrays.

    Raises:
        ValueError: the file is broken or holds something else; does not name the file.
    """
    archive = _Archive(path)
    storages: dict[Storage, np.ndarray] = {}

    def array(tensor: Tensor) -> np.ndarray:
        if tensor.storage not in storages:
            storages[tensor.storage] = archive.storage(tensor.storage)
        return torch_tensors.view(tensor, storages[tensor.storage])

    if (order := archive.byte_order()) != "little":
        raise ValueError(f"its byte order is {order!r}: only 'little' is read")
    tree = inert_pickle.load(
        io.BytesIO(archive.pickle()),
        torch_tensors.CONSTRUCTORS,
        lambda identifier: torch_tensors.storage(identifier, 5),
    )
    return torch_tensors.resolve(tree, array)


class _Archive:
    """The members of a zip file, checked against each other and the file."""

    def __init__(self, path: str | Path):
        self.path = path
        try:
            with zipfile.ZipFile(path) as file:
                members, directory = file.infolist(), file.start_dir
        except (*BROKEN, OSError, ValueError) as error:
            raise ValueError(f"its zip directory is broken or truncated: {error}") from error
        self.bytes = np.memmap(path, np.uint8, mode="r")
        self.members = _by_name(members)
        self.starts = self._find(members, directory)
        pickles = [name for name in self.members if re.fullmatch(r"[^/]+/data\.pkl", name)]
        if len(pickles) != 1:
            raise ValueError(
                f"it is a zip file with {len(pickles)} members NAME/data.pkl: not one that "
                "torch.save wrote"
            )
        self.prefix = pickles[0].removesuffix("data.pkl")
        if any(name.startswith(f"{self.prefix}code/") for name in self.members):
            raise ValueError("it is a TorchScript program, not weights: save its state_dict alone")
        unpacked = sum(m.file_size for m in members if m.compress_type != zipfile.ZIP_STORED)
        if unpacked > max(MAX_RATIO * self.bytes.size, ALWAYS_ALLOWED):
            raise ValueError(
                f"its compressed members unpack to {unpacked:,} bytes, more than {MAX_RATIO} "
                f"times the file's {self.bytes.size:,}"
            )

    def pickle(self) -> bytes:
        name = f"{self.prefix}data.pkl"
        member = self.members[name]
        if member.file_size > inert_pickle.MAX_BYTES:
            raise ValueError(
                f"{name} has {member.file_size:,} bytes, more than {inert_pickle.MAX_BYTES:,}"
            )
        data = self._data(name).tobytes()
        # torch can be told to write no checksums: they are 0 then.
        if member.CRC not in (0, zlib.crc32(data)):
            raise ValueError(f"the checksum of {name} is wrong: the file is damaged")
        return data

    def byte_order(self) -> str:
        name = f"{self.prefix}byteorder"
        if name not in self.members:
            return "little"
        return self._data(name)[:20].tobytes().decode("ascii", "replace")

    def storage(self, storage: Storage) -> np.ndarray:
        """uint8 [n]."""
        name = f"{self.prefix}data/{storage.key}"
        if name not in self.members:
            raise ValueError(f"its pickle refers to {name}, which is missing")
        size = self.members[name].file_size
        if size != storage.nbytes:
            raise ValueError(
                f"{name} has {size:,} bytes, but its pickle says {storage.numel:,} numbers "
                f"({storage.dtype}): {storage.nbytes:,} bytes"
            )
        return self._data(name)

    def _find(self, members: list[zipfile.ZipInfo], directory: int) -> dict[str, int]:
        """Where the data of every member begins; none may overlap another or the directory."""
        starts, end, before = {}, 0, ""
        for member in sorted(members, key=lambda m: m.header_offset):
            name, offset = member.filename, member.header_offset
            if 0 <= offset < end:
                raise ValueError(f"the members {before!r} and {name!r} overlap")
            if not 0 <= offset <= directory - LOCAL_HEADER.size:
                raise ValueError(f"the member {name!r} lies outside of the file")
            header = self.bytes[offset : offset + LOCAL_HEADER.size].tobytes()
            magic, _, flags, method, *_, name_size, extra_size = LOCAL_HEADER.unpack(header)
            begin = offset + LOCAL_HEADER.size
            encoded = name.encode("utf-8" if flags & UTF8 else "cp437", "replace")
            if magic != MAGIC or method != member.compress_type:
                raise ValueError(f"the member {name!r} does not begin where the directory says")
            if self.bytes[begin : begin + name_size].tobytes() != encoded:
                raise ValueError(f"the member {name!r} has another name in front of its data")
            begin += name_size + extra_size
            end, before = begin + member.compress_size, name
            if end > directory:
                raise ValueError(f"the member {name!r} lies outside of the file")
            starts[name] = begin
        return starts

    def _data(self, name: str) -> np.ndarray:
        """uint8 [n]: mapped, or unpacked."""
        member = self.members[name]
        packed = self.bytes[self.starts[name] :][: member.compress_size]
        if member.compress_type == zipfile.ZIP_STORED:
            return packed
        data, filled = np.empty(member.file_size, np.uint8), 0
        try:
            with zipfile.ZipFile(self.path) as archive, archive.open(member) as unpacked:
                while chunk := unpacked.read(1 << 20):
                    data[filled : filled + len(chunk)] = np.frombuffer(chunk, np.uint8)
                    filled += len(chunk)
        except BROKEN as error:
            raise ValueError(f"the member {name!r} cannot be unpacked: {error}") from error
        if filled != data.size:
            raise ValueError(f"the member {name!r} does not unpack to its {data.size:,} bytes")
        return data


def _by_name(members: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The members, each of which has a plain name of its own and is a plain file."""
    found: dict[str, zipfile.ZipInfo] = {}
    for member in members:
        name = member.orig_filename
        parts = name.removesuffix("/").split("/")
        if re.search(r"[\\\x00-\x1f:]", name) or {"", ".", ".."} & set(parts):
            raise ValueError(f"the member {name!r:.200} has a path that leads elsewhere")
        if member.filename in found:
            raise ValueError(f"it has two members {name!r}")
        if stat.S_ISLNK(member.external_attr >> 16):
            raise ValueError(f"the member {name!r} is a symbolic link")
        if member.flag_bits & ENCRYPTED:
            raise ValueError(f"the member {name!r} is encrypted")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(
                f"the member {name!r} is compressed by method {member.compress_type}: "
                "only deflate (8) is read"
            )
        if member.compress_type == zipfile.ZIP_STORED and member.compress_size != member.file_size:
            raise ValueError(f"the member {name!r} has two sizes")
        found[member.filename] = member
    return found
