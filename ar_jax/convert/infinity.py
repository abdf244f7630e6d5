"""Infinity's releases (arXiv:2412.04431, github.com/FoundationVision/Infinity).

``infinity_vae_d16.pth`` to ``infinity_vae_d64.pth`` and ``infinity_vae_d32_reg.pth``, of 16 to 64
bits a code: the state_dict lies under 'vae' (or 'ema'). Some files leave out one level of the names
('norm1.weight' for 'norm1.norm.weight'); they are written with it. Of transformers see
`infinity_transformer`.

Options, beside the fields that the tensors say:

    image_size    256
    scales        those of the square images of this size: (1, 2, 4, 6, 8, 12, 16) for 256
    patch         cells on a side of what one code is of: 1, or 2 for the transformer of 56 bits
    entropy, groups    of the tokenizer: False, 32
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from ar_jax.convert import infinity_transformer
from ar_jax.convert.part import Buffer, Part, agree, find_state_dict
from ar_jax.convert.vqgan import LDM, Shapes, autoencoder_places, read_autoencoder
from ar_jax.schedules import as_grids

STYLE = dataclasses.replace(LDM, projected=False)
CONTAINERS = ("vae", "ema", "state_dict")
SCALES = infinity_transformer.SCALES
MASKS = ("quantizer.lfq.mask", "quantize.lfq.mask")

unwrap_generator = infinity_transformer.unwrap_generator
generator = infinity_transformer.generator
generator_part = infinity_transformer.generator_part


def unwrap_tokenizer(container: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tokenizer's state_dict inside a file, under its full names."""
    key = "encoder.conv_in.weight"
    try:
        found = find_state_dict(container, CONTAINERS, _full(key))
    except ValueError:
        found = find_state_dict(container, CONTAINERS, key)
    return {_full(name): tensor for name, tensor in found.items()}


def tokenizer(shapes: Shapes, options: Mapping[str, Any]) -> Part:
    """The tokenizer that tensors of these shapes are; options: see above."""
    fields = read_autoencoder(
        {_short(key): shape for key, shape in shapes.items()},
        STYLE,
        {"image_size": 256, **options},
    )
    patch = options.get("patch", 1)
    cell = 2 ** (len(fields["multipliers"]) - 1) * patch
    agree("downsample", cell, options, "the file")
    ((rows, columns),) = as_grids([fields["image_size"]])
    scales = options.get("scales")
    if scales is None:
        if rows != columns or rows // cell not in SCALES:
            raise ValueError(
                f"image_size is {fields['image_size']}, which are {rows // cell}x{columns // cell} "
                "codes, not the last of Infinity's square scales: give the option scales"
            )
        scales = SCALES[: SCALES.index(rows // cell) + 1]
    section = dict(
        name="multiscale_bitwise",
        scales=tuple(scales),
        patch=patch,
        entropy=options.get("entropy", False),
        autoencoder=fields,
    )
    return tokenizer_part({"tokenizer": section})


def tokenizer_part(config: Mapping[str, Any]) -> Part:
    """The part of a section 'tokenizer' of name 'multiscale_bitwise'."""
    section = config["tokenizer"]
    if section["name"] != "multiscale_bitwise":
        raise ValueError(f"tokenizer.name is {section['name']!r}, which is none of Infinity's")
    autoencoder = section["autoencoder"]
    if autoencoder.get("projection", 1):
        raise ValueError(
            f"tokenizer.autoencoder.projection is {autoencoder.get('projection', 1)}; Infinity's "
            "tokenizers have no convolution there: 0"
        )
    bits = autoencoder["code_width"]

    def mask() -> np.ndarray:
        return 2 ** np.arange(bits - 1, -1, -1, dtype=np.int64)

    places = autoencoder_places(autoencoder, STYLE)
    return Part(
        section={"tokenizer": dict(section)},
        places={_full(key): place for key, place in places.items()},
        buffers={name: Buffer(shape=(bits,), make=mask) for name in MASKS},
        container=("vae",),
    )


def _short(key: str) -> str:
    """Without the level of the names that some files leave out."""
    if re.search(r"(down|up)sample\.conv\.(weight|bias)$", key):
        return key
    return re.sub(r"\.(conv|norm)\.(weight|bias)$", r".\2", key)


def _full(key: str) -> str:
    """With it: 'a.conv1.weight' -> 'a.conv1.conv.weight', 'a.norm1.bias' -> 'a.norm1.norm.bias'."""
    *folders, name = _short(key).split(".")
    if name not in ("weight", "bias"):
        return key
    kind = "norm" if folders[-1].startswith("norm") else "conv"
    return ".".join((*folders, kind, name))
