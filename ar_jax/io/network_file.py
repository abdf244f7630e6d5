"""Files of networks that nobody trains here: one .npz with the parameters and what they are.

Its arrays are 'a/b/c' -> parameter, and ``about``, a JSON text: what the file was made of.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ABOUT = "about"
FAMILY = "family"


def write_network(path: str | Path, params: Any, about: Mapping[str, Any]) -> None:
    """Writes parameters, whole or not at all.

    Args:
        path: ends in .npz.
        params: nested dicts of arrays.
        about: plain values, of which 'family' is the kind of network.

    Raises:
        ValueError: another suffix, or the file exists.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"{path} must end in .npz")
    if path.exists():
        raise ValueError(f"{path} exists already; name another, nothing is overwritten")
    arrays = {ABOUT: np.array(json.dumps(dict(about))), **_flat(params)}
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def read_network(path: str | Path) -> tuple[dict[str, Any], Any]:
    """(about, parameters as nested dicts of float32 arrays); `about` is {} where a file has none.

    Raises:
        ValueError: there is no such file, or it is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    try:
        with path.open("rb") as file, np.load(file) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no .npz of arrays; experiments/convert.py makes one of official files"
        ) from error
    about = json.loads(str(arrays.pop(ABOUT))) if ABOUT in arrays else {}
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        *folders, leaf = name.split("/")
        node = params
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = array.astype(np.float32)
    return about, params


def check_network(path: str | Path, params: Any, expected: Any) -> None:
    """Raises ValueError that names the first parameter that is missing, surplus or misshapen."""
    found, wanted = _flat(params), _flat(expected)
    for name in sorted({*found, *wanted}):
        shapes = [flat[name].shape if name in flat else "none" for flat in (found, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{path}: {name!r} has the shape {shapes[0]}, expected {shapes[1]}")


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for name, branch in tree.items():
        flat |= _flat(branch, f"{prefix}/{name}" if prefix else name)
    return flat
