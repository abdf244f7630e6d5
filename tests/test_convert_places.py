"""Strictness: what does not fit is named, with both names and both shapes."""

from __future__ import annotations

from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from ar_jax.convert import llamagen, var, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import Part, agree, find_state_dict, to_params
from ar_jax.convert.places import (
    check_cover,
    dense,
    fused,
    fused_bias,
    official_shapes,
    same,
    split,
    to_official,
    to_ours,
)
from ar_jax.convert.release import choose
from tests.converted_cases import CASES, GOLDEN, OPTIONS, PARTS, official

ATTENTION = "stack/attention"
PLACES = {
    "0.qkv": fused(ATTENTION, (4, -1, 2), 0, sizes=(4, 2, 2)),
    "1.qkv": fused(ATTENTION, (4, -1, 2), 1, sizes=(4, 2, 2)),
    "out": dense("out/kernel", (2, 2, 3), 2),
    "bias": split("a/bias", "b/bias"),
    "norm": same("norm/scale"),
}
SHAPES = {
    "stack": {
        "attention": {
            name: {"kernel": jax.ShapeDtypeStruct((2, 4, heads, 2), np.float32)}
            for name, heads in (("query", 2), ("key", 1), ("value", 1))
        }
    },
    "out": {"kernel": jax.ShapeDtypeStruct((2, 2, 3), np.float32)},
    "a": {"bias": jax.ShapeDtypeStruct((3,), np.float32)},
    "b": {"bias": jax.ShapeDtypeStruct((3,), np.float32)},
    "norm": {"scale": jax.ShapeDtypeStruct((5,), np.float32)},
}
OFFICIAL = {"0.qkv": (8, 4), "1.qkv": (8, 4), "out": (3, 4), "bias": (6,), "norm": (5,)}


def tensors(**changes: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    drawn = {key: rng.standard_normal(shape, np.float32) for key, shape in OFFICIAL.items()}
    return drawn | changes


def test_there_and_back():
    assert official_shapes(PLACES, SHAPES) == OFFICIAL
    given = tensors()
    ours = to_ours(PLACES, given, SHAPES)
    assert jax.tree.map(np.shape, ours) == jax.tree.map(lambda s: s.shape, SHAPES)
    # Row r of the second layer's weight is output r: of the key's only head, element r - 4.
    np.testing.assert_array_equal(
        ours["stack"]["attention"]["key"]["kernel"][1, :, 0, 1], given["1.qkv"][5]
    )
    np.testing.assert_array_equal(ours["out"]["kernel"][1, 0], given["out"][:, 2])
    np.testing.assert_array_equal(ours["b"]["bias"], given["bias"][3:])
    back = to_official(PLACES, ours)
    assert list(back) == list(PLACES)
    for key, tensor in given.items():
        np.testing.assert_array_equal(back[key], tensor)
    bias = fused_bias("x", (-1, 2), names=("q", "k"), sizes=(4, 2))
    shapes = {"x": {"q": {"bias": np.zeros((2, 2))}, "k": {"bias": np.zeros((1, 2))}}}
    assert official_shapes({"b": bias}, shapes) == {"b": (6,)}


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_and_keeps_its_values(kind):
    half = {key: tensor.astype(kind) for key, tensor in tensors().items()}
    ours = to_ours(PLACES, half, SHAPES)
    assert ours["norm"]["scale"].dtype == np.float32
    back = to_official(PLACES, ours)
    for key, tensor in half.items():
        assert back[key].dtype == np.float32
        np.testing.assert_array_equal(back[key], tensor.astype(np.float32))


@pytest.mark.parametrize("kind", [np.float64, ml_dtypes.float8_e4m3fn, np.complex64])
def test_other_types_are_refused(kind):
    """float64 would be cut short; types of eight bits are no weights without their scales."""
    part = Part(section={}, places=PLACES)
    given = tensors(norm=np.ones(5, kind))
    message = rf"^d16\.pth: tensor 'norm' is {np.dtype(kind)}, but our 'norm/scale' takes floats"
    with pytest.raises(ValueError, match=message):
        to_params(part, given, SHAPES, "d16.pth")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"extra": np.zeros(3)}, r"'extra' \(3,\) has no place"),
        ({"norm": None}, r"'norm' is missing; our 'norm/scale' needs it"),
        ({"norm": np.zeros(4)}, r"'norm' has the shape \(4,\).*'norm/scale' \(\(5,\)\).*\(5,\)"),
        ({"1.qkv": np.zeros((8, 5))}, r"'1.qkv' .*\(8, 5\).*/key/kernel'.* of layer 1 .*\(8, 4\)"),
        ({"norm": np.zeros(5, np.int64)}, r"'norm' is int64, but our 'norm/scale' takes floats"),
    ],
)
def test_tensors_that_do_not_fit(change, message):
    given = {key: tensor for key, tensor in tensors(**change).items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        to_ours(PLACES, given, SHAPES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"again": same("norm/scale")}, r"'norm' and 'again' both fill our 'norm/scale'"),
        ({"other": same("other/scale")}, r"'other' belongs in 'other/scale', which ours has not"),
        ({"norm": None}, r"our 'norm/scale' \(5,\) is not filled"),
        ({"1.qkv": None}, r"query/kernel' \(2, 4, 2, 2\) is not filled: of 2 layers.*\[0\]"),
    ],
)
def test_places_that_do_not_fit(change, message):
    places = {key: place for key, place in {**PLACES, **change}.items() if place is not None}
    with pytest.raises(ValueError, match=message):
        check_cover(places, SHAPES)


