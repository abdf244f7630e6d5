"""Networks that judge images: official files to one file, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.convert import lpips, weight_file
from ar_jax.convert.networks import convert_network
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import release_shapes
from ar_jax.convert.places import flat_leaves
from ar_jax.io.network_file import check_network, read_network, write_network
from ar_jax.nn.lpips import NETWORKS, param_shapes
from tests.converted_cases import GOLDEN

BACKBONE, LINEAR = "features.3.weight", "lin1.model.1.weight"


@pytest.fixture(scope="module")
def tensors() -> tuple[dict[str, Any], dict[str, Any]]:
    """Of the AlexNet backbone, with a piece of the classifier, and of the linear layers."""
    case = Case.load(GOLDEN / "lpips" / "v01")
    backbone = case.state_dict("alexnet_features") | {"classifier.1.bias": np.ones(4, np.float32)}
    return backbone, case.state_dict("lpips_alex")


@pytest.fixture(scope="module")
def files(tensors, tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("official")
    paths = folder / "alexnet.pth", folder / "alex.safetensors"
    for path, held in zip(paths, tensors, strict=True):
        weight_file.write(path, held)
    return paths


def test_torchvision_and_linear_files(files, tensors, tmp_path):
    """Every number arrives where the layer looks for it."""
    convert_network("lpips", files, tmp_path / "alex.npz")
    about, params = read_network(tmp_path / "alex.npz")
    assert (about["family"], about["network"]) == ("lpips", "alexnet")
    assert [len(digest) for digest in about["files"].values()] == [64, 64]
    kernel = params["backbone"]["conv3"]["kernel"]
    np.testing.assert_array_equal(kernel, tensors[0][BACKBONE].transpose(2, 3, 1, 0))
    np.testing.assert_array_equal(params["linear"]["layer1"], tensors[1][LINEAR].ravel())
    check_network("", params, param_shapes("alexnet"))
    with pytest.raises(ValueError, match="exists already"):
        convert_network("lpips", files, tmp_path / "alex.npz")


def test_a_state_dict_of_the_whole_module(files, tensors, tmp_path):
    """lpips's own: slices, the linear layers twice, the scaling layer."""
    whole = {re.sub("^features", "net.slice1", k): a for k, a in tensors[0].items()} | tensors[1]
    whole |= {f"lins.{key[3:]}": array for key, array in tensors[1].items()}
    whole |= {f"scaling_layer.{k}": np.ones((1, 3, 1, 1), np.float32) for k in ("shift", "scale")}
    weight_file.write(tmp_path / "whole.pth", whole)
    one = convert_network("lpips", [tmp_path / "whole.pth"], tmp_path / "one.npz")
    two = flat_leaves(convert_network("lpips", files, tmp_path / "two.npz"))
    for name, leaf in flat_leaves(one).items():
        np.testing.assert_array_equal(leaf, two[name])


def test_what_is_refused(files, tensors, tmp_path):
    out = tmp_path / "out.npz"
    with pytest.raises(ValueError, match=r"alexnet.pth: tensor 'lin0.model.1.weight' is missing"):
        convert_network("lpips", files[:1], out)
    with pytest.raises(ValueError, match=r"alex.safetensors: tensor 'features.0.weight' is missi"):
        convert_network("lpips", files[1:], out)
    with pytest.raises(ValueError, match="is in another of the files too"):
        convert_network("lpips", [files[0], *files], out)
    changed = tensors[0] | {"features.0.weight": np.zeros((96, 3, 11, 11), np.float32)}
    weight_file.write(tmp_path / "wide.pth", changed)
    with pytest.raises(ValueError, match=r"\(96, 3, 11, 11\) is of none of vgg, alexnet"):
        convert_network("lpips", [tmp_path / "wide.pth", files[1]], out)
    weight_file.write(tmp_path / "more.pth", tensors[0] | {"features.9.weight": np.zeros(1)})
    with pytest.raises(ValueError, match=r"'features.9.weight' \(1,\) has no place in ours"):
        convert_network("lpips", [tmp_path / "more.pth", files[1]], out)
    assert not out.exists()


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_of_the_release(name):
    """Keys and shapes of torchvision's and lpips's files, as recorded."""
    keys = json.loads((GOLDEN / "lpips" / "release_keys.json").read_text())
    official = {"vgg": "vgg16-", "alexnet": "alexnet-"}[name], f"/{name.removesuffix('net')}.pth"
    recorded = {
        k: tuple(v)
        for f, held in keys.items()
        if any(o in f for o in official)
        for k, v in held.items()
    }
    part = lpips.network_part(name)
    assert release_shapes(part, lpips.expected(part)) == recorded


def test_network_files(tmp_path):
    params: Any = {"a": {"kernel": np.arange(6, dtype=np.float16).reshape(2, 3)}, "b": np.ones(2)}
    write_network(tmp_path / "x.npz", params, {"family": "none"})
    about, back = read_network(tmp_path / "x.npz")
    assert about == {"family": "none"} and back["a"]["kernel"].dtype == np.float32
    np.testing.assert_array_equal(back["a"]["kernel"], params["a"]["kernel"])
    assert [path.name for path in tmp_path.iterdir()] == ["x.npz"]
    with pytest.raises(ValueError, match=r"'a/kernel' has the shape \(2, 3\), expected \(2, 2\)"):
        check_network("x", back, {"a": {"kernel": np.ones((2, 2))}, "b": np.ones(2)})
    with pytest.raises(ValueError, match="'b' has the shape none, expected"):
        check_network("x", {"a": back["a"]}, back)
    with pytest.raises(ValueError, match="must end in"):
        write_network(tmp_path / "x.pth", params, {})
    with pytest.raises(ValueError, match="no such file"):
        read_network(tmp_path / "y.npz")
    (tmp_path / "y.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match=r"no .npz of arrays"):
        read_network(tmp_path / "y.npz")
