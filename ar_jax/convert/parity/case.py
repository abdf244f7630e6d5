"""A golden case: recorded arrays of the official code, and its weights, which are regenerated.

A case is a folder: spec.json says how every official tensor is regenerated, io.npz holds inputs and
what the official code computed of them, README.md how far its own float32 is from float64.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert.part import Part, to_params

Measured = tuple[float, float]  # largest absolute difference, relative norm
Selection = tuple[slice | int, ...]


@dataclasses.dataclass(frozen=True)
class Case:
    """One folder.

    Attributes:
        name: the folder, for messages.
        spec: spec.json.
        io: name -> array of io.npz.
        measured: name or pattern -> float32-against-float64 difference of the official code.
        selected: name or pattern -> which part of the whole array was recorded, where the README
            says.
        roles: name or pattern -> 'in' or 'out', where the README has a column 'role'.
    """

    name: str
    spec: dict[str, Any]
    io: dict[str, np.ndarray]
    measured: dict[str, Measured]
    selected: dict[str, Selection]
    roles: dict[str, str]

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
        tables = read_measured(readme), read_selected(readme), read_roles(readme)
        return cls(str(folder), spec, io, *tables)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.io:
            raise ValueError(f"{self.name}: io.npz has no {name!r}")
        return self.io[name]

    def names(self, pattern: str) -> list[tuple[str, re.Match[str]]]:
        """Names in io.npz that a regular expression matches as a whole, and how."""
        found = ((name, re.fullmatch(pattern, name)) for name in self.io)
        return [(name, match) for name, match in found if match]

    def config(self, section: str) -> dict[str, Any]:
        """A section of the official arguments in spec.json; raises ValueError if there is none."""
        sections = self.spec.get("config", {})
        if section not in sections:
            raise ValueError(f"{self.name}: spec.json has no config.{section}, only {[*sections]}")
        return sections[section]

    def tensors(self, part: str) -> list[dict[str, Any]]:
        """Entries of a sub-model's state_dict, buffers included: key, shape, dtype, kind, ..."""
        held = self.spec.get("tensors", {}).get(part, self.spec.get(part, {}).get("tensors"))
        if held is None:
            raise ValueError(f"{self.name}: spec.json has no tensors of {part!r}")
        return held

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
        """The part of an array that was recorded under ``name``, if the README says which."""
        whole = np.asarray(whole)
        part = _of(self.selected, name)
        if part is None or name not in self.io or whole.shape == self.io[name].shape:
            return whole
        return whole[part] if len(part) <= whole.ndim else whole

    def measured_of(self, name: str) -> Measured | None:
        """What the README records for an array, under its name or a pattern with ``*``."""
        return _of(self.measured, name)

    def role_of(self, name: str) -> str | None:
        """What the README calls an array: 'in', 'out' or, if it does not, None."""
        return _of(self.roles, name)


def _of(table: Mapping[str, Any], name: str) -> Any:
    """What a table has under a name, else under the longest pattern that fits, else None."""
    if name in table:
        return table[name]
    found = [p for p in table if "*" in p and fnmatch.fnmatchcase(name, p)]
    return table[max(found, key=len)] if found else None


def regenerate(tensor: Mapping[str, Any]) -> np.ndarray:
    """The rule of the cases' README: float32 of seeded normal draws."""
    normal = np.random.RandomState(tensor["seed"]).standard_normal(tensor["shape"])
    return (tensor["mean"] + tensor["std"] * normal).astype(np.float32)


_NUMBER = r"\d+(?:\.\d+)?(?:e[+-]?\d+)?"


def read_measured(readme: str) -> dict[str, Measured]:
    """Differences in the tables of a case's README: 'a / r' in a cell, or in two cells."""
    found = {}
    for name, cells in _rows(readme):
        together = [re.fullmatch(rf"({_NUMBER}) / ({_NUMBER})", cell) for cell in cells]
        pair = next((match.groups() for match in together if match), None)
        if pair is None and len(cells) > 1 and all(re.fullmatch(_NUMBER, c) for c in cells[:2]):
            pair = (cells[0], cells[1])
        if pair is not None:
            found[name] = (float(pair[0]), float(pair[1]))
    return found


def read_selected(readme: str) -> dict[str, Selection]:
    """Rows of a README's tables that say ``[::4, :8]`` in their text: name -> those slices."""
    found = {}
    for name, cells in _rows(readme):
        if said := re.search(r"`\[([\d:, ]*:[\d:, ]*)\]`", "|".join(cells)):
            found[name] = tuple(map(_index, said[1].split(",")))
    return found


def read_roles(readme: str) -> dict[str, str]:
    """Rows of a README's tables whose second cell is 'in' or 'out'."""
    return {name: cells[0] for name, cells in _rows(readme) if cells[0] in ("in", "out")}


def _rows(readme: str) -> Iterator[tuple[str, list[str]]]:
    """(first cell without backticks, the others) of every row of a table."""
    for line in readme.splitlines():
        name, *cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if line.startswith("|") and cells:
            yield name.strip("`"), cells


def _index(axis: str) -> slice | int:
    """'3', ':8' or '::4' as an index."""
    first, *others = axis.strip().split(":")
    if not others:
        return int(first)
    return slice(*[int(edge) if edge else None for edge in (first, *others)])
