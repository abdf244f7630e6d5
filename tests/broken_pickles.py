"""Pickles that a weight file must not hold, and what the refusal says."""

from __future__ import annotations

import argparse
import collections
import os
import struct
import types
from typing import Any

import numpy as np

from tests.weight_files import MODULES, UTILS, Call, Storage, tensor

CANARY = "canary"
NAME = os.system.__module__  # 'posix', or 'nt'
COMMAND = f"touch {CANARY}"
NAMESPACE = b"cargparse\nNamespace\n"
FOUR = np.arange(4, dtype=np.float32)


class Opcodes(bytes):
    """A pickle written by hand."""


def binary(body: bytes, protocol: int = 2) -> Opcodes:
    return Opcodes(b"\x80" + bytes([protocol]) + body + b".")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def view(**fields: Any) -> Call:
    return tensor(FOUR, **fields)


def storage(**fields: Any) -> Call:
    return tensor(FOUR, storage=Storage(FOUR, **fields))


def circle() -> list[Any]:
    inside: list[Any] = []
    inside.append(inside)
    return inside


def namespace_circle() -> argparse.Namespace:
    inside = argparse.Namespace()
    inside.itself = inside
    return inside


def laughs() -> list[Any]:
    """Each of 40 lists holds the next one twice."""
    inside: list[Any] = []
    for _ in range(40):
        inside = [inside, inside]
    return inside


def nested(depth: int) -> bytes:
    return b")" + b"\x85" * depth


