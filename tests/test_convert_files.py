"""Weight files of torch and of safetensors, read and written without either."""

from __future__ import annotations

import argparse
import collections
import tracemalloc
import zipfile
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from ar_jax.convert import weight_file
from tests.weight_files import (
    MODULES,
    STORAGE_TYPES,
    UNTYPED_DTYPES,
    UTILS,
    Call,
    Storage,
    header_file,
    legacy_file,
    tensor,
    zip_file,
)

LAYOUTS: dict[str, Any] = {"zip": zip_file, "legacy": legacy_file}
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name)) for name in (*STORAGE_TYPES, *UNTYPED_DTYPES)
}


def numbers(dtype: np.dtype, shape: tuple[int, ...] = (3, 4)) -> np.ndarray:
    return (np.random.default_rng(0).normal(size=shape) * 3 + 9).astype(dtype)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and found.tobytes() == expected.tobytes()
    )


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_containers_come_back(tmp_path, layout, protocol):
    content = {
        "model": collections.OrderedDict(a=tensor(np.arange(6.0).reshape(2, 3))),
        "epoch": 7,
        "steps": [0, -1, 255, 256, 65536, -(2**31), 2**31, 2**62, -(2**62)],
        "lr": 1e-4,
        "flags": (True, False, None),
        "nested": {"betas": (0.9, 0.95), "empty": [(), [], {}], "one": (1,), "text": "größe"},
        "many": tuple(range(5)),
        3: "key",
    }
    # torch hangs the versions of its modules on the state_dict, as an attribute.
    content["model"]._metadata = collections.OrderedDict({"": {"version": 1}})  # type: ignore
    path = tmp_path / "checkpoint.pth"
    path.write_bytes(layout(content, protocol=protocol))
    found = weight_file.read(path)
    assert list(found) == list(content)
    assert type(found["model"]) is dict
    assert same(found["model"]["a"], np.arange(6.0).reshape(2, 3))
    for key in [key for key in content if key != "model"]:
        assert found[key] == content[key], key


@pytest.mark.parametrize("protocol", [2, 4])
def test_settings_of_a_trainer_come_back_as_a_dict(tmp_path, layout, protocol):
    """As LlamaGen's and MAR's trainers keep them, pickled by Python from the class itself."""
    args = argparse.Namespace(lr=1e-4, resume=None, betas=(0.9, 0.95), names=["a"], ema=True, d={})
    content = {"model": {"w": tensor(np.arange(3.0))}, "args": args, "none": argparse.Namespace()}
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(layout(content | {"again": args}, protocol=protocol))
    found = weight_file.read(path)
    assert type(found["args"]) is dict and found["args"] == vars(args) == found["again"]
    assert found["none"] == {} and same(found["model"]["w"], np.arange(3.0))


def test_a_namespace_that_is_called_is_the_same(tmp_path):
    program = b"\x80\x02cargparse\nNamespace\n)R}X\x01\x00\x00\x00aK\x07sb."
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(zip_file(pickled=program))
    assert weight_file.read(path) == {"a": 7}


@pytest.mark.parametrize("name", DTYPES)
def test_types_of_tensors(tmp_path, layout, name):
    expected = numbers(DTYPES[name])
    path = tmp_path / "weights.bin"
    path.write_bytes(layout({"w": tensor(expected)}))
    found = weight_file.read(path)["w"]
    assert same(found, expected)
    assert not found.flags.writeable


