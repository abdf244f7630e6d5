"""Malicious and broken weight files: each is refused, by name, and nothing of it runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import stat
import struct
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from ar_jax.convert import inert_pickle, safetensors_file, torch_tensors, weight_file
from tests.broken_pickles import (
    CANARY,
    COMMAND,
    FOUR,
    NAME,
    PICKLES,
    Opcodes,
    storage,
    view,
)
from tests.weight_files import (
    LEGACY_MACHINE,
    Call,
    dumps,
    header_file,
    legacy_file,
    tensor,
    zip_file,
)


def edit(data: bytes, old: bytes, new: bytes, *, last: bool = False) -> bytes:
    assert len(old) == len(new)
    at = data.rindex(old) if last else data.index(old)
    return data[:at] + new + data[at + len(new) :]


def with_member(name: str, mode: int = 0, data: bytes = b"root") -> bytes:
    member = zipfile.ZipInfo(name)
    member.external_attr = mode << 16
    return zip_file({"w": view()}, members=((member, data),))


def directory_edit(offset: int, new: bytes, member: bytes = b"weights/data/0") -> bytes:
    """A zip file with bytes of a member's entry in the directory replaced."""
    data = zip_file({"w": view()})
    at = data.rindex(member) - 46 + offset
    return data[:at] + new + data[at + len(new) :]


def bomb() -> bytes:
    zeros = tensor(np.zeros(8 << 20, np.float32))
    return zip_file({"w": zeros}, method=zipfile.ZIP_DEFLATED)


def twice() -> bytes:
    with pytest.warns(UserWarning, match="Duplicate name"):
        return zip_file({"w": view()}, members=(("weights/data/0", b"1234"),))


def tar_file() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        archive.addfile(tarfile.TarInfo("storages"))
    return stream.getvalue()


def plain_pickle(content: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(content, protocol)


def plain_zip() -> bytes:
    return zip_file({"w": view()})


def plain_legacy() -> bytes:
    return legacy_file({"w": view()})


def damaged_deflate() -> bytes:
    """The first byte of a compressed storage names a kind of block that does not exist."""
    data = zip_file({"w": tensor(np.zeros(999))}, method=zipfile.ZIP_DEFLATED)
    at = data.index(b"weights/data/0") + len(b"weights/data/0")
    return data[:at] + b"\x07" + data[at + 1 :]


# Name -> (bytes of the file, a part of the message).
TORCH_FILES: dict[str, tuple[Callable[[], bytes], str]] = {
    "zip_truncated": (lambda: plain_zip()[:-40], "zip directory is broken or truncated"),
    "zip_half": (lambda: plain_zip()[:200], "zip directory is broken or truncated"),
    "zip_without_its_middle": (
        lambda: plain_zip()[:60] + plain_zip()[130:],
        "broken|outside of the file|begin where",
    ),
    "path_upwards": (lambda: with_member("../../evil"), r"'../../evil' has a path that leads else"),
    "path_absolute": (lambda: with_member("/etc/evil"), "'/etc/evil' has a path"),
    "path_of_windows": (lambda: with_member("weights\\..\\evil"), "has a path that leads"),
    "path_with_a_drive": (lambda: with_member("C:evil"), "'C:evil' has a path"),
    "path_with_a_null": (
        lambda: edit(with_member("weights/evilX"), b"evilX", b"evil\0", last=True),
        "has a path that leads",
    ),
    "symbolic_link": (
        lambda: with_member("weights/data/9", stat.S_IFLNK | 0o777, b"/etc/passwd"),
        "'weights/data/9' is a symbolic link",
    ),
    "member_twice": (twice, "two members 'weights/data/0'"),
    "encrypted": (lambda: directory_edit(8, b"\x01\x00"), "is encrypted"),
    "compressed_by_bzip2": (
        lambda: zip_file({"w": view()}, method=zipfile.ZIP_BZIP2),
        "by method 12: only deflate",
    ),
    "zip_bomb": (bomb, "unpack to 33,[0-9,]+ bytes, more than 20 times"),
    "compressed_data_damaged": (damaged_deflate, "'weights/data/0' cannot be unpacked"),
    "two_sizes": (lambda: directory_edit(24, struct.pack("<I", 999)), "has two sizes"),
    "member_outside": (
        lambda: directory_edit(20, struct.pack("<II", 1 << 20, 1 << 20)),
        "'weights/data/0' lies outside of the file|overlap",
    ),
    "members_overlap": (
        lambda: directory_edit(20, struct.pack("<II", 40, 40)),
        "'weights/data/0' and 'weights/version' overlap",
    ),
    "header_outside": (lambda: directory_edit(42, struct.pack("<I", 1 << 30)), "outside of the"),
    "header_elsewhere": (lambda: directory_edit(42, struct.pack("<I", 3)), "overlap|begin where"),
    "name_differs_from_the_directory": (
        lambda: edit(plain_zip(), b"weights/data/0", b"weights/data/1"),
        "has another name in front of its data",
    ),
    "no_pickle": (lambda: plain_zip().replace(b"data.pkl", b"data.txt"), "0 members NAME/data.pkl"),
    "torch_script": (
        lambda: zip_file({"w": view()}, members=(("weights/code/a.py", b""),)),
        "a TorchScript program",
    ),
    "damaged_pickle": (lambda: edit(plain_zip(), b"cuda:0", b"cuda:1"), "checksum"),
    "byte_order_big": (lambda: zip_file({"w": view()}, byte_order=b"big"), "byte order is 'big'"),
    "zip_storage_missing": (
        lambda: zip_file({"w": view()}, left_out="0"),
        "refers to weights/data/0, which is missing",
    ),
    "huge_pickle": (lambda: zip_file(pickled=b"N" * 20_001), "20,001 bytes, more than 20,000"),
    "legacy_truncated": (lambda: plain_legacy()[:-1], "truncated: storage '0' ends at byte"),
    "legacy_without_storages": (lambda: plain_legacy()[:-24], "truncated: storage '0'"),
    "legacy_cut_in_its_pickle": (lambda: plain_legacy()[:100], "broken or truncated"),
    "legacy_with_more": (lambda: plain_legacy() + b"more", "4 bytes behind its last storage"),
    "legacy_size_differs": (
        lambda: plain_legacy()[:-24] + struct.pack("<q", -4) + FOUR.tobytes(),
        "has -4 numbers, but its pickle says 4",
    ),
    "legacy_byte_order_big": (
        lambda: legacy_file({"w": view()}, machine=LEGACY_MACHINE | {"little_endian": False}),
        "byte order is not little",
    ),
    "legacy_protocol": (lambda: legacy_file({"w": view()}, number=7), "its protocol is 7"),
    "legacy_storage_missing": (
        lambda: legacy_file({"w": view()}, keys=[]),
        "refers to storage '0', which is missing",
    ),
    "legacy_storage_twice": (lambda: legacy_file({"w": view()}, keys=["0", "0"]), "one twice"),
    "legacy_storage_unknown": (
        lambda: legacy_file({"w": view()}, keys=["0", "1"]),
        "'1' belongs to no tensor",
    ),
    "legacy_evil_before_the_magic": (
        lambda: plain_pickle(Call(os.system, COMMAND)),
        f"asks for {NAME}.system",
    ),
    "legacy_evil_as_the_machine": (
        lambda: legacy_file({"w": view()}, machine=Call(os.system, COMMAND)),
        f"asks for {NAME}.system",
    ),
    "legacy_view_of_a_storage": (
        lambda: legacy_file({"w": storage(view=("1", 0, 2))}),
        "storage '0' is a view of another",
    ),
    "pickle_of_python": (lambda: plain_pickle({"w": 1}), "a pickle that torch.save did not write"),
    "pickle_as_text": (lambda: plain_pickle(Call(os.system, COMMAND), 0), f"asks for {NAME}.sys"),
    "empty": (lambda: b"", "it is empty"),
    "web_page": (lambda: b"\n<!DOCTYPE html><html>", "it is a web page"),
    "git_lfs_pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\n", "git-lfs"),
    "tar": (tar_file, "it is a tar file, as torch wrote until 2017"),
    "numpy": (lambda: b"\x93NUMPY\x01\x00v\x00", r"no weight file: it begins with b'\\x93NUMPY"),
    "text": (lambda: b"Not found", "it is no weight file"),
}