def test_options_must_agree():
    assert agree("width", 4, {}, "x") == 4 and agree("width", None, {"width": 4}, "x") == 4
    assert agree("sizes", (1, 2), {"sizes": [1, 2]}, "x") == (1, 2)
    with pytest.raises(ValueError, match="width is 5, but x.weight says 4"):
        agree("width", 4, {"width": 5}, "x.weight")
    with pytest.raises(ValueError, match="do not say heads"):
        agree("heads", None, {}, "")


def test_state_dict_inside_a_container():
    state = {"k": np.zeros(1)}
    names = ("model", "trainer.net")
    for container in (state, {"model": state}, {"trainer": {"net": state}}):
        assert find_state_dict(container, names, "k") is state
    with pytest.raises(ValueError, match=r"no tensor 'k'.*model, trainer\.net.*holds 'optimizer'"):
        find_state_dict({"optimizer": {}, "trainer": 3}, names, "k")


@pytest.mark.parametrize("family", ["var", "llamagen"])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape", "kind", "list"])
def test_files_that_do_not_fit(family, change, tmp_path):
    """The error names the file, the key and what is wrong."""
    case = Case.load(GOLDEN / CASES[family])
    broken = official(case, PARTS[family][1])
    key = {"var": "blocks.1.ffn.fc2.weight", "llamagen": "layers.1.feed_forward.w2.weight"}[family]
    messages = {
        "missing": rf"{key}' is missing; our 'backbone/stack/blocks/mlp/down/kernel' of layer 1",
        "unknown": r"'strange' \(2,\) has no place",
        "shape": rf"{key}' has the shape \(2, 3\), but our 'backbone/.* needs",
        "kind": rf"{key}' is int32",
        "list": r"'note' is a str, not a tensor",
    }
    if change == "missing":
        del broken[key]
    elif change == "unknown":
        broken["strange"] = np.zeros(2, np.float32)
    elif change == "list":
        broken["note"] = "hello"  # type: ignore[assignment]
    else:
        shape = (2, 3) if change == "shape" else broken[key].shape
        broken[key] = np.zeros(shape, np.float32 if change == "shape" else np.int32)
    paths = tmp_path / "tokenizer.pt", tmp_path / "transformer.pt"
    weight_file.write(paths[0], official(case, "tokenizer"))
    weight_file.write(paths[1], broken)
    with pytest.raises(ValueError, match=rf"transformer\.pt: .*{messages[change]}"):
        convert_files(choose(family), *paths, OPTIONS[family])


def test_what_the_tensors_say_is_checked():
    case = Case.load(GOLDEN / CASES["var"])
    shapes = case.shapes("transformer")
    with pytest.raises(ValueError, match="30 positions on 4 scales, which are not the official"):
        var.generator(shapes, {})
    with pytest.raises(ValueError, match=r"scales is \(1, 2, 3, 5\), but pos_1LC has 30"):
        var.generator(shapes, {"scales": (1, 2, 3, 5)})
    with pytest.raises(ValueError, match="heads is 4, but .* says 2"):
        var.generator(shapes, {"scales": (1, 2, 3, 4), "heads": 4})
    shapes = Case.load(GOLDEN / CASES["llamagen"]).shapes("gpt_c2i")
    with pytest.raises(ValueError, match="give the option heads .--heads=N"):
        llamagen.generator(shapes, {})
    with pytest.raises(ValueError, match="heads is 5, which does not divide the width 96"):
        llamagen.generator(shapes, {"heads": 5})
    with pytest.raises(ValueError, match="family 'x' is none of"):
        choose("x")
