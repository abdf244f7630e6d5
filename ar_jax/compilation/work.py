"""FLOPs of an instruction's matrix products, and the bytes that it moves to and from HBM."""

from __future__ import annotations

import math
import re

from ar_jax.compilation.collectives import KINDS, result_shapes
from ar_jax.compilation.execution import Executed
from ar_jax.compilation.hlo import Computations, Instruction, Shape, shape_bytes

# What moves nothing itself: names of other results, containers, ends of what a start has counted.
STILL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional"}
STILL |= {"call", "after-all", "partition-id", "opt-barrier", "async-start", "send", "recv"}
VIEWS = ("dynamic-slice", "slice", "gather")  # read a part of their first operand


def product_flops(step: Executed, computations: Computations) -> float:
    """FLOPs of one execution's products and convolutions, two for each pair that is multiplied."""
    shapes = {one.name: one.shapes for one in step.operands}
    return _flops(step.instruction, shapes, computations)


def _flops(
    instruction: Instruction, shapes: dict[str, tuple[Shape, ...]], computations: Computations
) -> float:
    if instruction.opcode in ("dot", "convolution"):
        left, right = (shapes.get(name, ()) for name in instruction.operands[:2])
        if not left or not right:
            return 0.0
        result = instruction.shapes[0][1]
        if instruction.opcode == "dot":
            listed = instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}") or ""
            contracted = [left[0][1][int(place)] for place in listed.split(",") if place]
            return 2.0 * math.prod(result) * math.prod(contracted)
        return _convolution_flops(instruction, left[0][1], right[0][1])
    if instruction.opcode not in ("fusion", "async-start"):
        return 0.0
    inside = computations.get(instruction.called, [])
    known = {one.name: one.shapes for one in inside}
    return sum(_flops(one, known, computations) for one in inside)