def test_views_of_storages(tmp_path, layout):
    whole = Storage(np.arange(24, dtype=np.float32))
    matrix = np.arange(24, dtype=np.float32).reshape(4, 6)
    views: dict[str, tuple[dict[str, Any], Any]] = {
        "whole": (dict(shape=(4, 6), strides=(6, 1)), matrix),
        "transposed": (dict(shape=(6, 4), strides=(1, 6)), matrix.T),
        "slice": (dict(offset=8, shape=(2, 2), strides=(6, 1)), matrix[1:3, 2:4]),
        "every_other": (dict(shape=(12,), strides=(2,)), matrix.reshape(-1)[::2]),
        "expanded": (dict(offset=5, shape=(3, 2), strides=(0, 1)), np.array([[5, 6]] * 3)),
        "scalar": (dict(offset=23, shape=(), strides=()), np.array(23)),
        "nothing": (dict(offset=24, shape=(0, 3), strides=(3, 1)), np.empty((0, 3))),
    }
    content = {
        key: tensor(np.float32(0), storage=whole, **view) for key, (view, _) in views.items()
    }
    content["empty"] = tensor(np.empty((2, 0), np.float32))
    path = tmp_path / "weights.pt"
    path.write_bytes(layout(content))
    found = weight_file.read(path)
    for key, (_, expected) in views.items():
        assert same(found[key], expected.astype(np.float32)), key
    assert found["empty"].shape == (2, 0)
    assert np.shares_memory(found["whole"], found["transposed"])


def test_wrappers_of_tensors(tmp_path, layout):
    expected = numbers(np.dtype(np.float32))
    wrapped = tensor(expected)
    content = {
        "parameter": Call(UTILS["_rebuild_parameter"], wrapped, True, collections.OrderedDict()),
        "with_state": Call(UTILS["_rebuild_parameter_with_state"], wrapped, True, None, {"a": 1}),
        "first_layout": Call(UTILS["_rebuild_tensor"], *wrapped.args[:4]),
        "metadata": Call(UTILS["_rebuild_tensor_v2"], *wrapped.args, None),
        "size": Call(MODULES["torch"]["Size"], (3, 4)),
    }
    path = tmp_path / "weights.ckpt"
    path.write_bytes(layout(content))
    found = weight_file.read(path)
    assert found.pop("size") == (3, 4)
    for key, value in found.items():
        assert same(value, expected), key


def test_a_tensor_alone(tmp_path, layout):
    path = tmp_path / "weights.pth"
    path.write_bytes(layout(tensor(np.arange(3.0))))
    assert same(weight_file.read(path), np.arange(3.0))


def test_compressed_members_are_unpacked(tmp_path):
    expected = numbers(np.dtype(np.float32), (100, 1000))
    path = tmp_path / "weights.pth"
    path.write_bytes(zip_file({"w": tensor(expected)}, method=zipfile.ZIP_DEFLATED))
    assert same(weight_file.read(path)["w"], expected)


def test_format_is_told_by_the_content(tmp_path):
    expected = numbers(np.dtype(np.float32))
    path = tmp_path / "weights.safetensors"
    path.write_bytes(zip_file({"w": tensor(expected)}))
    assert same(weight_file.read(path)["w"], expected)
    weight_file.write(path, {"w": expected})
    assert same(weight_file.read(path.rename(tmp_path / "weights.bin"))["w"], expected)


def test_safetensors_of_the_specification(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "b": {"dtype": "I64", "shape": [], "data_offsets": [6, 14]},
        "a": {"dtype": "BF16", "shape": [3, 1], "data_offsets": [0, 6]},
        "empty": {"dtype": "F32", "shape": [0, 2], "data_offsets": [14, 14]},
    }
    first = np.array([[1], [-2], [0.5]], ml_dtypes.bfloat16)
    path = tmp_path / "weights.safetensors"
    path.write_bytes(header_file(header, first.tobytes() + np.int64(-3).tobytes()))
    found = weight_file.read(path)
    assert list(found) == ["b", "a", "empty"]
    assert same(found["a"], first)
    assert same(found["b"], np.array(-3))
    assert found["empty"].shape == (0, 2)


