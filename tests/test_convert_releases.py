"""Every released size of VAR and LlamaGen: keys, shapes and counts, through eval_shape."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from ar_jax.convert import llamagen, var
from ar_jax.convert.part import Part, empty_params, release_shapes
from ar_jax.convert.vqgan import Shapes
from tests.config_files import load
from tests.released_sizes import sizes_of

KEYS = Path(__file__).parent / "golden" / "llamagen" / "release_keys.json"
GRIDS = {"c2i B": 16, "c2i L": 16, "c2i XL": 24, "c2i XXL": 24, "c2i 3B": 24, "t2i XL": 16}

# Parameters and tensors; d36 with its own norms is no release.
VAR_SIZES = {
    **{name: size.counts for name, size in sizes_of("var").items() if name != "tokenizer"},
    "d36": (3_465_053_200, 480),
}


@functools.cache
def released() -> dict[str, dict[str, tuple[int, ...]]]:
    stored = json.loads(KEYS.read_text())
    return {
        name: {key: tuple(shape) for key, shape in tensors.items()}
        for name, tensors in stored.items()
    }


def some_of(sizes: Iterable[str], *, slow: tuple[str, ...]) -> list[Any]:
    """The sizes as parameters of a test, those named in ``slow`` marked so."""
    return [pytest.param(size, marks=pytest.mark.slow if size in slow else ()) for size in sizes]


def count(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes.values())


def shapes_of(part: Part, kind: str, **sections: Any) -> dict[str, tuple[int, ...]]:
    """What ours has, in official keys."""
    config = {"dtype": "float32", **sections, **part.section}
    return release_shapes(part, empty_params(config, kind))


@pytest.mark.parametrize("name", ["VQ-16", "VQ-8"])
def test_llamagen_tokenizers(name):
    part = llamagen.tokenizer(released()[name], {})
    ours = shapes_of(part, "tokenizer")
    assert released()[name] == ours | {"quantize.codebook_used": (65_536,)}
    assert (count(ours), len(released()[name])) == sizes_of("llamagen")[name].counts


@pytest.mark.parametrize("name", some_of(GRIDS, slow=("c2i XL", "c2i XXL", "c2i 3B")))
def test_llamagen_transformers(name):
    part = llamagen.generator(released()[name], {})
    grid = part.section["schedule"]["grid"]
    assert grid == GRIDS[name]
    assert (count(released()[name]), len(released()[name])) == sizes_of("llamagen")[name].counts
    assert part.container == (() if name in ("c2i XXL", "c2i 3B") else ("model",))
    tokenizer = llamagen.tokenizer(released()["VQ-16"], {"image_size": 16 * grid})
    assert shapes_of(part, "generator", **tokenizer.section) == released()[name]


def test_llamagen_configs_are_the_releases():
    """The sections of configs/imagenet256/llamagen.py are those of the files."""
    for size in ("B", "L", "XL", "XXL", "3B"):
        config = load("configs/imagenet256/llamagen.py").get_config(size)
        part = llamagen.generator(released()[f"c2i {size}"], {"image_size": 256})
        ours, wanted = part.section, config.to_dict()
        assert ours["schedule"] == wanted["schedule"] and ours["head"] == wanted["head"]
        condition = ours["backbone"].pop("condition")
        assert condition == "class"
        assert ours["backbone"] == {k: v for k, v in wanted["backbone"].items() if k != "remat"}
        assert ours["sampling"]["guidance"]["scale"] == wanted["sampling"]["guidance"]["scale"]


def var_shapes(size: str) -> tuple[Shapes, Part, dict[str, Any]]:
    """(official shapes, our part, sections) of a VAR from its widths alone."""
    depth = int(size[1:3])
    width = 64 * depth
    config = load("configs/imagenet256/var.py").get_config("d16").to_dict()
    backbone = config["backbone"] | dict(width=width, depth=depth, heads=depth, drop_path=0.0)
    if size == "d36-s":
        backbone["modulation"] = "shared"
        scales = var.SCALES[512]
        config["schedule"]["scales"] = config["tokenizer"]["scales"] = scales
        config["tokenizer"]["autoencoder"]["image_size"] = 512
    config["backbone"] = backbone
    part = var.generator_part(config)
    return release_shapes(part, empty_params(config, "generator")), part, config


@pytest.mark.parametrize("size", some_of(VAR_SIZES, slow=("d20", "d24", "d30", "d36", "d36-s")))
def test_var_transformers(size):
    parameters, tensors = VAR_SIZES[size]
    shapes, part, config = var_shapes(size)
    assert count(shapes) == parameters
    assert len(shapes) + len(part.buffers) == tensors
    # What the shapes tell is what they were made of.
    read = var.generator(shapes, {})
    assert read.section["schedule"]["scales"] == tuple(config["schedule"]["scales"])
    for name, value in read.section["backbone"].items():
        if name not in ("drop_path", "logit_scale", "mlp_hidden"):
            assert config["backbone"][name] == value, name
    assert shapes_of(read, "generator", tokenizer=config["tokenizer"]) == shapes


def test_var_tokenizer():
    config = load("configs/imagenet256/tokenizer_multiscale.py").get_config().to_dict()
    part = var.tokenizer_part(config)
    shapes = release_shapes(part, empty_params(config, "tokenizer"))
    counts = count(shapes), len(shapes) + len(part.buffers)
    assert counts == sizes_of("var")["tokenizer"].counts
    assert list(part.buffers) == ["quantize.ema_vocab_hit_SV"]
    for size in (256, 512):
        read = var.tokenizer(shapes, {"image_size": size}).section["tokenizer"]
        assert read["scales"] == var.SCALES[size]
        fields = config["tokenizer"]["autoencoder"] | {"image_size": size}
        assert read["autoencoder"] == fields
