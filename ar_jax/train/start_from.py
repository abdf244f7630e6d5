"""Starting a run from the parameters of another run, or of a converted release.

    config.init_from = dict(
        workdir="runs/var_d16",
        reinitialise=("backbone/condition/class_embed",),
        interpolate=("backbone/position", "backbone/scale_embed"),
    )

Every parameter is taken over as it is, which needs the same shape; or it is started anew
(``reinitialise``) or taken to another grid or list of scales (``interpolate``): these are named,
each by its path or by that of a folder above it. Of a table whose first rows shall stay, as of
RAR's, which holds codes and then classes, ``"PATH[1025:]"`` starts the rows from 1025 on anew.
Nothing is ever changed that is not named.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ar_jax.api import Objective, Params
from ar_jax.backbones.position_tables import position_tables, resample
from ar_jax.build import build_system, trains_tokenizer
from ar_jax.io.checkpoint import holds_only_params, list_steps, load_params, params_shapes
from ar_jax.io.run_info import read_config
from ar_jax.parallel.mesh import replicated
from ar_jax.parallel.rules import path_name
from ar_jax.train.fields import call_with
from ar_jax.train.program import Program
from ar_jax.train.state import init_params

log = logging.getLogger(__name__)

SECTION = "init_from"
TAKEN, REINITIALISED, INTERPOLATED = "taken over", "reinitialised", "interpolated"
LATER_ROWS = re.compile(r"(.+)\[(\d+):\]")
SHOWN = 8  # problems in one message

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitFrom:
    """``config.init_from``.

    Attributes:
        workdir: of a run of the same kind, or of a converted release; '': start anew.
        reinitialise: parameters, or their 'PATH[N:]', that start as they would in a new run of this
            seed, such as the class embedding for other classes.
        interpolate: position tables for another grid or list of scales; see
            `ar_jax.backbones.position_tables.resample`.
    """

    workdir: str = ""
    reinitialise: tuple[str, ...] = ()
    interpolate: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("reinitialise", "interpolate"):
            paths = getattr(self, name)
            if isinstance(paths, str):
                raise ValueError(f"config.init_from.{name}={paths!r} must be a tuple of paths")
            if paths and not self.workdir:
                raise ValueError(
                    f"config.init_from.{name}={tuple(paths)}, but config.init_from.workdir is "
                    "empty: a run that starts anew has nothing to change"
                )


def read_init_from(config: Mapping[str, Any]) -> InitFrom:
    """The section, which a configuration may leave out.

    Raises:
        ValueError: names the field.
    """
    return call_with(InitFrom, config.get(SECTION, {}), SECTION)


def initial_params(
    config: Mapping[str, Any], objective: Objective, program: Program, workdir: str | Path
) -> Params | None:
    """What a new run in ``workdir`` starts from, placed as the program wants it.

    Returns:
        None: there is a checkpoint to go on from, or nothing is named to start from.

    Raises:
        ValueError: ``config.init_from`` does not say what becomes of a parameter; names it, both
            shapes, and what to list. Or ``workdir`` is a converted model's.
    """
    if holds_only_params(workdir):
        raise ValueError(
            f"--workdir={workdir} holds parameters alone, as of a converted model, and no run to "
            f"go on with: name a new --workdir, and --config.init_from.workdir={workdir}"
        )
    fields = read_init_from(config)
    if not fields.workdir or list_steps(workdir):
        return None
    ours, theirs = _named(program.abstract.params), params_shapes(fields.workdir)
    source = read_config(fields.workdir)
    _check_kinds(config, source, fields.workdir)
    tables = {} if trains_tokenizer(config) else _tables(config, source)
    shapes = {name: tuple(leaf.shape) for name, leaf in ours.items()}
    fates = decide(fields, shapes, theirs, tables)
    for name, fate in fates.items():
        if fate != TAKEN:
            log.info("%s: %s, %s (there: %s)", name, fate, shapes[name], theirs.get(name, "absent"))
    log.info("%d other parameters are those of %s", _count(fates, TAKEN), fields.workdir)
    places = {name: leaf.sharding for name, leaf in ours.items() if fates[name] == TAKEN}
    given = _named(load_params(fields.workdir, "auto", sharding=places))
    anew = [name for name, fate in fates.items() if fate == REINITIALISED]
    # Tables of which rows are kept are put together on the host, from whole copies.
    fresh = _fresh(
        objective,
        program.key,
        {
            name: replicated(ours[name].sharding.mesh)
            if kept_rows(fields, name)
            else ours[name].sharding
            for name in anew
        },
    )

    def leaf(path: Any, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        name = path_name(path)
        if fates[name] == REINITIALISED:
            rows = kept_rows(fields, name)
            if not rows:
                return fresh[name]
            table = np.concatenate([np.asarray(given[name])[:rows], np.asarray(fresh[name])[rows:]])
            return jax.device_put(table, wanted.sharding)
        if fates[name] == INTERPOLATED:
            return jax.device_put(tables[name](np.asarray(given[name])), wanted.sharding)
        return given[name]

    return jax.tree_util.tree_map_with_path(leaf, program.abstract.params)


def decide(
    fields: InitFrom,
    ours: Mapping[str, Shape],
    theirs: Mapping[str, Shape],
    tables: Iterable[str] = (),
) -> dict[str, str]:
    """What becomes of every parameter of ours: `TAKEN`, `REINITIALISED` or `INTERPOLATED`.

    Args:
        ours, theirs: 'a/b/c' -> shape of what this run trains, and of what is in the workdir.
        tables: names of ours that can be interpolated.

    Raises:
        ValueError: names every parameter that is listed twice or cannot be what is asked, every
            entry that names none, and every parameter of another shape that is not listed.
    """
    problems, fates = [], {}
    anew, moved = _listed(fields.reinitialise, ours), _listed(fields.interpolate, ours)
    for listed, label in ((anew, "reinitialise"), (moved, "interpolate")):
        problems += [
            f"{label} names {entry!r}, which is no parameter of this run"
            for entry, names in listed.items()
            if not names
        ]
    first = {name for names in anew.values() for name in names}
    second = {name for names in moved.values() for name in names}
    for name, shape in ours.items():
        there = theirs.get(name)
        fates[name] = TAKEN
        if name in first and name in second:
            problems.append(f"both reinitialise and interpolate name {name!r}")
        elif name in first:
            fates[name] = REINITIALISED
            rows = kept_rows(fields, name)
            if rows and (there is None or there[1:] != shape[1:] or rows > min(there[0], shape[0])):
                problems.append(
                    f"the first {rows} rows of {name!r} cannot stay: it is {there or 'absent'} "
                    f"there and {shape} here"
                )
        elif name in second:
            fates[name] = INTERPOLATED
            if name not in tables:
                possible = ", ".join(sorted(tables)) or "there are none in this model"
                problems.append(f"{name!r} is no table of positions to interpolate ({possible})")
            elif there is None or there[1:] != shape[1:]:
                problems.append(f"{name!r} is {there or 'absent'} there and {shape} here")
        elif there != shape:
            ways = "reinitialise or interpolate" if name in tables else "reinitialise"
            where = f"{there} there" if there else "not there"
            problems.append(f"{name!r} is {shape} here and {where}: list it in {ways}")
    problems += [
        f"{name!r} {shape} is there, but no parameter of this run"
        for name, shape in theirs.items()
        if name not in ours and not any(_below(name, entry) for entry in fields.reinitialise)
    ]
    if problems:
        more = f"; and {len(problems) - SHOWN} more" * (len(problems) > SHOWN)
        raise ValueError(
            f"config.init_from, workdir={fields.workdir!r}: {'; '.join(problems[:SHOWN])}{more}"
        )
    return fates


def kept_rows(fields: InitFrom, name: str) -> int:
    """How many rows of a parameter stay although it is listed in ``reinitialise``."""
    found = [LATER_ROWS.fullmatch(entry) for entry in fields.reinitialise]
    return max((int(match[2]) for match in found if match and match[1] == name), default=0)


def _listed(entries: Iterable[str], names: Iterable[str]) -> dict[str, list[str]]:
    return {entry: [name for name in names if _below(name, entry)] for entry in entries}


def _below(name: str, entry: str) -> bool:
    if match := LATER_ROWS.fullmatch(entry):
        return name == match[1]
    return name == entry or name.startswith(f"{entry}/")


def _named(tree: Any) -> dict[str, Any]:
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _count(fates: Mapping[str, str], fate: str) -> int:
    return sum(found == fate for found in fates.values())


def _check_kinds(config: Any, source: Any, workdir: str) -> None:
    here, there = (
        "a tokenizer" if trains_tokenizer(c) else "a generator" for c in (config, source)
    )
    if here != there:
        raise ValueError(
            f"config.init_from.workdir={workdir} holds {there}, but this run trains {here}"
        )


def _tables(config: Any, source: Any) -> dict[str, Any]:
    """Parameter -> function that takes its rows there to its rows here."""
    here, there = build_system(config), build_system(source)
    theirs = position_tables(there.backbone)
    return {
        f"backbone/{path}": lambda rows, kind=kind: resample(
            rows, kind, there.schedule, here.schedule
        )
        for path, kind in position_tables(here.backbone).items()
        if theirs.get(path) == kind
    }


def _fresh(
    objective: Objective, key: jax.Array, places: Mapping[str, jax.sharding.Sharding]
) -> dict[str, jax.Array]:
    """Parameters of a new run, the same as without ``config.init_from``: those with a place."""

    def pick(key: jax.Array) -> dict[str, jax.Array]:
        params = _named(init_params(objective, key))
        return {name: params[name] for name in places}

    return jax.jit(pick, out_shardings=dict(places))(key)
