"""Reading checkpoints and trees: all that knows orbax, but for `run_checkpoints`, which writes.

A run's checkpoints lie in ``workdir/checkpoints/<step>/``, each with the parts

    params   parameters
    ema      their running mean, where the run keeps one
    state    everything else that training needs: optimiser, codebook statistics, counters
    data     the position of the data iterator, one file a process

so that whoever samples or evaluates loads parameters without knowing the optimiser. A part is
written beside its final place and renamed, so a killed process leaves no half checkpoint. One that
was damaged later lies in ``<step>.damaged`` once training went back from it; nothing deletes that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from ar_jax.io.checkpoint_health import (
    CHECKSUMS,
    DamagedCheckpoint,
    recorded_checksums,
    recorded_parts,
)
from ar_jax.io.checksums import find_change, tree_checksums

FOLDER = "checkpoints"
DATA = "data"
STATE = "state"
# A generator's workdir keeps its tokenizer in TOKENIZER/PARAMS.
TOKENIZER = "tokenizer"
PARAMS = "params"


def list_steps(workdir: epath.PathLike) -> list[int]:
    """Steps with a complete checkpoint in ``workdir``, ascending; writes nothing."""
    directory = epath.Path(workdir).absolute() / FOLDER
    if not directory.exists():
        return []
    names = [child.name for child in directory.iterdir() if child.name.isdigit()]
    return sorted(int(name) for name in names if ocp.is_orbax_checkpoint(directory / name))


def load_params(
    workdir: epath.PathLike,
    which: str = "ema",
    step: int | None = None,
    sharding: jax.sharding.Sharding | Mapping[str, jax.sharding.Sharding] | None = None,
) -> dict[str, Any]:
    """Parameters of a run, as saved: a dict tree of float32 arrays.

    Args:
        workdir: of the training run.
        which: 'ema', 'params', or 'auto': the EMA if the run keeps one, else the parameters.
        step: None for the newest.
        sharding: of every array, or 'a/b/c' -> that of one; arrays without one are put on the
            first device.

    Raises:
        ValueError: no such checkpoint, or the run keeps no EMA; says which there are.
        DamagedCheckpoint: arrays that are not what was saved; names them and the checkpoint.
    """
    path, part = _find_params(workdir, which, step)
    params = _load(path, part, None, sharding)
    _check_values(path, {part: params})
    return params


def params_shapes(workdir: epath.PathLike, which: str = "auto") -> dict[str, tuple[int, ...]]:
    """'a/b/c' -> shape of what `load_params` loads from the newest checkpoint."""
    path, part = _find_params(workdir, which, None)
    return _shapes(ocp.metadata(path, checkpointable_name=part).metadata)


def holds_only_params(workdir: epath.PathLike) -> bool:
    """Whether the newest checkpoint cannot be trained on from: a converted one has no state."""
    steps = list_steps(workdir)
    if not steps:
        return False
    newest = epath.Path(workdir).absolute() / FOLDER / str(steps[-1])
    parts = {child.name for child in newest.iterdir()} | (recorded_parts(newest) or set())
    return PARAMS in parts and not parts & {STATE, DATA}  # a damaged one has lost no state


def _find_params(workdir: epath.PathLike, which: str, step: int | None) -> tuple[epath.Path, str]:
    """The checkpoint, and its part 'params' or 'ema'."""
    if which not in ("ema", "params", "auto"):
        raise ValueError(f"which={which!r} is none of 'ema', 'params', 'auto'")
    steps = list_steps(workdir)
    if not steps:
        raise ValueError(
            f"{epath.Path(workdir) / FOLDER} holds no checkpoint: is {workdir} the --workdir of a "
            "training run?"
        )
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise ValueError(f"{workdir} has no checkpoint of step {step}; there are {steps}")
    path = epath.Path(workdir).absolute() / FOLDER / str(step)
    parts = {child.name for child in path.iterdir() if child.is_dir()}
    if which == "auto":
        which = "ema" if "ema" in parts else "params"
    if which not in parts:
        raise ValueError(
            f"{path} holds no {which!r}: the run had config.ema.decay=0. Load which='params'"
        )
    return path, which


def save_tree(path: epath.PathLike, tree: Any, metadata: dict[str, Any] | None = None) -> None:
    """Writes one pytree of arrays to the new directory ``path``, with JSON metadata beside it.

    A tree without arrays is an empty directory.

    Raises:
        ValueError: ``path`` exists.
    """
    target = epath.Path(path).absolute()
    if not jax.tree.leaves(tree):
        target.mkdir(parents=True, exist_ok=True)  # by all processes at once
        return
    if target.exists():
        raise ValueError(f"{path} exists already; it is not overwritten")
    sums = tree_checksums(tree)
    beside = {**(metadata or {}), **({CHECKSUMS: sums} if sums else {})}
    with without_copies():  # nothing changes the arrays meanwhile
        ocp.save(target, tree, custom_metadata=beside)


def load_tree(
    path: epath.PathLike, abstract: Any = None, sharding: jax.sharding.Sharding | None = None
) -> Any:
    """Reads what `save_tree` wrote.

    Args:
        abstract: pytree of ShapeDtypeStructs to fill; None: what is there, as nested dicts.
        sharding: of every array if ``abstract`` is None; None puts them on the first device.

    Raises:
        ValueError: ``path`` holds no tree, or one with other entries or shapes; names them.
        DamagedCheckpoint: arrays that are not what was saved; names them.
    """
    target = epath.Path(path).absolute()
    empty = target.is_dir() and not any(target.iterdir())
    if empty and not jax.tree.leaves(abstract):
        return {}
    if empty or not target.exists() or not ocp.is_orbax_checkpoint(target):
        raise ValueError(f"{path} holds no saved parameters")
    tree = _load(target, None, abstract, sharding)
    _check_values(target, tree)
    return tree


def tree_metadata(path: epath.PathLike) -> dict[str, Any]:
    """The JSON metadata given to `save_tree`; {} if none was."""
    found = dict(ocp.metadata(epath.Path(path).absolute()).custom_metadata or {})
    return {name: value for name, value in found.items() if name != CHECKSUMS}


def load_system_params(
    workdir: epath.PathLike,
    which: str = "auto",
    step: int | None = None,
    sharding: jax.sharding.Sharding | None = None,
) -> dict[str, Any]:
    """A generator's parameters with those of the tokenizer kept in its workdir.

    Args: as of `load_params`.

    Returns:
        ``{'tokenizer': ..., 'backbone': ..., 'head': ...}``.

    Raises:
        ValueError: names the directory that holds no generator, or no such checkpoint.
        DamagedCheckpoint: as of `load_params`.
    """
    params = load_params(workdir, which, step, sharding)
    folder = epath.Path(workdir) / TOKENIZER
    if not folder.exists():
        raise ValueError(f"{folder} does not exist: {workdir} is no generator's workdir")
    return {"tokenizer": load_tree(folder / PARAMS, sharding=sharding), **params}


def tree_digest(tree: Any) -> str:
    """A fingerprint of names, shapes and values of a pytree of arrays."""
    digest = hashlib.sha256()
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    for path, leaf in sorted(leaves, key=lambda pair: _name(pair[0])):
        value = np.ascontiguousarray(jax.device_get(leaf))
        digest.update(f"{_name(path)} {value.dtype} {value.shape} ".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _load(path: epath.Path, part: str | None, abstract: Any, sharding: Any) -> Any:
    named = {} if part is None else {"checkpointable_name": part}
    if abstract is None:
        first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        places = sharding if isinstance(sharding, Mapping) else {}
        rest = first if sharding is None or isinstance(sharding, Mapping) else sharding
        abstract = jax.tree_util.tree_map_with_path(
            lambda name, saved: jax.ShapeDtypeStruct(
                saved.shape, saved.dtype, sharding=places.get(_name(name), rest)
            ),
            ocp.metadata(path, **named).metadata,
        )
    else:
        check_entries(path, part, abstract)
    return ocp.load(path, abstract, **named)


def _check_values(path: epath.Path, loaded: Any) -> None:
    """Raises DamagedCheckpoint where arrays were read without an error, but not as they were saved.

    Parts that were saved without checksums, as earlier versions did, say nothing.
    """
    saved = recorded_checksums(path)
    if saved and (change := find_change(saved, tree_checksums(loaded))):
        raise DamagedCheckpoint(f"{path} is damaged: {change}")


def without_copies() -> ocp.Context:
    """Writes arrays from where they lie.

    Neither copied first nor compressed: compressed, all leaves wait in memory for the last one, and
    `write_concurrent_bytes` does not bound that for numpy arrays. float32 weights would shrink by
    less than a tenth.
    """
    context = ocp.Context()
    context.memory.deepcopy_host_arrays = False
    context.array.saving.use_compression = False
    return context


def check_entries(path: epath.Path, part: str | None, abstract: Any) -> None:
    """Compares names and shapes before orbax reads anything: its own message names neither file."""
    named = {} if part is None else {"checkpointable_name": part}
    where = path if part is None else path / part
    if not where.exists():
        raise ValueError(f"{path} holds no part {part!r}: another program or version wrote it")
    saved = _shapes(ocp.metadata(path, **named).metadata)
    wanted = _shapes(abstract)
    problems = [f"{name} is missing" for name in wanted if name not in saved]
    problems += [f"{name} is not expected" for name in saved if name not in wanted]
    problems += [
        f"{name} has shape {saved[name]}, expected {shape}"
        for name, shape in wanted.items()
        if name in saved and saved[name] != shape
    ]
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise ValueError(f"{where} does not fit this model: {shown}")


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {
        _name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
