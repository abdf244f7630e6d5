"""Converted models as directories, which everything takes as the workdir of a run."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections

from ar_jax.api import Params
from ar_jax.build import trains_tokenizer
from ar_jax.convert import weight_file
from ar_jax.convert.conversion import Converted
from ar_jax.convert.part import GENERATOR, TOKENIZER, empty_params, to_tensors
from ar_jax.convert.places import flat_leaves
from ar_jax.convert.release import Family
from ar_jax.io.checkpoint import (
    PARAMS,
    load_params,
    load_tree,
    save_tree,
)
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.io.run_info import read_config, record_run, write_parameter_table

STEP = 0  # of the checkpoint: nothing was trained here


def write_directory(converted: Converted, out: str | Path) -> None:
    """Writes config.json and the checkpoint of step 0, and a generator's tokenizer.

    The directory appears under its name when it is complete.

    Raises:
        ValueError: ``out`` exists.
    """
    out = Path(out)
    check_absent(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    if partial.exists():
        shutil.rmtree(partial)  # of a conversion that was killed
    params = dict(converted.params)
    try:
        if converted.kind == GENERATOR:
            save_tree(partial / TOKENIZER / PARAMS, params.pop(TOKENIZER))
        checkpoints = Checkpoints(partial, keep=1, copies=False)
        checkpoints.save(STEP, {PARAMS: params})
        checkpoints.close()
        record_run(ml_collections.ConfigDict(converted.config), partial)
        rows = [(path, leaf, "") for path, leaf in flat_leaves(params).items()]
        write_parameter_table(partial, rows)
        os.rename(partial, out)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def export_directory(
    family: Family,
    directory: str | Path,
    outs: Sequence[str | Path],
    which: str = "auto",
    step: int | None = None,
) -> list[str]:
    """Writes the official state_dicts of a run.

    Args:
        directory: a workdir, converted or trained.
        outs: the file of the transformer and, if wanted, that of its tokenizer; or of a tokenizer
            alone, where the run is one. The suffix says the format: a file of torch has the
            container that the official code looks into, safetensors are state_dicts.
        which, step: see `ar_jax.io.checkpoint.load_params`.

    Returns:
        What was written, a line a file.

    Raises:
        ValueError: a file exists, or the model is none that the family has.
    """
    config = read_config(directory)
    kinds = [TOKENIZER] if trains_tokenizer(config) else [GENERATOR, TOKENIZER]
    if not 1 <= len(outs) <= len(kinds):
        raise ValueError(
            f"{directory} holds a {kinds[0]}: name {' and '.join(kinds)}, at most {len(kinds)} "
            f"files, not {len(outs)}"
        )
    for out in outs:
        check_absent(Path(out))
        if Path(out).suffix not in (weight_file.SAFETENSORS, *weight_file.TORCH):
            raise ValueError(f"{out}: the suffix must be .safetensors or one of torch's, as .pth")
    lines = []
    for out, kind in zip(outs, kinds, strict=False):
        params = _params(config, directory, kind, kind == kinds[0], which, step)
        part = (family.tokenizer_part if kind == TOKENIZER else family.generator_part)(config)
        tensors = to_tensors(part, params)
        names = part.container if Path(out).suffix in weight_file.TORCH else ()
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        weight_file.write(out, dict.fromkeys(names, tensors) if names else tensors)
        count = sum(tensor.size for tensor in flat_leaves(params).values())
        under = f", under {' and '.join(map(repr, names))}" if names else ""
        lines.append(f"{out}: {kind}, {len(tensors)} tensors, {count:,} parameters{under}")
    return lines


def _params(
    config: Any, directory: str | Path, kind: str, trained: bool, which: str, step: int | None
) -> Params:
    if trained:
        params = load_params(directory, which, step)
    else:
        params = load_tree(Path(directory) / TOKENIZER / PARAMS)
    expected = empty_params(config, kind)
    if jax.tree.map(lambda leaf: leaf.shape, params) != jax.tree.map(lambda e: e.shape, expected):
        raise ValueError(
            f"{directory}: the saved parameters do not have the names and shapes of its config.json"
        )
    return params


def check_absent(path: Path) -> None:
    """Raises ValueError if something is there already."""
    if path.exists():
        raise ValueError(f"{path} exists already; name another, nothing is overwritten")