# What is pickled -> a part of the message. All go through both formats of torch.
PICKLES: dict[str, tuple[Any, str]] = {
    "call_of_os_system": (Call(os.system, COMMAND), f"asks for {NAME}.system"),
    "call_of_eval": (
        Call(eval, f"__import__('os').mkdir('{CANARY}')"),
        "for __builtin__.eval",
    ),
    "call_inside_the_state_dict": (
        {"model": {"w": view(), "x": Call(os.mkdir, CANARY)}},
        f"asks for {NAME}.mkdir",
    ),
    "name_on_the_stack": (
        binary(b"\x8c\x02os\x8c\x06system\x93" + text(COMMAND) + b"\x85R", 4),
        "asks for os.system",
    ),
    "name_through_a_listed_module": (
        binary(b"\x8c\x0ctorch._utils\x8c\x09os.system\x93" + text(COMMAND) + b"\x85R", 4),
        "asks for torch._utils.os.system",
    ),
    "name_that_is_not_called": (binary(b"cos\nsystem\n"), "asks for os.system"),
    "name_that_is_dropped": (binary(b"cos\nsystem\n0N"), "asks for os.system"),
    "instance": (binary(b"(S'" + COMMAND.encode() + b"'\nios\nsystem\n"), "opcode STRING"),
    "instance_at_once": (binary(b"(" + text(COMMAND) + b"ios\nsystem\n"), "asks for os.system"),
    "object": (binary(b"(cos\nsystem\n" + text(COMMAND) + b"o"), "asks for os.system"),
    "new_object": (binary(b"ccollections\nOrderedDict\n)\x81"), "opcode NEWOBJ"),
    "extension_code": (binary(b"\x82\x01"), "asks for extension code 1"),
    "persistent_text": (binary(b"Pos.system\n"), "opcode PERSID"),
    "object_of_a_trainer": (
        {"model": {"w": view()}, "args": types.SimpleNamespace(lr=1)},
        r"asks for types.SimpleNamespace: only tensors and plain containers .* torch.save\(",
    ),
    "namespace_of_a_call": (
        {"args": argparse.Namespace(lr=Call(os.mkdir, CANARY))},
        f"asks for {NAME}.mkdir",
    ),
    "namespace_of_a_class": (argparse.Namespace(a=collections.OrderedDict), "for collections.Ord"),
    "namespace_of_itself": (namespace_circle(), "argparse.Namespace in it holds another: only"),
    "namespace_of_a_tensor": (argparse.Namespace(a=[view()]), "in it holds a tensor: only plain"),
    "namespace_class": ([argparse.Namespace], "asks for argparse.Namespace: "),
    "namespace_with_slots": (
        binary(NAMESPACE + b")\x81" + b"N}" + text("a") + b"Ns" + b"\x86b"),
        "fills a argparse.Namespace with a tuple that is no plain dict",
    ),
    "namespace_of_an_ordered_dict": (
        binary(NAMESPACE + b")\x81" + b"ccollections\nOrderedDict\n)Rb"),
        "with a OrderedDict that is no plain dict",
    ),
    "namespace_of_numbered_attributes": (
        binary(NAMESPACE + b")\x81}K\x01Nsb"),
        "with a dict that is no plain dict",
    ),
    "namespace_filled_twice": (binary(NAMESPACE + b")\x81}b}b"), "a argparse.Namespace twice"),
    "namespace_filled_as_a_dict": (
        binary(NAMESPACE + b")\x81" + text("__class__") + b"Ns"),
        "fills a Attributes as a dict",
    ),
    "namespace_called_with_arguments": (
        binary(NAMESPACE + text("a") + b"\x85R"),
        "a call of argparse.Namespace with arguments",
    ),
    "namespace_made_with_arguments": (
        binary(NAMESPACE + text("a") + b"\x85\x81"),
        "a call of argparse.Namespace with arguments",
    ),
    "namespace_made_with_keywords": (binary(NAMESPACE + b")}\x92", 4), "opcode NEWOBJ_EX"),
    "namespace_of_a_list": (binary(NAMESPACE + b"]\x81"), "calls something that is no name"),
    "another_object_of_argparse": (
        binary(b"cargparse\nArgumentParser\n)\x81"),
        "asks for argparse.ArgumentParser",
    ),
    "whole_module": (
        Call(MODULES["torch.nn.modules.linear"]["Linear"], 3, 4),
        "asks for torch.nn.modules.linear.Linear",
    ),
    "sparse_tensor": (
        Call(UTILS["_rebuild_sparse_tensor"], 0, ()),
        "asks for torch._utils._rebuild_sparse_tensor",
    ),
    "class_instead_of_a_tensor": ([collections.OrderedDict], "asks for collections.OrderedDict"),
    "call_of_a_storage_type": (
        Call(MODULES["torch"]["FloatStorage"], 1 << 50),
        "asks for a call of torch.FloatStorage",
    ),
    "call_of_text": (binary(text("os.system") + text(COMMAND) + b"\x85R"), "calls something"),
    "attributes_of_a_list": (binary(b"]}" + text("a") + b"Nsb"), "fills a list as a OrderedDict"),
    "items_of_a_number": (binary(b"K\x01(K\x01K\x01u"), "fills a int as a dict"),
    "set": ({1, 2}, "asks for __builtin__.set"),
    "bytes": (binary(b"C\x01a", 4), "opcode SHORT_BINBYTES"),
    "in_a_circle": (circle(), "more than 64 deep, or in a circle"),
    "too_deep": (binary(nested(100_000)), "more than 64 deep"),
    "a_billion_laughs": (laughs(), "more than 1,000 objects"),
    "too_many_opcodes": (binary(b"(" + b"N" * 3000 + b"t"), "more than 2,000 opcodes"),
    "deep_key": (binary(b"}" + nested(100_000)[:1000] + b"Ns"), "has a tuple as a key"),
    "same_key_twice": (binary(b"}(" + (text("w") + b"N") * 2 + b"u"), "key 'w' twice"),
    "key_without_a_value": (binary(b"}(Nu"), "a key without a value"),
    "huge_integer": (binary(b"\x8b" + struct.pack("<i", 5000) + b"\x01" * 5000), "128 bits"),
    "huge_length_of_an_integer": (binary(b"\x8b\xff\xff\xff\x7f\x01"), "broken or truncated"),
    "huge_length_of_text": (binary(b"\x8d" + b"\xff" * 7 + b"\x7fa", 4), "broken or truncated"),
    "huge_length_of_bytes": (binary(b"\x8e" + b"\xff" * 7 + b"\x7fa", 4), "broken or truncated"),
    "unknown_object": (binary(b"j\xff\xff\xff\x7f"), "no object has the number 2147483647"),
    "empty_stack": (binary(b"\x86"), "TUPLE2 at byte [0-9]+ finds nothing"),
    "mark_without_end": (binary(b"("), "does not end with one object"),
    "unknown_opcode": (binary(b"\xff"), "broken or truncated"),
    "truncated_pickle": (Opcodes(b"\x80\x02}"), "truncated|does not end with one object"),
    "negative_size": (view(shape=(-4,), strides=(1,)), r"shape \(-4,\): not all are sizes"),
    "negative_stride": (view(offset=3, shape=(4,), strides=(-1,)), r"strides \(-1,\)"),
    "fractional_size": (view(shape=(1.5,), strides=(1,)), r"shape \(1.5,\)"),
    "negative_offset": (view(offset=-1, shape=(2,), strides=(1,)), "begins at -1"),
    "offset_behind_the_storage": (view(offset=2, shape=(3,)), "reaches number 4 of storage '0'"),
    "stride_behind_the_storage": (view(shape=(2, 2), strides=(4, 1)), "reaches number 5"),
    "sizes_that_overflow": (view(shape=(2**61,), strides=(8,)), "reaches number 184467440737"),
    "repeated_without_end": (view(shape=(2**40, 4), strides=(0, 1)), "repeats the 4 numbers"),
    "strides_too_few": (view(shape=(2, 2), strides=(1,)), "2 dimensions and 1 strides"),
    "dimensions_too_many": (view(shape=(1,) * 99, strides=(1,) * 99), "99 dimensions"),
    "tensor_without_storage": (tensor(FOUR, storage=3), "a tensor without a storage"),
    "tensor_with_few_arguments": (Call(UTILS["_rebuild_tensor_v2"], 1), "of 1 arguments"),
    "negated_view": (
        Call(UTILS["_rebuild_tensor_v2"], *tensor(FOUR).args, {"neg": True}),
        "negated view",
    ),
    "quantised_storage": (
        storage(kind=MODULES["torch"]["QInt8Storage"]),
        "asks for torch.QInt8Storage",
    ),
    "storage_alone": ({"w": Storage(FOUR)}, "a storage that is no tensor"),
    "storage_with_a_path": (storage(key="../../etc/passwd"), "key '../../etc/passwd'"),
    "storage_of_negative_size": (storage(numel=-1), "storage '0' has the size -1"),
    "storage_too_large": (storage(numel=1 << 40), "storage '0'|weights/data/0 has 16 bytes"),
    "storage_too_small": (storage(numel=3), "storage '0' has 4 numbers|0 has 16 bytes"),
    "storage_that_is_missing": (storage(key="7"), "'7', which is missing|0/7|data/7, which is m"),
}
