"""Infinity: every array that the official code recorded, every released size, the way back."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ar_jax.convert import infinity, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.parity import infinity as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case
from ar_jax.convert.part import empty_params, release_shapes, to_tensors
from tests.config_files import load
from tests.golden_lines import part_of
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import sizes_of

GOLDEN = Path(__file__).parent / "golden" / "infinity"
SCALES = (1, 2, 3, 4)
# (depth, width, heads, bits) of the released transformers.
SIZES = {
    "layer12": (12, 768, 8, 32),
    "layer16": (16, 1152, 12, 32),
    "layer24": (24, 1536, 16, 32),
    "2b": (32, 2048, 16, 32),
    "layer32": (32, 2080, 20, 32),
    "layer40": (40, 2688, 24, 32),
    "8b": (40, 3584, 28, 56),
    "layer48": (48, 3360, 28, 32),
}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


@pytest.mark.slow  # half a minute
def test_parity(tiny):
    lines = {line.name: line for line in check_case(parity, tiny)}
    assert lines.keys() == tiny.io.keys()
    wrong = "\n".join(str(line) for line in lines.values() if not line.ok)
    assert not wrong, f"\n{wrong}"
    left = {name for name, line in lines.items() if line.largest is None}
    assert all(lines[name].origin == "input" for name in left - {"aux_losses"})


def test_parity_of_what_needs_no_long_compilation(tiny):
    """Rotations, and bits after flipped ones."""
    names = ["rope_cos_sin", *(name for name in tiny.io if name.startswith("bsc_main"))]
    inputs = [name for name in tiny.io if tiny.role_of(name) == "in"]
    case = part_of(tiny, sorted({*names, *inputs}), tiny.spec)
    lines = {line.name: line for line in check_case(parity, case)}
    assert all(lines[name].ok for name in names), lines


@pytest.mark.slow  # beside the parity of all
def test_guidance_of_another_block_is_not_what_was_recorded(tiny):
    spec = copy.deepcopy(tiny.spec)
    spec["config"]["samplers"][1]["cfg_insertion_layer"] = [-2]
    inputs = [name for name in tiny.io if tiny.role_of(name) == "in"]
    broken = part_of(tiny, ["sb_logits_scale3", *inputs], spec)
    lines = {line.name: line for line in check_case(parity, broken)}
    assert not lines["sb_logits_scale3"].ok


@pytest.mark.parametrize(
    "size", [pytest.param(n, marks=() if n == "layer12" else pytest.mark.slow) for n in SIZES]
)
def test_released_transformers(size):
    """Parameters and tensors; the shapes say the configuration again, and chunks the names."""
    depth, width, heads, bits = SIZES[size]
    patch = 2 if bits == 56 else 1
    autoencoder: dict[str, Any] = dict(image_size=256, image_channels=3, latent=bits // patch**2)
    autoencoder |= dict(code_width=bits // patch**2, channels=128, attention=False, projection=0)
    autoencoder |= dict(encoder_blocks=2, decoder_blocks=3)
    autoencoder["multipliers"] = (1, 2, 4, 4) if patch == 2 else (1, 2, 4, 4, 4)
    scales = infinity.SCALES[:7]
    fields = dict(name="multiscale_bitwise", scales=scales, patch=patch, autoencoder=autoencoder)
    backbone = dict(
        name="cross_decoder",
        width=width,
        depth=depth,
        heads=heads,
        condition="text",
        caption_length=512,
        caption_features=2048,
        caption_null_rows=512,
        pool_heads=16,
        feature_width=bits,
        reference_grid=(64, 64),
        spare_scales=8,
        norm_epsilon=1e-6,
        modulation="shared",
        qk_norm="cosine",
        cross_gate=False,
        activation="gelu_tanh",
        mlp_hidden=round(4 * width / 256) * 256,
        drop_path=0.1,
    )
    config = dict(
        dtype="float32",
        tokenizer=fields,
        schedule=dict(name="next_scale", scales=scales),
        backbone=backbone,
        head=dict(name="bitwise", bits=bits, bias=True, init_std=0.02 * (3 * width) ** -0.5),
        objective=dict(name="likelihood"),
    )
    part = infinity.generator_part(config)
    shapes = release_shapes(part, empty_params(config, "generator"))
    held = sum(math.prod(shape) for key, shape in shapes.items() if key not in part.buffers)
    tensors = {*shapes, *part.buffers}
    assert (held, len(tensors)) == sizes_of("infinity")[size].counts
    found = infinity.generator(shapes, {"downsample": 16})
    assert found.section["backbone"] == backbone
    assert found.section["head"] == config["head"]
    assert found.places.keys() == part.places.keys()


@pytest.mark.parametrize(
    "size",
    [
        name if name.endswith("f8") else pytest.param(name, marks=pytest.mark.slow)
        for name in sizes_of("infinity")
        if name.startswith("tokenizer")
    ],
)
def test_released_sizes(size):
    """Parameters and tensors, the buffer of powers of two included."""
    bits, narrow = int(size.split()[1].strip("d,")), "f8" in size
    multipliers = (1, 2, 4, 4) if narrow else (1, 2, 4, 4, 4)
    cells = 32 if narrow else 16
    autoencoder = dict(
        image_size=256,
        image_channels=3,
        latent=bits,
        code_width=bits,
        channels=128,
        multipliers=multipliers,
        encoder_blocks=2,
        decoder_blocks=3,
        attention=False,
        projection=0,
    )
    section = dict(name="multiscale_bitwise", scales=(1, cells), autoencoder=autoencoder)
    part = infinity.tokenizer_part({"tokenizer": section})
    expected = empty_params({"dtype": "float32", **part.section}, "tokenizer")
    shapes = release_shapes(part, expected)
    masks = 2  # the same tensor under two names
    count = sum(math.prod(shape) for shape in shapes.values())
    assert (count, len(shapes) + masks) == sizes_of("infinity")[size].counts
    # What the shapes say is what they came from.
    found = infinity.tokenizer(shapes, {"scales": (1, cells)}).section["tokenizer"]
    assert {name: found["autoencoder"][name] for name in autoencoder} == autoencoder


@pytest.mark.parametrize("short", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_files_there_and_back(tiny, tmp_path, short):
    """With the full names of the case, and with those that leave out a level."""
    tensors = tiny.state_dict("vae")
    masks = {name: 2 ** np.arange(7, -1, -1, dtype=np.int64) for name in infinity.MASKS}
    held = tensors | masks
    if short:
        held = {infinity._short(key): tensor for key, tensor in held.items()}
        assert "encoder.down.0.downsample.conv.weight" in held
    weight_file.write(tmp_path / "vae.pth", {"vae": held})
    options = {"scales": SCALES, "image_size": 16}
    converted = convert_files(infinity, tmp_path / "vae.pth", options=options)
    assert converted.config["tokenizer"]["autoencoder"]["projection"] == 0
    part = infinity.tokenizer_part(converted.config)
    back = to_tensors(part, converted.params)
    assert back.keys() == (tensors | masks).keys()
    for key, tensor in (tensors | masks).items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)


def test_what_cannot_be_read(tiny, tmp_path):
    shapes = tiny.shapes("vae")
    with pytest.raises(ValueError, match="not the last of Infinity's square scales"):
        infinity.tokenizer(shapes, {"image_size": 20})
    shapes = tiny.shapes("transformer")
    for options, words in (
        (dict(width=8), "width is 8, but word_embed.weight says 64"),
        (dict(scales=tuple(range(1, 17))), "there are 16 scales, but lvl_embed.weight has 15 rows"),
        (dict(image_size=80), "not the last of Infinity's square scales"),
    ):
        with pytest.raises(ValueError, match=words):
            infinity.generator(shapes, options)
    config = load("configs/fashion_mnist/var.py").get_config("smoke").to_dict()
    with pytest.raises(ValueError, match="backbone.name is 'decoder'; .* have 'cross_decoder'"):
        infinity.generator_part(config)


def test_both_files(tiny, tmp_path):
    """A tokenizer and a transformer, whose tensors come back bit for bit under their names."""
    weight_file.write(tmp_path / "vae.pth", {"vae": tiny.state_dict("vae")})
    tensors = tiny.state_dict("transformer")
    buffers = {t["key"] for t in tiny.tensors("transformer") if t["kind"] == "buffer"}
    zeros = {name: np.zeros(64, np.float32) for name in buffers}
    beside = {"lvl_1L": np.zeros((1, 30), np.int64)}
    names = {"trainer": {"gpt_fsdp": tensors | zeros | beside}}
    weight_file.write(tmp_path / "gpt.pth", names)
    options = {"scales": SCALES, "reference_grid": (4, 4)}
    converted = convert_files(infinity, tmp_path / "vae.pth", tmp_path / "gpt.pth", options)
    assert converted.unread == ("lvl_1L",)
    assert converted.config["backbone"]["reference_grid"] == (4, 4)
    trained = {name: converted.params[name] for name in ("backbone", "head")}
    part = infinity.generator(tiny.shapes("transformer"), options)
    back = to_tensors(part, trained)
    assert back.keys() == {*tensors, *buffers}
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(back[key], tensor, err_msg=key)
    # Of no official size: blocks without chunks, otherwise the same.
    again = to_tensors(infinity.generator_part(converted.config), trained)
    for i in range(2):
        old = back[f"block_chunks.{i}.module.0.ca.mat_kv.weight"]
        np.testing.assert_array_equal(again[f"blocks.{i}.ca.mat_kv.weight"], old)
