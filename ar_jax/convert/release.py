"""The families whose official releases are read and written.

A family is a module of this folder with

    def tokenizer(shapes, options) -> Part       the part that official tensors of these shapes are
    def generator(shapes, options, tensors) -> Part
    def tokenizer_part(config) -> Part           the part of a configuration of ours (for export)
    def generator_part(config) -> Part
    def unwrap_tokenizer(container) -> tensors   the state_dict inside a checkpoint's container
    def unwrap_generator(container) -> tensors

One whose tokenizer has no tensors says so in NO_TOKENIZER.

``options`` is what the tensors cannot say. Where both speak they must agree. The tensors themselves
are there for the families in which a buffer's numbers say a size; without them the shapes speak.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from ar_jax.convert import arpg, ear, fractal, infinity, llamagen, mar, par, randar, rar, var, xar
from ar_jax.convert.part import Part
from ar_jax.convert.places import Shape, Tensors


class Family(Protocol):
    """See above."""

    def tokenizer(self, shapes: Mapping[str, Shape], options: Mapping[str, Any], /) -> Part:
        """Of a file."""
        ...

    def generator(
        self, shapes: Mapping[str, Shape], options: Mapping[str, Any], tensors: Tensors | None, /
    ) -> Part:
        """Of a file."""
        ...

    def tokenizer_part(self, config: Mapping[str, Any]) -> Part:
        """Of the section 'tokenizer'."""
        ...

    def generator_part(self, config: Mapping[str, Any]) -> Part:
        """Of the sections 'tokenizer', 'schedule', 'backbone' and 'head'."""
        ...

    def unwrap_tokenizer(self, container: Mapping[str, Any]) -> Tensors:
        """Of what a file holds."""
        ...

    def unwrap_generator(self, container: Mapping[str, Any]) -> Tensors:
        """Of what a file holds."""
        ...


FAMILIES: dict[str, Family] = {
    "var": var,
    "llamagen": llamagen,
    "mar": mar,
    "ear": ear,
    "rar": rar,
    "randar": randar,
    "arpg": arpg,
    "par": par,
    "infinity": infinity,
    "xar": xar,
    "fractal": fractal,
}


def choose(name: str) -> Family:
    """The family of a name.

    Raises:
        ValueError: there is none; names those there are.
    """
    if name not in FAMILIES:
        raise ValueError(f"family {name!r} is none of {', '.join(FAMILIES)}")
    return FAMILIES[name]