def tensors_of_all_types() -> dict[str, np.ndarray]:
    kinds = {name: numbers(dtype) for name, dtype in DTYPES.items() if "complex" not in name}
    return kinds | {
        "scalar": np.array(3.5, np.float32),
        "empty": np.empty((0, 3), np.float32),
        "transposed": numbers(np.dtype(np.float32)).T,
        "große": numbers(np.dtype(np.int8), (1, 5)),
    }


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_written_files_come_back(tmp_path, suffix):
    tensors = tensors_of_all_types()
    if suffix == ".pth":
        tensors = {k: v for k, v in tensors.items() if k not in UNTYPED_DTYPES}
    path = tmp_path / f"weights{suffix}"
    weight_file.write(path, tensors | {"big_endian": np.arange(3, dtype=">f4")})
    found = weight_file.read(path)
    assert same(found.pop("big_endian"), np.arange(3, dtype=np.float32))
    assert found.keys() == tensors.keys()
    for key, expected in tensors.items():
        assert same(found[key], expected), key
    assert all(v.flags.aligned for v in found.values())
    first = path.read_bytes()
    weight_file.write(
        path, dict(reversed(tensors.items())) | {"big_endian": np.arange(3, dtype=">f4")}
    )
    assert suffix == ".pth" or path.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_written_torch_file_nests(tmp_path):
    content = {"model": {"w": np.arange(3.0)}, "epoch": 3, "lr": -0.5, "done": True, "args": None}
    path = tmp_path / "weights.pth"
    weight_file.write(path, content | {"name": "größe", "large": -(2**40)})
    found = weight_file.read(path)
    assert same(found.pop("model")["w"], np.arange(3.0))
    assert found == {k: v for k, v in content.items() if k != "model"} | {
        "name": "größe",
        "large": -(2**40),
    }
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_a_mapping_held_twice_is_written_once(tmp_path):
    path, state = tmp_path / "weights.pth", {"w": np.arange(1000.0)}
    weight_file.write(path, {"model": state, "model_ema": state, "other": dict(state)})
    found = weight_file.read(path)
    assert all(same(found[name]["w"], state["w"]) for name in ("model", "model_ema", "other"))
    assert np.shares_memory(found["model"]["w"], found["model_ema"]["w"])
    assert not np.shares_memory(found["model"]["w"], found["other"]["w"])
    assert 16_000 < path.stat().st_size < 24_000


@pytest.mark.parametrize(
    ("suffix", "tensors", "message"),
    [
        (".npz", {}, "suffix is none of .safetensors, .pth"),
        (".safetensors", {"w": np.zeros(2, np.complex64)}, r"'w' \(complex64\)"),
        (".safetensors", {"__metadata__": np.zeros(2)}, "'__metadata__'"),
        (".pth", {"w": np.zeros(2, np.uint16)}, r"'w' \(uint16\)"),
        (".pth", {"a": {1: np.zeros(2)}}, "key 1 is no string"),
    ],
)
def test_what_cannot_be_written(tmp_path, suffix, tensors, message):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(ValueError, match=message) as error:
        weight_file.write(path, tensors)
    assert str(path) in str(error.value)
    assert path.read_bytes() == b"old"


class Failing(collections.UserDict):
    """Gives every tensor once."""

    def __getitem__(self, key):
        value = super().__getitem__(key)
        if value is None:
            raise KeyboardInterrupt
        self.data[key] = None
        return value


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_interrupted_writing_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt):
        weight_file.write(path, Failing({"w": np.zeros(2)}))
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
def test_reading_makes_no_copy(tmp_path, kind):
    """96 MiB in 24 tensors, of which Python holds less than 18 MiB (a legacy file's first 16)."""
    shape = (1024, 1024)
    content = {f"w{i}": np.full(shape, i, np.float32) for i in range(24)}
    path = tmp_path / "weights"
    if kind == "safetensors":
        path = path.with_suffix(".safetensors")
        weight_file.write(path, content)
    else:
        path.write_bytes(LAYOUTS[kind]({key: tensor(value) for key, value in content.items()}))
    del content
    tracemalloc.start()
    try:
        found = weight_file.read(path)
        assert [float(found[f"w{i}"][-1, -1]) for i in range(24)] == list(range(24))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (18 << 20 if kind == "legacy" else 2 << 20)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_writing_holds_one_tensor_at_a_time(tmp_path, suffix):
    class Made(collections.UserDict):
        def __getitem__(self, key):
            return np.full((1024, 1024), int(key), np.float32)

    tracemalloc.start()
    try:
        weight_file.write(tmp_path / f"weights{suffix}", Made({str(i): None for i in range(24)}))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 10 << 20
    assert weight_file.read(tmp_path / f"weights{suffix}")["23"][-1, -1] == 23
