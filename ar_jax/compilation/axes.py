"""Which axes of the mesh a collective goes over, from its replica groups."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

Groups = tuple[tuple[int, ...], ...]


def replica_groups(line: str) -> Groups | None:
    """Partition numbers that take part together, of an HLO collective's text.

    Understands lists '{{0,1},{2,3}}', iotas '[2,2]<=[4]' (with 'T(1,0)'), named mesh axes
    "mesh['a'=2,'b'=2] {'b'}" and, of a permute, source_target_pairs, whose cycles are the groups.
    () where the text names none: all partitions. None where they are written in another way.
    """
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", line)
    if named and ":" not in named.group(2):  # 'axis':(2)2 is a part of an axis
        sizes = [(axis, int(size)) for axis, size in re.findall(r"'(\w+)'=(\d+)", named.group(1))]
        return axis_groups(dict(sizes), tuple(re.findall(r"'(\w+)'", named.group(2))))
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if iota:
        shape, source = _integers(iota.group(1)), _integers(iota.group(2))
        order = np.arange(math.prod(source)).reshape(source)
        if iota.group(3):
            order = order.transpose(_integers(iota.group(3)))
        return _sorted(order.reshape(-1, shape[-1]).tolist())
    listed = re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line)
    if listed:
        return _sorted([_integers(row) for row in re.findall(r"\{([\d,]+)\}", listed.group(1))])
    pairs = re.search(r"source_target_pairs=\{(\{[\d,{}]*\})\}", line)
    if pairs:
        edges = [_integers(row) for row in re.findall(r"\{([\d,]+)\}", pairs.group(1))]
        return _connected([(a, b) for a, b in edges])
    return None if re.search(r"replica_groups=(?!\{\})", line) else ()


def axis_groups(mesh: Mapping[str, int], axes: tuple[str, ...]) -> Groups:
    """Groups of partition numbers that differ only in ``axes`` of ``mesh`` {name: size}."""
    names = tuple(mesh)
    numbers = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    last = [names.index(axis) for axis in names if axis in axes]
    first = [place for place in range(len(names)) if place not in last]
    size = math.prod(mesh[axis] for axis in axes)
    return _sorted(numbers.transpose(first + last).reshape(-1, size).tolist())


def mesh_axes(groups: Groups | None, mesh: Mapping[str, int]) -> str:
    """'fsdp', 'data x fsdp', ...: the smallest set of axes of ``mesh`` that holds every group.

    'all' where there are no groups, 'not read' for None. A permute's groups may be smaller than
    the axis they lie on; groups that need only a part of an axis get the whole axis's name.
    """
    if groups is None:
        return "not read"
    wide = tuple(axis for axis in mesh if mesh[axis] > 1)
    for count in range(1, len(wide) + 1 if groups else 0):
        for axes in itertools.combinations(wide, count):
            home = {p: place for place, row in enumerate(axis_groups(mesh, axes)) for p in row}
            if all(len({home.get(p) for p in row}) == 1 for row in groups):
                return " x ".join(axes)
    return "all"


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",") if number)


def _sorted(rows: list) -> Groups:
    return tuple(sorted(tuple(sorted(row)) for row in rows))


def _connected(edges: list[tuple[int, int]]) -> Groups:
    home: dict[int, set[int]] = {}
    for a, b in edges:
        joined = home.get(a, {a}) | home.get(b, {b})
        home.update(dict.fromkeys(joined, joined))
    return _sorted([list(row) for row in {id(row): row for row in home.values()}.values()])
