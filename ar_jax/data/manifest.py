"""Directories that are written once: meta.json comes last, so its presence means complete."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

META = "meta.json"
UNFINISHED = "unfinished.json"  # there while a data set is written that can be gone on with


def start(directory: str | os.PathLike[str], plan: Mapping[str, Any] | None = None) -> pathlib.Path:
    """Makes the directory. ValueError if it already holds anything: nothing is overwritten.

    Args:
        plan: all that decides what is written, as JSON. A directory that holds an unfinished data
            set of the same plan will do as well; of another one, the error names what differs.
    """
    path = pathlib.Path(directory)
    if (path / META).exists():
        raise ValueError(f"{path}: already holds a finished data set; choose another directory")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        if plan is None or not (path / UNFINISHED).is_file():
            raise ValueError(
                f"{path}: is not an empty directory (an unfinished data set has no {META}); remove "
                "it or choose another"
            )
        _check_plan(path, plan)
        return path
    path.mkdir(parents=True, exist_ok=True)
    if plan is not None:
        _write(path / UNFINISHED, plan)
    return path


def finish(directory: pathlib.Path, meta: Mapping[str, Any]) -> None:
    """Writes meta.json in one atomic step."""
    _write(directory / META, meta)
    (directory / UNFINISHED).unlink(missing_ok=True)


def read(
    directory: pathlib.Path, form: str, types: Mapping[str, Any], *, older: Sequence[str] = ()
) -> dict[str, Any]:
    """Reads meta.json and checks its 'format', the types in `types` and the list of shards.

    Args:
        older: other formats that are read too.

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
    if not isinstance(meta, dict) or meta.get("format") not in (form, *older):
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


def _check_plan(directory: pathlib.Path, plan: Mapping[str, Any]) -> None:
    """Raises ValueError unless the unfinished data set was begun with ``plan``."""
    path = directory / UNFINISHED
    try:
        begun = _fields(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error}); remove {directory}") from error
    ours = _fields(json.loads(json.dumps(plan)))  # tuples are lists there
    for name in {**ours, **begun}:
        if begun.get(name) != ours.get(name):
            raise ValueError(
                f"{directory}: holds an unfinished data set of another {name}: "
                f"{begun.get(name)!r} there, {ours.get(name)!r} now; remove it or choose another "
                "directory"
            )


def _fields(plan: Mapping[str, Any]) -> dict[str, Any]:
    """'a' or 'a.b' -> value, so that a message names what differs and not all beside it."""
    fields: dict[str, Any] = {}
    for name, value in plan.items():
        within = value if isinstance(value, dict) else {}
        fields |= {f"{name}.{inner}": part for inner, part in within.items()} or {name: value}
    return fields


def _write(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
