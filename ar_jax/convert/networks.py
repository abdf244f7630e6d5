"""Networks that images are judged with: official files to one file of ours.

A family is a module of this folder with

    def unwrap(container) -> tensors     the state_dict inside a file
    def network(shapes) -> Part          the part that tensors of these shapes are
    def expected(part) -> shapes         of our parameters
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ar_jax.convert import inception, lpips, weight_file
from ar_jax.convert.part import Part, shapes_of, to_params
from ar_jax.convert.places import Shape, Tensors
from ar_jax.io.network_file import FAMILY, write_network


class NetworkFamily(Protocol):
    """See above."""

    def unwrap(self, container: Any, /) -> Tensors:
        """Of what a file holds."""
        ...

    def network(self, shapes: Mapping[str, Shape], /) -> Part:
        """Of all files together."""
        ...

    def expected(self, part: Part, /) -> Any:
        """ShapeDtypeStructs."""
        ...


NETWORK_FAMILIES: dict[str, NetworkFamily] = {"lpips": lpips, "inception": inception}


def convert_network(name: str, files: Sequence[str | Path], out: str | Path) -> Any:
    """Writes the network of official files to ``out``, an .npz; returns its parameters.

    Args:
        name: of the family.
        files: which together have every tensor: lpips takes torchvision's backbone and the linear
            layers, inception one file.

    Raises:
        ValueError: names the file or files, and the key that is wrong, or ``out``, which exists.
        OSError: a file cannot be opened.
    """
    family = NETWORK_FAMILIES[name]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        container = weight_file.read(file)
        if not isinstance(container, Mapping):
            raise ValueError(f"{file}: it holds a {type(container).__name__}, not named tensors")
        for key, tensor in family.unwrap(container).items():
            if not isinstance(tensor, np.ndarray):
                raise ValueError(f"{file}: {key!r} is a {type(tensor).__name__}, not a tensor")
            if key in tensors:
                raise ValueError(f"{file}: {key!r} is in another of the files too")
            tensors[key] = tensor
    source = " and ".join(map(str, files))
    try:
        part = family.network(shapes_of(tensors))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    params = to_params(part, tensors, family.expected(part), source)
    about = {FAMILY: name, **part.section, "files": {Path(f).name: _sha256(f) for f in files}}
    write_network(out, params, about)
    return params


def _sha256(file: str | Path) -> str:
    with Path(file).open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
