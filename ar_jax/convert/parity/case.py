"""A golden case: recorded arrays of the official code, and its weights, which are regenerated.

A case is a folder: spec.json says how every official tensor is regenerated, io.npz holds inputs and
what the official code computed of them, README.md how far its own float32 is from float64.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert.part import Part, to_params

Measured = tuple[float, float]  # largest absolute difference, relative norm


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder.

    Attributes:
        name: the folder, for messages.
        spec: spec.json.
        io: name -> array of io.npz.
        measured: name or pattern -> float32-against-float64 difference of the official code.
        selected: name -> which part of the whole array was recorded, where the README says.
    """

    name: str
    spec: dict[str, Any]
    io: dict[str, np.ndarray]
    measured: dict[str, Measured]
    selected: dict[str, tuple[slice, ...]]

    @classmethod
    def load(cls, folder: str | Path) -> Case:
        """Reads a case; without a README nothing is known to be measured.

        Raises:
            ValueError: names the file that is missing.
        """
        folder = Path(folder)
        for name in ("spec.json", "io.npz"):
            if not (folder / name).exists():
                raise ValueError(f"{folder / name} does not exist: {folder} is no golden case")
        spec = json.loads((folder / "spec.json").read_text(encoding="utf-8"))
        with np.load(folder / "io.npz") as stored:
            io = {key: stored[key] for key in stored.files}
        path = folder / "README.md"
        readme = path.read_text(encoding="utf-8") if path.exists() else ""
        return cls(str(folder), spec, io, read_measured(readme), read_selected(readme))

    def __getitem__(self, name: str) -> np.ndarray:
        return self.io[name]

    def tensors(self, part: str) -> list[dict[str, Any]]:
        """Entries of a sub-model's state_dict, buffers included: key, shape, dtype, kind, ..."""
        if "tensors" in self.spec:
            return self.spec["tensors"][part]
        return self.spec[part]["tensors"]

    def state_dict(self, part: str) -> dict[str, np.ndarray]:
        """The official parameters of a sub-model, without its buffers, which carry no values."""
        return {t["key"]: regenerate(t) for t in self.tensors(part) if t["kind"] == "param"}

    def keys(self, part: str) -> list[str]:
        """All keys of a sub-model's state_dict, buffers included."""
        return [tensor["key"] for tensor in self.tensors(part)]

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Official key -> shape, buffers included."""
        return {tensor["key"]: tuple(tensor["shape"]) for tensor in self.tensors(part)}

    def params(self, name: str, part: Part, expected: Any) -> Any:
        """Our parameters of a sub-model's regenerated tensors, as a converter makes them.

        Raises:
            ValueError: a parameter or buffer of the case has no place in ours, or the reverse.
        """
        for tensor in self.tensors(name):
            if tensor["kind"] != "param" and tensor["key"] not in part.buffers:
                raise ValueError(f"{self.name}: buffer {tensor['key']!r} of {name} is not known")
        params = to_params(part, self.state_dict(name), expected, f"{self.name} {name}")
        return jax.tree.map(jnp.asarray, params)

    def select(self, name: str, whole: Any) -> np.ndarray:
        """The part of an array that was recorded under ``name``."""
        whole = np.asarray(whole)
        recorded = self.io.get(name, whole)
        if whole.shape == recorded.shape or name not in self.selected:
            return whole
        return whole[self.selected[name]]

    def measured_of(self, name: str) -> Measured | None:
        """What the README records for an array, under its name or a pattern with ``*``."""
        if name in self.measured:
            return self.measured[name]
        found = [p for p in self.measured if "*" in p and fnmatch.fnmatchcase(name, p)]
        return self.measured[max(found, key=len)] if found else None


def regenerate(tensor: Mapping[str, Any]) -> np.ndarray:
    """The rule of the cases' README: float32 of seeded normal draws."""
    normal = np.random.RandomState(tensor["seed"]).standard_normal(tensor["shape"])
    return (tensor["mean"] + tensor["std"] * normal).astype(np.float32)


_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def read_measured(readme: str) -> dict[str, Measured]:
    """Differences in the tables of a case's README: 'a / r' in a cell, or in two cells."""
    found = {}
    for line in readme.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|") or len(cells) < 3:
            continue
        name = cells[0].strip("`")
        together = [re.fullmatch(rf"({_NUMBER}) / ({_NUMBER})", cell) for cell in cells[1:]]
        pair = next((match.groups() for match in together if match), None)
        if pair is None and all(re.fullmatch(_NUMBER, cell) for cell in cells[1:3]):
            pair = (cells[1], cells[2])
        if pair is not None:
            found[name] = (float(pair[0]), float(pair[1]))
    return found


def read_selected(readme: str) -> dict[str, tuple[slice, ...]]:
    """Rows of a README's tables that say ``[::4, :8]`` in their text: name -> those slices."""
    found = {}
    for line in readme.splitlines():
        cells = line.strip().strip("|").split("|")
        said = re.search(r"`\[([\d:, ]*:[\d:, ]*)\]`", "|".join(cells[1:]))
        if line.startswith("|") and said:
            axes = [axis.strip().split(":") for axis in said[1].split(",")]
            found[cells[0].strip().strip("`")] = tuple(
                slice(*[int(edge) if edge else None for edge in axis]) for axis in axes
            )
    return found