def entry(dtype: Any = "F32", shape: Any = (4,), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def one(data: bytes = FOUR.tobytes(), **fields: Any) -> bytes:
    return header_file({"w": entry(**fields)}, data)


def two(first: tuple[int, int], second: tuple[int, int]) -> bytes:
    both = {"v": entry(shape=[2], offsets=first), "w": entry(shape=[2], offsets=second)}
    return header_file(both, FOUR.tobytes())


SAFETENSORS_FILES: dict[str, tuple[bytes, str]] = {
    "truncated": (one(FOUR.tobytes()[:-1]), "ends at byte 16 of 15: the file is truncated"),
    "header_truncated": (one()[:30], "it is truncated"),
    "only_a_length": (b"\x10\0\0", "it is truncated"),
    "huge_header": (
        header_file(b"{}", length=2**63),
        "it is truncated, or no safetensors",
    ),
    "header_above_the_bound": (
        header_file(b"{" + b" " * 5000 + b"}"),
        "more than 4,000",
    ),
    "no_json": (header_file(b"{'w': 1}"), "not the JSON of safetensors"),
    "no_text": (header_file(b'{"\xff": 1}'), "not the JSON of safetensors"),
    "no_object": (header_file([1]), "no object"),
    "nested_without_end": (
        header_file(b"[" * 3900),
        "not the JSON of safetensors",
    ),
    "number_without_end": (
        header_file(b'{"w": ' + b"9" * 3800 + b"}"),
        "tensor 'w' is not",
    ),
    "key_twice": (
        header_file(b'{"w": 1, "w": 2}'),
        "key 'w' is there twice",
    ),
    "field_twice": (
        header_file(json.dumps({"w": entry()}).encode().replace(b'"shape"', b'"dtype"')),
        "key 'dtype' is there twice",
    ),
    "field_missing": (
        header_file({"w": {"dtype": "F32"}}),
        "not described by dtype, shape",
    ),
    "entry_no_object": (header_file({"w": [1]}), "not described by dtype, shape"),
    "wrong_dtype": (one(dtype="F31"), "dtype 'F31': read are F64, F32"),
    "dtype_no_text": (one(dtype=["F32"]), "has the dtype"),
    "negative_size": (one(shape=[-4]), r"has the shape \[-4\]"),
    "size_no_number": (one(shape=[True]), r"has the shape \[True\]"),
    "shape_no_list": (one(shape="4"), "has the shape '4'"),
    "dimensions_too_many": (one(shape=[1] * 99), "has the shape"),
    "sizes_that_overflow": (one(shape=[2**61, 8, 8]), "but its data_offsets"),
    "shape_and_offsets_differ": (one(shape=[5]), r"\[5\] of 20 bytes, but its .* hold 16"),
    "offsets_backwards": (one(offsets=[16, 0]), "hold -16"),
    "offsets_negative": (one(offsets=[-16, 0]), "has the data_offsets"),
    "offsets_three": (one(offsets=[0, 8, 16]), "has the data_offsets"),
    "tensors_overlap": (two((0, 8), (4, 12)), "tensor 'v' and tensor 'w' overlap"),
    "tensors_the_same": (two((0, 8), (0, 8)), "tensor 'v' and tensor 'w' overlap"),
    "gap_between_tensors": (two((0, 8), (12, 20)), "leave 4 bytes between them"),
    "gap_before_tensors": (one(offsets=[4, 20]), "the header and tensor 'w' leave 4 bytes"),
    "bytes_behind": (one(FOUR.tobytes() + b"more"), "4 bytes behind its last tensor"),
}


@pytest.fixture
def refuses(tmp_path, monkeypatch):
    """Reading a file of these bytes fails with the message, and leaves no trace but the file."""
    monkeypatch.chdir(tmp_path)
    # Small bounds, so that files beyond them are quickly made and read.
    monkeypatch.setattr(torch_tensors, "MAX_NODES", 1000)
    monkeypatch.setattr(safetensors_file, "MAX_HEADER", 4000)

    def check(data: bytes, message: str, name: str = "weights.pth") -> None:
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message) as error:
            weight_file.read(path)
        assert str(error.value).startswith(f"{path}: ")
        assert len(str(error.value)) < 1200
        assert list(tmp_path.iterdir()) == [path]

    return check


