"""Image files to uint8 arrays, by one explicit rule for every mode.

* EXIF orientation is applied (a damaged EXIF block counts as none); of an animation the first frame
  is read.
* Transparency (alpha channel or transparent colour) is composited on white.
* 16-bit greyscale is scaled by 255/65535 and rounded; 16-bit colour PNGs keep their high byte.
* Palette, CMYK, YCbCr, Lab and HSV images become RGB; bilevel images become greyscale.
* `channels=3` from greyscale: replicated. `channels=1` from RGB: ITU-R 601 luminance, as Pillow.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

from ar_jax.data.source import UnreadableItem

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


def decode_image(encoded: bytes, name: str, channels: int | None = None) -> np.ndarray:
    """Decodes an encoded image.

    Args:
        encoded: the file's bytes (PNG, JPEG, WebP, or whatever else Pillow reads).
        name: the file's name, for messages.
        channels: 1 or 3 to convert by the rule above, None to keep the image's own (1 or 3).

    Returns:
        uint8 [H, W, C].

    Raises:
        UnreadableItem: the bytes are not an image, or a damaged one.
        ValueError: `channels` is neither 1 nor 3.
    """
    try:
        with warnings.catch_warnings():
            # Pillow warns about harmless metadata; what matters raises.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(encoded)) as opened:
                image = _normalise_mode(_upright(opened))
    except UnreadableItem as error:
        raise UnreadableItem(f"{name}: {error}") from None
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise UnreadableItem(
            f"{name}: cannot be decoded as an image ({type(error).__name__}: {error}); replace or "
            "remove it, or set data.on_error='skip'"
        ) from error
    array = np.asarray(image)
    return to_channels(array if array.ndim == 3 else array[..., None], channels, name)


def _upright(image: Image.Image) -> Image.Image:
    """Fully loaded, turned as EXIF says; without a readable EXIF block, as it is stored."""
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged metadata around sound pixels
        return image


def _normalise_mode(image: Image.Image) -> Image.Image:
    """Mode L or RGB."""
    if image.mode.startswith("I"):  # I;16, I;16B, I: greyscale of more than 8 bits
        values = np.asarray(image).astype(np.int64)
        if values.size and (values.min() < 0 or values.max() > 65535):
            raise UnreadableItem(
                f"{image.mode} pixels reach {values.max()}; greyscale of at most 16 bits is read"
            )
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))
    if image.has_transparency_data:
        grey = image.mode in ("L", "LA", "La", "1")
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, rgba).convert("L" if grey else "RGB")
    if image.mode in ("L", "RGB"):
        return image
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("P", "CMYK", "YCbCr", "LAB", "HSV", "RGBX"):
        return image.convert("RGB")
    raise UnreadableItem(f"images of mode {image.mode} are not supported; save it as RGB or grey")


def to_channels(images: np.ndarray, channels: int | None, name: str) -> np.ndarray:
    """Converts uint8 [..., C] to `channels`: 1 -> 3 replicates, 3 -> 1 takes the luminance.

    None, or the same number, keeps the array. Raises ValueError for any other pair.
    """
    have = images.shape[-1]
    if channels is None or channels == have:
        return images
    if (have, channels) == (1, 3):
        return np.repeat(images, 3, axis=-1)
    if (have, channels) == (3, 1):
        # Pillow's fixed-point form of 0.299 R + 0.587 G + 0.114 B.
        weights = np.array([19595, 38470, 7471], np.int64)
        return ((images.astype(np.int64) @ weights + 32768) >> 16).astype(np.uint8)[..., None]
    raise ValueError(
        f"{name}: cannot turn {have} channel(s) into channels={channels}; 1 and 3 convert into "
        f"each other, else set data.channels={have}"
    )


def encode_png(image: np.ndarray) -> bytes:
    """Encodes uint8 [H, W, 1 or 3] as PNG, without loss. Raises ValueError for other arrays."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(
            f"an image must be uint8 [H, W, 1 or 3] to be written as PNG, this one is "
            f"{image.dtype} {list(image.shape)}"
        )
    buffer = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, "PNG")
    return buffer.getvalue()