def _convolution_flops(
    instruction: Instruction, left: tuple[int, ...], right: tuple[int, ...]
) -> float:
    """The TPU's compiler writes every product as a convolution, a batch as spatial places."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.line)
    if not labels:
        return 0.0
    source, kernel, target = labels.groups()
    result = instruction.shapes[0][1]
    pairs = float(right[kernel.index("i")])
    for place, label in enumerate(target):
        if not label.isdigit():
            pairs *= result[place]
    window = instruction.attribute(r"window=\{([^}]*)\}") or ""
    fields = dict(re.findall(r"(\w+)=([\w\-]+)", window))

    def number(name: str, label: str, default: int) -> int:
        text = fields[name].split("x")[int(label)] if name in fields else str(default)
        return int(re.match(r"-?\d+", text)[0])  # type: ignore[index]

    for label in filter(str.isdigit, target):
        pairs *= valid_pairs(
            left[source.index(label)],
            right[kernel.index(label)],
            result[target.index(label)],
            stride=number("stride", label, 1),
            dilation=number("rhs_dilate", label, 1),
            base=number("lhs_dilate", label, 1),
            before=number("pad", label, 0),
        )
    return 2.0 * pairs


def valid_pairs(
    size: int, window: int, places: int, *, stride: int, dilation: int, base: int, before: int
) -> int:
    """Pairs of an output place and a kernel place that meet an input place and not padding.

    Args:
        size, window, places: of input, kernel and output along one dimension.
        stride: input places from one output place to the next.
        dilation, base: distance of two kernel places, of two input places.
        before: places of padding before the first.
    """
    end = (size - 1) * base + 1
    return sum(
        0 <= (at := place * stride + tap * dilation - before) < end and at % base == 0
        for place in range(places)
        for tap in range(window)
    )


def moved_bytes(step: Executed, computations: Computations) -> int:
    """Bytes of one execution's operands and results in HBM: what it reads and writes at most.

    Of an operand that is only sliced, the slices; of a result that is an operand with a part
    replaced, the part.
    """
    instruction = step.instruction
    opcode = instruction.opcode
    if opcode in STILL or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and "tpu_custom_call" not in instruction.line:
        return 0
    if opcode in ("copy-start", "slice-start"):  # (to, from, context) or ((from), to, context)
        size = min(map(shape_bytes, instruction.shapes[:2]))
        return size * sum(instruction.in_hbm[:2])
    if opcode.removesuffix("-start") in KINDS:
        read = sum(_in_hbm(one) for one in step.operands)
        return read + sum(map(shape_bytes, result_shapes(instruction)))
    if opcode == "fusion":
        read = sum(
            _read(step.inside, place, computations) if all(one.in_hbm) else 0
            for place, one in enumerate(step.operands)
        )
        return read + _written(step, computations)
    if opcode in VIEWS:
        return 2 * _in_hbm(instruction) if all(step.operands[0].in_hbm) else _in_hbm(instruction)
    if opcode == "dynamic-update-slice":
        return 2 * step.operands[1].bytes if all(instruction.in_hbm) else 0
    return sum(_in_hbm(one) for one in step.operands) + _in_hbm(instruction)


def _in_hbm(instruction: Instruction) -> int:
    found = zip(instruction.shapes, instruction.in_hbm, strict=True)
    return sum(shape_bytes(shape) for shape, there in found if there)


def _read(inside: tuple[Instruction, ...], number: int, computations: Computations) -> int:
    """Bytes that a fusion reads of its operand ``number``."""
    own = _parameter(inside, number)
    if own is None:
        return 0
    total, given_back = _read_inside(inside, own, computations)
    return own.bytes if given_back else min(own.bytes, total)


def _read_inside(
    inside: tuple[Instruction, ...], own: Instruction, computations: Computations
) -> tuple[int, bool]:
    """(bytes that are read of the parameter ``own``, whether the result is but another view of it).

    A fusion in a fusion may do nothing but give its operand another shape: what reads its result
    reads the operand.
    """
    names, total = {own.name}, 0
    for one in inside:
        if names.isdisjoint(one.operands):
            continue
        place = next(n for n, name in enumerate(one.operands) if name in names)
        if one.opcode == "bitcast":
            names.add(one.name)
        elif one.opcode in VIEWS and place == 0:
            total += one.bytes
        elif one.opcode == "fusion":
            nested = tuple(computations.get(one.called, ()))
            parameter = _parameter(nested, place)
            if parameter is None:
                return own.bytes, False
            read, given_back = _read_inside(nested, parameter, computations)
            total += read
            if given_back:
                names.add(one.name)
        elif not (one.opcode == "dynamic-update-slice" and place == 0):
            return own.bytes, False
    return total, any(one.is_root and one.name in names for one in inside)


def _parameter(inside: tuple[Instruction, ...], number: int) -> Instruction | None:
    found = (one for one in inside if one.opcode == "parameter")
    return next((one for one in found if f"parameter({number})" in one.line), None)


def _written(step: Executed, computations: Computations) -> int:
    """Bytes that a fusion writes to HBM."""
    parts = _parts(step.inside, computations)
    shapes, in_hbm = step.instruction.shapes, step.instruction.in_hbm
    if len(parts) != len(shapes):
        return _in_hbm(step.instruction)
    return sum(
        min(part, shape_bytes(shape))
        for part, shape, there in zip(parts, shapes, in_hbm, strict=True)
        if there
    )


def _parts(inside: tuple[Instruction, ...], computations: Computations) -> list[int]:
    """Bytes that each result of a fused computation is made of; less than it if it is updated."""
    defined = {one.name: one for one in inside}
    root = next((one for one in inside if one.is_root), None)
    if root is None:
        return []
    ends = root.operands if root.opcode == "tuple" else (root.name,)
    parts = []
    for name in ends:
        one = defined.get(name)
        while one is not None and one.opcode == "bitcast":
            one = defined.get(one.operands[0])
        if one is None:
            return []
        if one.opcode == "dynamic-update-slice" and one.operands[1] in defined:
            parts.append(defined[one.operands[1]].bytes)
        elif one.opcode == "fusion" and len(one.shapes) == 1:
            parts += _parts(tuple(computations.get(one.called, ())), computations) or [one.bytes]
        else:
            parts.append(one.bytes)
    return parts
