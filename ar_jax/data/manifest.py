"""Directories that are written once: meta.json comes last, so its presence means complete."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

META = "meta.json"


def start(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Makes the directory. ValueError if it already holds anything: nothing is overwritten."""
    path = pathlib.Path(directory)
    if (path / META).exists():
        raise ValueError(f"{path}: already holds a finished data set; choose another directory")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(
            f"{path}: is not an empty directory (an unfinished data set has no {META}); remove it "
            "or choose another"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def finish(directory: pathlib.Path, meta: Mapping[str, Any]) -> None:
    """Writes meta.json in one atomic step."""
    temporary = directory / f".{META}.tmp"
    temporary.write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, directory / META)


def read(directory: pathlib.Path, form: str, types: Mapping[str, Any]) -> dict[str, Any]:
    """Reads meta.json and checks its 'format', the types in `types` and the list of shards.

    Raises ValueError that names the file and what would be right.
    """
    path = directory / META
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such directory; expected a data set of format {form!r}")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(
            f"{path}: missing, so this is no data set of format {form!r}, or one whose writing was "
            "not finished; write it again"
        ) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); write it again") from error
    if not isinstance(meta, dict) or meta.get("format") != form:
        have = meta.get("format") if isinstance(meta, dict) else type(meta).__name__
        raise ValueError(f"{path}: format is {have!r}, expected {form!r}")
    for key, kind in types.items():
        # bool is an int in Python, but not here.
        if not isinstance(meta.get(key), kind) or isinstance(meta.get(key), bool):
            raise ValueError(
                f"{path}: {key} is {meta.get(key)!r}, expected {getattr(kind, '__name__', kind)}"
            )
    for shard in meta["shards"]:
        if not (isinstance(shard, list) and [type(x) for x in shard] == [str, int]):
            raise ValueError(
                f"{path}: shards holds {shard!r}, expected [file name, number of items]"
            )
    if sum(count for _, count in meta["shards"]) == 0:
        raise ValueError(f"{path}: shards lists no items; write it again")
    return meta