def saved(layout: Callable[..., bytes], content: Any) -> bytes:
    return layout(pickled=content) if isinstance(content, Opcodes) else layout(content)


@pytest.mark.parametrize("layout", [zip_file, legacy_file])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_are_refused(refuses, monkeypatch, layout, name):
    content, message = PICKLES[name]
    if name == "too_many_opcodes":
        monkeypatch.setattr(inert_pickle, "MAX_OPCODES", 2000)
    refuses(saved(layout, content), message)


@pytest.mark.parametrize("name", TORCH_FILES)
def test_torch_files_are_refused(refuses, monkeypatch, name):
    make, message = TORCH_FILES[name]
    if name == "huge_pickle":
        monkeypatch.setattr(inert_pickle, "MAX_BYTES", 20_000)
    refuses(make(), message)


@pytest.mark.parametrize("name", SAFETENSORS_FILES)
def test_safetensors_files_are_refused(refuses, name):
    refuses(*SAFETENSORS_FILES[name], name="weights.safetensors")


def test_the_canary_would_sing(tmp_path, monkeypatch):
    """The same bytes do harm where they are run."""
    monkeypatch.chdir(tmp_path)
    for name in ("call_of_os_system", "call_of_eval", "name_on_the_stack", "instance_at_once"):
        content, _ = PICKLES[name]
        pickle.loads(content if isinstance(content, Opcodes) else dumps(content)[0])
        canary = tmp_path / CANARY
        canary.rmdir() if canary.is_dir() else canary.unlink()


def test_any_damage_is_an_error_of_value_or_none(tmp_path):
    """Bytes changed at random: a file is read or refused, but nothing else goes wrong."""
    rng = np.random.default_rng(0)
    content = {"w": view(), "x": tensor(np.zeros((2, 3), np.int64)), "epoch": 3}
    header = {"w": entry(), "x": entry("I64", [0, 2], [16, 16])}
    files = {
        "zip": zip_file(content),
        "packed": zip_file(content, method=zipfile.ZIP_DEFLATED),
        "legacy": legacy_file(content),
        "safetensors": header_file(header, FOUR.tobytes()),
    }
    refused = 0
    for name, data in files.items():
        path = tmp_path / name
        for _ in range(250):
            damaged = np.frombuffer(data, np.uint8).copy()
            at = rng.integers(damaged.size, size=rng.integers(1, 4))
            damaged[at] = rng.integers(256, size=at.size)
            path.write_bytes(damaged.tobytes()[: rng.integers(damaged.size // 2, damaged.size * 2)])
            try:
                weight_file.read(path)
            except ValueError as error:
                assert str(error).startswith(f"{path}: ")
                refused += 1
    assert refused > 500
