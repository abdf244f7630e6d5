"""What the compiler says where a program needs more memory than a chip has."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

ITEM_BITS = {"i1": 8, "bf16": 16}  # others end in their number of bits
UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}

# The second: temporaries alone are too large, and the compiler stops before it places buffers.
FORMS = (
    r"Used (?P<needed>[\d.]+\w?) of (?P<capacity>[\d.]+\w?) hbm",
    r"required for (?:HLO )?(?P<of>[\w ]+?) \((?P<needed>[\d.]+\w?)\) exceeds available HBM "
    r"\((?P<capacity>[\d.]+\w?)\)",
)


class DoesNotFit(RuntimeError):
    """The program needs more memory than a chip has; `verdict` has the figures."""

    def __init__(self, verdict: dict[str, Any]) -> None:
        super().__init__(describe(verdict))
        self.verdict = verdict


@dataclasses.dataclass(frozen=True)
class Buffer:
    """One allocation: bytes on one chip, shape as the compiler writes it, operation's name."""

    bytes: int
    shape: str
    operation: str


def read_size(text: str) -> int | None:
    """Bytes of '15.75G', '512B', '1.2M'; None if it is no size. Units are powers of 1024."""
    found = re.fullmatch(r"([\d.]+)([KMGT]?)(?:i?B)?", text.strip())
    return round(float(found.group(1)) * UNITS[found.group(2)]) if found else None


def read_buffers(message: str, count: int = 3) -> list[Buffer]:
    """The ``count`` largest allocations that the message names, largest first."""
    found: dict[Buffer, None] = {}
    for part in re.split(r"\n(?=\s*\d+\. Size: )", message)[1:]:
        size = read_size(_first(r"Size: ([\d.]+\w*)", part))
        if size is not None:
            shape = _first(r"Shape: ([^\s{]+)", part)
            found[Buffer(size, shape, _first(r'op_name="([^"]*)"', part))] = None
    return sorted(found, key=lambda buffer: -buffer.bytes)[:count]


def largest_arrays(text: str, count: int = 3) -> list[Buffer]:
    """The ``count`` largest arrays that loops carry or matrix products give in StableHLO ``text``.

    Their bytes are of all chips together: the text is of the program before it is divided. Loops
    keep what the backward pass needs, which is most of a train step's memory.
    """
    found: dict[str, Buffer] = {}
    for line in text.splitlines():
        operation = _first(r"stablehlo\.(while|dot_general)\b", line)
        if not operation:
            continue
        types = line.rpartition("->")[2] if operation == "dot_general" else line
        for dims, kind in re.findall(r"tensor<((?:\d+x)+)(\w+)>", types):
            digits = re.search(r"\d+$", kind)
            bits = ITEM_BITS.get(kind, int(digits.group()) if digits else 0)
            size = math.prod(int(n) for n in dims.split("x") if n) * bits // 8
            shape = f"{kind}[{dims.rstrip('x').replace('x', ',')}]"
            found.setdefault(shape, Buffer(size, shape, operation))
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


def advise(remat: str | None, mesh: Mapping[str, int], *, accumulates: bool = True) -> list[str]:
    """What to change, of that which is not so already.

    Args:
        remat: of the program's blocks; None: there is nothing to rematerialise.
        mesh: sizes of its axes.
        accumulates: whether it can take its batch in parts.
    """
    more = ", or raise config.train.accumulation" if accumulates else ""
    advice = [f"lower --batch_size (config.train.batch_size){more}"]
    if remat not in (None, "block"):
        advice.append("rematerialise the blocks: config.backbone.remat='block'")
    if mesh["data"] > 1:
        advice.append(
            "split parameters and optimizer state: config.mesh.data=1 and config.mesh.fsdp=-1"
        )
    return advice


def read_overflow(message: str, advice: list[str], lowered: str = "") -> dict[str, Any] | None:
    """The verdict that a compiler's error amounts to; None if it is of another kind.

    Args:
        advice: see `advise`.
        lowered: the program's StableHLO, for a message that names no buffers.

    Returns:
        {'fits': False, 'needed', 'capacity' (bytes of a chip, None if not said), 'of' (what needs
        them: the program, or its temporaries alone), 'buffers' (the three largest: bytes, shape,
        operation), 'whole' (True: the buffers are those of `largest_arrays`, not the compiler's),
        'advice'}.
    """
    if "RESOURCE_EXHAUSTED" not in message:
        return None
    amounts = next((found for form in FORMS if (found := re.search(form, message))), None)
    said = amounts.groupdict() if amounts else {}
    named = read_buffers(message)
    return {
        "fits": False,
        "needed": read_size(said.get("needed", "")),
        "capacity": read_size(said.get("capacity", "")),
        "of": said.get("of", "program"),
        "buffers": [dataclasses.asdict(buffer) for buffer in named or largest_arrays(lowered)],
        "whole": not named,
        "advice": advice,
    }


def describe(verdict: dict[str, Any]) -> str:
    """The verdict as lines to read."""
    needed, capacity = (_gib(verdict[name]) for name in ("needed", "capacity"))
    lines = [f"does not fit: {verdict['of']}: {needed} of a chip's {capacity} of HBM"]
    if verdict["whole"]:
        lines.append("the compiler names no buffers; largest arrays before division over chips:")
    else:
        lines.append("largest buffers of a chip:")
    for buffer in verdict["buffers"]:
        name = buffer["operation"] or "unnamed"
        lines.append(f"  {_gib(buffer['bytes'])}  {buffer['shape']}  {name}")
    return "\n".join([*lines, "what to change:", *(f"  {line}" for line in verdict["advice"])])


def _first(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    return found.group(1) if found else ""


def _gib(size: int | None) -> str:
    return "an unnamed amount" if size is None else f"{size / 2**30:.2f} GiB"
