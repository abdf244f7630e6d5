"""What files cannot say is asked for, and what is said is taken or refused, never passed over."""

from __future__ import annotations

import pytest

from ar_jax.convert import mar, var
from ar_jax.convert.parity.case import Case
from ar_jax.convert.part import empty_params, release_shapes
from tests.config_files import load
from tests.converted_cases import GOLDEN


def official_shapes(family: str, size: str) -> dict[str, tuple[int, ...]]:
    """Of a generator of configs/imagenet256."""
    config = load(f"configs/imagenet256/{family}.py").get_config(size).to_dict()
    part = {"var": var, "mar": mar}[family].generator_part(config)
    return release_shapes(part, empty_params(config, "generator"))


def test_heads_of_var_without_cosine_attention_are_official_or_asked_for():
    shapes = Case.load(GOLDEN / "var/tiny_b").shapes("transformer")
    options = {"scales": (1, 2, 4)}
    with pytest.raises(ValueError, match="3 blocks of width 192 are no official .*--heads=N"):
        var.generator(shapes, options)
    assert var.generator(shapes, options | {"heads": 6}).section["backbone"]["heads"] == 6
    released = official_shapes("var", "d16")
    plain = {key: shape for key, shape in released.items() if "scale_mul" not in key}
    read = var.generator(plain, {}).section["backbone"]
    assert (read["heads"], read["qk_norm"]) == (16, "none")


def test_heads_of_mar_are_official_or_asked_for():
    shapes = Case.load(GOLDEN / "mar/tiny").shapes("mar")
    with pytest.raises(ValueError, match="2 blocks of width 32 are no official .*--heads=N"):
        mar.generator(shapes, {})
    with pytest.raises(ValueError, match="2 blocks of width 48 .*--option=decoder_heads=N"):
        mar.generator(shapes, {"heads": 4})
    read = mar.generator(shapes, {"heads": 4, "decoder_heads": 6}).section["backbone"]
    assert (read["heads"], read["decoder_heads"]) == (4, 6)
