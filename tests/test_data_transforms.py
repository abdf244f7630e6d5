"""Crops and flips: exact against independent implementations, and in their limits."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from PIL import Image

from ar_jax.data.transforms import ImageTransform, center_crop, margin_crop, random_crop

SHAPES = [(28, 28), (64, 64), (65, 200), (200, 65), (517, 333), (40, 31), (8, 9), (128, 256)]


def photo(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Smooth colours plus noise, so that every filter tap matters."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / (3 + c) + y / (5 - c)) for c in range(channels)]
    noisy = 100 + 80 * np.stack(waves, -1) + rng.integers(0, 60, (height, width, channels))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def reference_fit(image: np.ndarray, side: int) -> np.ndarray:
    """ADM's resize on a Pillow image, written apart from the code under test."""
    pil = Image.fromarray(image.squeeze())
    while min(pil.width, pil.height) >= side * 2:
        pil = pil.resize((pil.width // 2, pil.height // 2), Image.Resampling.BOX)
    factor = side / min(pil.width, pil.height)
    pil = pil.resize(
        (round(pil.width * factor), round(pil.height * factor)), Image.Resampling.BICUBIC
    )
    return np.array(pil).reshape(pil.height, pil.width, -1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 32])
def test_center_crop_is_adm_exactly(shape, channels, size):
    image = photo(shape[0], shape[1], channels)
    fitted = reference_fit(image, size)
    top, left = (fitted.shape[0] - size) // 2, (fitted.shape[1] - size) // 2
    expected = fitted[top : top + size, left : left + size]
    got = center_crop(image, size)
    assert got.dtype == np.uint8 and got.shape == (size, size, channels)
    np.testing.assert_array_equal(got, expected)


def test_center_crop_without_box_halving_differs():
    image = photo(128, 128)
    plain = np.array(Image.fromarray(image).resize((32, 32), Image.Resampling.BICUBIC))
    assert not np.array_equal(center_crop(image, 32), plain)


def test_random_crop_is_adm_with_every_side_drawn():
    image, size = photo(70, 90), 16
    low, high = math.ceil(size / 1.0), math.ceil(size / 0.8)
    fits = {side: reference_fit(image, side) for side in range(low, high + 1)}
    sides, tops = set(), set()
    for seed in range(120):
        got = random_crop(image, size, np.random.default_rng(seed))
        found = [
            (side, top)
            for side, fit in fits.items()
            for top in range(fit.shape[0] - size + 1)
            for left in range(fit.shape[1] - size + 1)
            if np.array_equal(fit[top : top + size, left : left + size], got)
        ]
        assert len(found) == 1, f"seed {seed}: {found}"
        sides.add(found[0][0])
        if found[0][0] == high:
            tops.add(found[0][1])
    assert sides == set(range(low, high + 1)) == {16, 17, 18, 19, 20}
    assert tops == set(range(high - size + 1)), "both ends of the window's range are drawn"


@pytest.mark.parametrize("shape", SHAPES)
def test_margin_crop_is_shorter_side_by_lanczos_then_window(shape):
    image, size = photo(*shape), 16
    short = round(1.125 * size)
    height, width = shape
    if height <= width:
        to = (int(short * width / height), short)
    else:
        to = (short, int(short * height / width))
    fitted = np.array(Image.fromarray(image).resize(to, Image.Resampling.LANCZOS))
    top = int(round((fitted.shape[0] - size) / 2.0))
    left = int(round((fitted.shape[1] - size) / 2.0))
    np.testing.assert_array_equal(
        margin_crop(image, size, None), fitted[top : top + size, left : left + size]
    )
    drawn = margin_crop(image, size, np.random.default_rng(1))
    assert any(
        np.array_equal(drawn, fitted[t : t + size, l : l + size])
        for t in range(fitted.shape[0] - size + 1)
        for l in range(fitted.shape[1] - size + 1)  # noqa: E741
    )


def test_flip_is_drawn_and_is_a_mirror():
    image = photo(16, 16)
    transform = ImageTransform(size=16, flip=True)
    kinds = []
    for seed in range(64):
        got = transform(image, np.random.default_rng(seed))
        kinds.append(np.array_equal(got, image[:, ::-1]))
        assert kinds[-1] or np.array_equal(got, image)
        np.testing.assert_array_equal(got, transform(image, np.random.default_rng(seed)))
    assert 16 < sum(kinds) < 48
    np.testing.assert_array_equal(transform(image, None), image)


@pytest.mark.parametrize("crop", ["center", "random", "margin"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_every_crop_gives_uint8_squares(crop, channels):
    image = photo(50, 41, channels)
    for rng in (None, np.random.default_rng(0)):
        got = ImageTransform(size=24, crop=crop, flip=True)(image, rng)
        assert got.shape == (24, 24, channels) and got.dtype == np.uint8


def test_evaluation_takes_the_centre_where_training_draws():
    image = photo(50, 41)
    np.testing.assert_array_equal(
        ImageTransform(size=24, crop="random")(image, None), center_crop(image, 24)
    )


def test_flip_does_not_change_the_crop_drawn():
    image = photo(50, 41)
    plain = ImageTransform(size=24, crop="random")
    flipping = dataclasses.replace(plain, flip=True)
    for seed in range(8):
        a = plain(image, np.random.default_rng(seed))
        b = flipping(image, np.random.default_rng(seed))
        assert np.array_equal(a, b) or np.array_equal(a, b[:, ::-1])


def test_none_requires_the_size():
    with pytest.raises(ValueError, match=r"is 30x28 pixels while data.image_size=28.*'center'"):
        ImageTransform(size=28)(photo(30, 28), None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "centre"}, r"data.crop='centre' is not known; use one of none, center"),
        ({"size": 0}, "data.image_size=0"),
        ({"min_crop": 0.0}, "data.min_crop=0.0"),
        ({"min_crop": 0.9, "max_crop": 0.8}, "data.max_crop=0.8"),
        ({"max_crop": 1.5}, "data.max_crop=1.5"),
        ({"margin": 0.9}, "data.margin=0.9"),
    ],
)
def test_bad_fields_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**{"size": 28, **fields})
