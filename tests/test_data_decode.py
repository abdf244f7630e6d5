"""Every image mode becomes uint8 [H, W, 1 or 3] by the stated rule."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ar_jax.data.decode import decode_image, encode_png, to_channels
from ar_jax.data.source import UnreadableItem

RGB = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3) * 3
GREY = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_rgb_and_grey_are_kept():
    np.testing.assert_array_equal(decode_image(encoded(Image.fromarray(RGB)), "x"), RGB)
    got = decode_image(encoded(Image.fromarray(GREY)), "x")
    np.testing.assert_array_equal(got, GREY[..., None])


def test_channels_convert_as_stated():
    grey = decode_image(encoded(Image.fromarray(GREY)), "x", 3)
    np.testing.assert_array_equal(grey, np.stack([GREY] * 3, -1))
    luminance = np.asarray(Image.fromarray(RGB).convert("L"))
    got = decode_image(encoded(Image.fromarray(RGB)), "x", 1)
    np.testing.assert_array_equal(got, luminance[..., None])
    rng = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    np.testing.assert_array_equal(
        to_channels(rng, 1, "x")[..., 0], np.asarray(Image.fromarray(rng).convert("L"))
    )
    with pytest.raises(ValueError, match=r"file.png: cannot turn 3 channel\(s\) into channels=2"):
        to_channels(RGB, 2, "file.png")


def test_alpha_is_composited_on_white():
    alpha = np.zeros((4, 6, 1), np.uint8)
    alpha[:2] = 255
    rgba = Image.fromarray(np.concatenate([RGB, alpha], -1))
    expected = RGB.copy()
    expected[2:] = 255
    np.testing.assert_array_equal(decode_image(encoded(rgba), "x"), expected)
    la = Image.fromarray(np.concatenate([GREY[..., None], alpha], -1), mode=None)
    got = decode_image(encoded(la), "x")
    assert got.shape == (4, 6, 1), "grey with alpha stays grey"
    np.testing.assert_array_equal(got, np.where(alpha > 0, GREY[..., None], 255))
    half = Image.new("RGBA", (2, 2), (0, 100, 200, 128))
    np.testing.assert_allclose(decode_image(encoded(half), "x")[0, 0], [127, 177, 227], atol=1)


def test_palette_with_and_without_transparency():
    palette = Image.fromarray(RGB).quantize(16)
    expected = np.asarray(palette.convert("RGB"))
    np.testing.assert_array_equal(decode_image(encoded(palette), "x"), expected)
    index = int(np.asarray(palette)[0, 0])
    transparent = decode_image(encoded(palette, transparency=index), "x")
    assert tuple(transparent[0, 0]) == (255, 255, 255)
    keep = np.asarray(palette) != index
    np.testing.assert_array_equal(transparent[keep], expected[keep])


def test_sixteen_bits_are_scaled_not_clipped():
    deep = np.array([[0, 200, 257, 32768, 65535]], np.uint16)
    got = decode_image(encoded(Image.fromarray(deep)), "x")
    np.testing.assert_array_equal(got[..., 0], [[0, 1, 1, 128, 255]])


def test_bilevel_cmyk_and_webp():
    bilevel = decode_image(encoded(Image.fromarray(GREY > 100)), "x")
    np.testing.assert_array_equal(bilevel[..., 0], np.where(GREY > 100, 255, 0))
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    red = decode_image(encoded(cmyk, "JPEG", quality=95), "x")
    np.testing.assert_allclose(red[0, 0].astype(int), [255, 0, 0], atol=4)
    webp = decode_image(encoded(Image.fromarray(RGB), "WEBP", lossless=True), "x")
    np.testing.assert_array_equal(webp, RGB)


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned by 90 degrees
    got = decode_image(encoded(Image.fromarray(RGB), exif=exif), "x")
    np.testing.assert_array_equal(got, np.rot90(RGB, -1))


def test_damaged_files_are_unreadable_and_named():
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for kind in ("PNG", "JPEG", "WEBP"):
        content = encoded(Image.fromarray(noise), kind)
        with pytest.raises(UnreadableItem, match=r"^cats/a\.img: cannot be decoded"):
            decode_image(content[: len(content) // 2], "cats/a.img")
    for content in (b"", b"<html>not an image</html>"):
        with pytest.raises(UnreadableItem, match=r"^cats/a\.img: cannot be decoded"):
            decode_image(content, "cats/a.img")
    with pytest.raises(UnreadableItem, match=r"^a\.tif: images of mode F are not supported"):
        decode_image(encoded(Image.fromarray(np.ones((2, 2), np.float32)), "TIFF"), "a.tif")


def test_png_round_trip_and_refusal():
    for image in (RGB, GREY[..., None]):
        np.testing.assert_array_equal(decode_image(encode_png(image), "x"), image)
    with pytest.raises(ValueError, match="must be uint8"):
        encode_png(RGB.astype(np.float32))
