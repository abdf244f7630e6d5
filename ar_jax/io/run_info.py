"""What a workdir says about its run: configuration, parameters, environment, revision.

``config.json`` is also the run's fingerprint: another configuration is refused the workdir.
"""

from __future__ import annotations

import json
import os
import platform
import pprint
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

CONFIG = "config.json"
CONFIG_PY = "config.py"
PARAMETERS = "parameters.txt"
ENVIRONMENT = "environment.jsonl"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

# Fields that change neither the parameters nor the data of a run: a restart may change them.
# Attention, workers and mesh are among them because a run may move to other machines.
MAY_CHANGE = (
    "train.log_every",
    "train.eval_every",
    "train.eval_batches",
    "train.preview_every",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.skip_damaged_checkpoints",
    "train.best_metric",
    "train.best_mode",
    "train.stuck_after_seconds",
    "train.max_bad_steps",
    "train.wandb",
    "data.num_workers",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.slices",
    "attention",
)


def config_dict(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain dicts, lists and scalars, references resolved."""
    resolved = config.to_dict() if isinstance(config, ml_collections.ConfigDict) else dict(config)
    return json.loads(json.dumps(resolved))


def read_config(workdir: str | Path) -> ml_collections.ConfigDict:
    """The resolved configuration of a run; sequences are tuples.

    Raises:
        ValueError: names the missing or damaged file.
    """
    path = Path(workdir) / CONFIG
    if not path.exists():
        raise ValueError(f"{path} does not exist: is {workdir} the --workdir of a training run?")
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    return ml_collections.ConfigDict(_tuples(saved))


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(entry) for key, entry in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def flat_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """'a.b.c' -> value of every field."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= {f"{key}.{name}": entry for name, entry in flat_fields(value).items()}
        else:
            flat[key] = value
    return flat


def differing_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """'config.a.b=1 (there: 2)' for every field that differs between two plain configurations."""
    mine, other = flat_fields(ours), flat_fields(theirs)
    absent = object()
    found = []
    for name in sorted(mine.keys() | other.keys()):
        here, there = mine.get(name, absent), other.get(name, absent)
        if here != there:
            shown = ["absent" if v is absent else repr(v) for v in (here, there)]
            found.append(f"config.{name}={shown[0]} (there: {shown[1]})")
    return found


def check_workdir(config: Mapping[str, Any], workdir: str | Path) -> None:
    """Refuses a workdir that holds another run, or is no path; writes nothing.

    Raises:
        ValueError: names every differing field, or the file that shows another program's run.
    """
    if "://" in str(workdir):
        raise ValueError(
            f"--workdir={workdir} is an address: name a directory, for several hosts one on a disk "
            "that all of them have mounted"
        )
    folder = Path(workdir)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--workdir={workdir} is a file; name a directory")
    if not (folder / CONFIG).exists():
        held = [name for name in ("checkpoints", "metrics.jsonl") if (folder / name).exists()]
        if held:
            raise ValueError(
                f"--workdir={workdir} holds {' and '.join(held)} but no {CONFIG}: it belongs to "
                "something else, use an empty directory"
            )
        return
    saved = config_dict(read_config(folder))
    ours = config_dict(config)
    changed = [
        text
        for text in differing_fields(ours, saved)
        if text.removeprefix("config.").partition("=")[0] not in MAY_CHANGE
    ]
    if changed:
        raise ValueError(
            f"--workdir={workdir} holds a run of another configuration: {'; '.join(changed)}. "
            "Use another --workdir, or the run's own values. Between restarts of one run only "
            f"these may change: {', '.join(f'config.{name}' for name in MAY_CHANGE)}"
        )


def record_run(config: Mapping[str, Any], workdir: str | Path) -> None:
    """Writes configuration and environment (process 0 only); call `check_workdir` first."""
    folder = Path(workdir)
    plain = config_dict(config)
    folder.mkdir(parents=True, exist_ok=True)
    _replace(folder / CONFIG, json.dumps(plain, indent=2) + "\n")
    literal = pprint.pformat(_tuples(plain), sort_dicts=False, width=96)
    _replace(
        folder / CONFIG_PY,
        '"""The resolved configuration of this run, as a file for --config."""\n\n'
        "from ml_collections import ConfigDict\n\n\n"
        f"def get_config():\n    return ConfigDict(\n{_indent(literal, 8)}\n    )\n",
    )
    with (folder / ENVIRONMENT).open("a", encoding="utf-8") as file:
        file.write(json.dumps(environment()) + "\n")


def _indent(text: str, columns: int) -> str:
    return "\n".join(" " * columns + line for line in text.splitlines())


def _replace(path: Path, text: str) -> None:
    """Writes all or nothing, whenever the process is killed."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def environment() -> dict[str, Any]:
    """Command, versions, devices and source revision of this process."""
    devices = jax.devices()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "revision": git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
        "processes": jax.process_count(),
    }


def git_revision(source: str | Path = __file__) -> dict[str, Any] | None:
    """{'commit', 'dirty'} of the repository that tracks ``source``; None if none does."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(Path(source).parent), *arguments),
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
        ).stdout.strip()

    try:
        # An installed package may lie inside some other repository's folder.
        git("ls-files", "--error-unmatch", Path(source).name)
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (subprocess.SubprocessError, OSError):
        return None


def parameter_table(rows: Sequence[tuple[str, Any, str]]) -> str:
    """A table of (name, array or ShapeDtypeStruct, note) and the total count."""
    cells = [("parameter", "shape", "type", "count", "note")]
    total = 0
    for name, leaf, note in rows:
        count = int(np.prod(leaf.shape, dtype=np.int64))
        total += count
        cells.append((name, str(tuple(leaf.shape)), str(leaf.dtype), f"{count:,}", note))
    cells.append(("total", "", "", f"{total:,}", ""))
    widths = [max(len(row[i]) for row in cells) for i in range(5)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i == 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def write_parameter_table(workdir: str | Path, rows: Sequence[tuple[str, Any, str]]) -> str:
    """Writes `parameter_table` into the workdir and returns it."""
    table = parameter_table(rows)
    _replace(Path(workdir) / PARAMETERS, table + "\n")
    return table
