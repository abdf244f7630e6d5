"""A compilation's report as lines to read."""

from __future__ import annotations

from typing import Any

GIB = 2**30


def summarise_collectives(collectives: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Collectives of one kind, axes, place and manner added up, most bytes first.

    Returns:
        {'kind', 'axes', 'over_dcn', 'group' (devices; slices over DCN), 'in_loop', 'asynchronous',
        'count' (calls of one run), 'bytes' (of one run on one device), 'seconds', 'exposed'} each.
    """
    names = ("kind", "axes", "over_dcn", "group", "in_loop", "asynchronous")
    sums: dict[tuple, dict[str, Any]] = {}
    for found in collectives:
        same = {name: found[name] for name in names}
        none = {"count": 0, "bytes": 0, "seconds": 0.0, "exposed": 0.0}
        row = sums.setdefault(tuple(same.values()), {**same, **none})
        row["count"] += found["count"]
        row["bytes"] += found["bytes_per_run"]
        row["seconds"] += found["seconds"]
        row["exposed"] += found["exposed"]
    return sorted(sums.values(), key=lambda row: -row["bytes"])


def summary(report: dict[str, Any]) -> str:
    """The report of a program that fits or, by the compiler's plan, just does not."""
    memory, seconds, lines = report["memory"], report["seconds"], report["rooflines"]
    gib = {name: f"{size / GIB:.2f}" for name, size in memory.items()}
    verdict = "fits" if report["fits"] else "does not fit"
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items())
    slices = report["mesh"].get("slice", 1)
    where = f"{slices} slices of {report['topology']}" if slices > 1 else report["topology"]
    unit = "step" if report["program"] == "train" else "batch"
    text = [
        f"{report['program']} on {where} ({report['devices']} chips: {mesh}), "
        f"{report['batch_size']} images a {unit}, {report['parameters']:,} parameters, attention "
        f"{report['attention']}",
        f"HBM a chip: {verdict}: peak {gib['peak']} of {gib['capacity']} GiB (arguments "
        f"{gib['argument']}, temporaries {gib['temp']}, outputs {gib['output']}, of which aliased "
        f"{gib['alias']})",
        f"time: {seconds['total'] * 1e3:.2f} ms a {unit}: compiler's estimate "
        f"{seconds['compiler'] * 1e3:.2f}, custom kernels at least {seconds['kernels'] * 1e3:.2f}",
        f"  with collectives at least {seconds['with_collectives'] * 1e3:.2f} ms: exposed "
        f"{seconds['collectives_exposed'] * 1e3:.2f}, hidden by the rest "
        f"{seconds['collectives_overlapped'] * 1e3:.2f}",
        f"  of the time, attention among all rows without its projections: "
        f"{seconds['attention'] * 1e3:.2f} ms",
        f"  how: {report['method']}",
        f"  left out: {report['left_out']}",
        f"model FLOPs: {report['model_flops']:.4g} a {unit} over all chips",
        f"  how: {report['model_flops_rule']}",
        f"MFU by this estimate: {report['mfu']:.3f}, with collectives at most "
        f"{report['mfu_with_collectives']:.3f}",
        f"rooflines: compute {lines['compute'] * 1e3:.2f} ms, bandwidth (arguments read and "
        f"outputs written once) {lines['bandwidth'] * 1e3:.2f} ms: {lines['bound']} is the higher",
        f"phases of a {unit} on one chip, ms:",
        *map(_phase, report["phases"].items()),
        f"  how: {report['phases_rule']}",
        f"collectives of a {unit}, bytes of results on one chip:",
    ]
    rows = summarise_collectives(report["collectives"])
    return "\n".join(text + [_collective(row) for row in rows] + ([] if rows else ["  none"]))


def _phase(item: tuple[str, dict[str, Any]]) -> str:
    name, row = item
    names = ("compiler", "kernels", "collectives_exposed", "compute", "bandwidth")
    taken, kernels, exposed, compute, bandwidth = (1e3 * row[name] for name in names)
    return (
        f"  {name}: compiler {taken:.2f}, kernels {kernels:.2f}, exposed collectives "
        f"{exposed:.2f}; rooflines: compute {compute:.2f}, bandwidth {bandwidth:.2f}: "
        f"{row['bound']} is the higher"
    )


def _collective(row: dict[str, Any]) -> str:
    where = "in a loop" if row["in_loop"] else "outside of loops"
    manner = "asynchronous" if row["asynchronous"] else "synchronous"
    size = f"{row['bytes'] / 2**20:.1f} MiB"
    network = " over DCN" if row["over_dcn"] else ""
    over = f"{row['axes']}{network} (groups of {row['group'] or 'all'})"
    time = f"{row['seconds'] * 1e3:.2f} ms at least, {row['exposed'] * 1e3:.2f} exposed"
    return f"  {row['kind']}: {row['count']} calls, {size}, over {over}, {where}, {manner}, {time}"
