"""What is wrong with a checkpoint or a save, told without orbax and agreed on by all processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

RECORD = "_CHECKPOINT_METADATA"  # of the whole checkpoint; lists its parts
CHECKSUMS = "checksums"  # in its metadata: 'part/a/b' -> [dtype, sum], see `checksums`
ENTRIES = "_METADATA"  # of a part of arrays; lists them
PLACES = "_sharding"
MANIFEST = "manifest.ocdbt"
MESSAGE_BYTES = 1024


class DamagedCheckpoint(ValueError):
    """A checkpoint was written whole and cannot be read as it was; it says what is wrong."""


class SaveFailed(RuntimeError):
    """The newest state of a run is not on disk, for want of space as a rule."""


def find_damage(path: epath.Path, parts: Iterable[str], data: str | None = None) -> str | None:
    """What is missing or no JSON in the checkpoint ``path``; None: nothing at first sight.

    Arrays are not read. A part that the checkpoint never had is no damage.

    Args:
        parts: names of those parts, of arrays, that are wanted.
        data: the part with the data positions, where it is wanted too.
    """
    recorded = recorded_parts(path)
    for name in (*parts, *([data] if data else ())):
        if not (path / name).exists():
            if recorded is None:
                return f"{name}/ is missing, and {RECORD} cannot be read"
            if name in recorded:
                return f"{name}/ is missing, which {RECORD} lists"
        elif problem := _data_damage(path / name) if name == data else _arrays_damage(path / name):
            return f"{name}/{problem}"
    return None


def recorded_parts(path: epath.Path) -> set[str] | None:
    """Names of the parts that ``path`` was saved with; None: its record is not there or damaged."""
    record = _read_json(path / RECORD)
    handlers = record.get("item_handlers") if isinstance(record, dict) else None
    return set(handlers) if isinstance(handlers, dict) else None


def recorded_checksums(path: epath.Path) -> dict[str, Any]:
    """'part/a/b' -> [dtype, sum] of arrays of ``path``; {}: saved without, or no record to read."""
    record = _read_json(path / RECORD)
    metadata = record.get("custom_metadata") if isinstance(record, dict) else None
    found = metadata.get(CHECKSUMS) if isinstance(metadata, dict) else None
    return found if isinstance(found, dict) else {}


def restore_data(folder: epath.Path, data: Any) -> bool:
    """Sets ``data`` from a checkpoint of another number of processes; False if it is of this one.

    Grain saves one file a process and looks for its own. Where all files say the same the position
    is the whole job's, and goes for any number of processes.

    Raises:
        ValueError: the files differ.
    """
    if (folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json").exists():
        return False
    states = [path.read_text() for path in sorted(folder.glob("process_*-of-*.json"))]
    if len(set(states)) != 1:
        raise ValueError(
            f"{folder} holds the data positions of {len(states)} processes, which differ: go on "
            f"with that number of processes, not {jax.process_count()}"
        )
    data.set_state(json.loads(states[0]))
    return True


def root_cause(error: BaseException) -> BaseException:
    """The error that was raised first: orbax's own says only which of its handlers failed."""
    seen = [error]
    while (before := seen[-1].__cause__ or seen[-1].__context__) is not None and before not in seen:
        seen.append(before)
    return seen[-1]


def first_line(error: BaseException) -> str:
    """Type and first line of an error, short enough for a log: tensorstore's run over pages."""
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:400]}"


def free_space(directory: epath.Path) -> str:
    """Free bytes where ``directory`` lies, in words; a bucket does not say."""
    try:
        return f"{shutil.disk_usage(directory).free:,} bytes are free there"
    except OSError:
        return "how much is free there is not known"


def first_of_all(message: str) -> str:
    """The first process's message that is not empty; '' if all are. All processes call it together.

    What one process met, all must act on: those that went another way would wait for ever.
    """
    if jax.process_count() == 1:
        return message
    text = message.encode()[:MESSAGE_BYTES]
    row = np.zeros(MESSAGE_BYTES, np.uint8)
    row[: len(text)] = np.frombuffer(text, np.uint8)
    rows = np.asarray(multihost_utils.process_allgather(row))
    texts = [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]
    return next((text for text in texts if text), "")


def free_name(path: epath.Path) -> epath.Path:
    """``path`` with '.damaged', or '.damaged.2' and so on, that does not exist yet."""
    number, target = 1, path.with_name(f"{path.name}.damaged")
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged.{number}")
    return target


def _arrays_damage(folder: epath.Path) -> str | None:
    if not isinstance(_read_json(folder / ENTRIES), dict):
        return f"{ENTRIES} is missing or no JSON"
    if (folder / PLACES).exists() and _read_json(folder / PLACES) is None:
        return f"{PLACES} is no JSON"
    if not (folder / MANIFEST).exists():
        return f"{MANIFEST} is missing"
    return None


def _data_damage(folder: epath.Path) -> str | None:
    """One file a process, all of them there; those that this process will read are JSON."""
    paths = sorted(folder.glob("process_*-of-*.json"))
    counts = {path.stem.rsplit("-", 1)[1] for path in paths}
    if len(counts) > 1 or str(len(paths)) not in counts:
        return (
            f"process_*.json: there are {len(paths)}, of {' and '.join(counts) or 'no'} processes"
        )
    own = folder / f"process_{jax.process_index()}-of-{jax.process_count()}.json"
    for path in [own] if own in paths else paths:
        if _read_json(path) is None:
            return f"{path.name} is no JSON"
    return None


def _read_json(path: epath.Path) -> Any:
    """What ``path`` holds; None if it is not there or no JSON."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
