"""Infinity: every array of the tokenizer that the official code recorded, sizes, the way back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from ar_jax.convert import infinity, weight_file
from ar_jax.convert.conversion import convert_files
from ar_jax.convert.parity import infinity as parity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import check_case, matches
from ar_jax.convert.part import empty_params, release_shapes, to_tensors
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.released_sizes import sizes_of

GOLDEN = Path(__file__).parent / "golden" / "infinity"
SCALES = (1, 2, 3, 4)
TRANSFORMER = (
    *("text_normed", "text_pooled", "text_kv", "block*", "logits", "bit_loss_per_token"),
    *("train_*", "rope_cos_sin", "s[a-z]_*"),
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def tiny() -> Case:
    return Case.load(GOLDEN / "tiny")


def test_parity(tiny):
    """All but the transformer's arrays, which are never said to be right."""
    lines = {line.name: line for line in check_case(parity, tiny)}
    assert lines.keys() == tiny.io.keys()
    missing = {name for name in lines if matches(name, TRANSFORMER)}
    assert len(missing) == 30
    for name, line in lines.items():
        assert line.ok == (name not in missing), str(line)
        if name in missing:
            assert line.origin == "not checked"
    compared = {name for name, line in lines.items() if line.largest is not None}
    left = lines.keys() - compared - missing
    assert all(lines[name].origin == "input" for name in left - {"aux_losses"})
    assert {"encoder_features", "quantized_sum", "decoded_image_raw"} <= compared
    assert {"entropy_codebook", "bsc_main_input", "bsc_norequant_target_bits"} <= compared


@pytest.mark.parametrize(
    "size",
    [
        name if name.endswith("f8") else pytest.param(name, marks=pytest.mark.slow)
        for name in sizes_of("infinity")
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
    weight_file.write(tmp_path / "vae.pth", {"vae": tiny.state_dict("vae")})
    with pytest.raises(ValueError, match="transformers are not read"):
        convert_files(infinity, tmp_path / "vae.pth", tmp_path / "vae.pth", {"image_size": 64})
