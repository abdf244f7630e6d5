"""FLOPs of a function's matrix products and convolutions, from its jaxpr: nothing is compiled.

What is counted is the traced program, of the whole batch and before it is divided over chips: what
remains of it after compilation, padding of tiles and recomputation do not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from ar_jax.compilation.work import valid_pairs

CALL_RULE = (
    "matrix products and convolutions of the program as it is traced, of the whole batch: 2 FLOPs "
    "for each pair that is multiplied, attention by all pairs of rows that it is given; padding of "
    "images counts nothing"
)
TRAINING_RULE = (
    "matrix products and convolutions of the loss as it is traced, of the whole batch: 2 FLOPs for "
    "each pair that is multiplied, attention by all pairs of rows that it is given, times 3 for "
    "forward and backward; recomputation, padding of images, a discriminator and a generator's "
    "tokenizer count nothing"
)


def count_products(function: Callable[..., Any], *arguments: Any) -> float:
    """FLOPs of one call, two for each pair of numbers that is multiplied.

    Loops count with all their turns, of branches the dearest, of platforms' forms the default.

    Args:
        function: of arrays, traceable; may be jitted.
        arguments: arrays or their shapes.

    Raises:
        ValueError: products in a loop that ends by its data, or in a custom kernel.
    """
    return _count(jax.make_jaxpr(function)(*arguments).jaxpr)


def _count(jaxpr: core.Jaxpr) -> float:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: core.JaxprEqn) -> float:
    name = equation.primitive.name
    if name == "dot_general":
        return _dot_flops(equation)
    if name == "conv_general_dilated":
        return _convolution_flops(equation)
    jaxprs = list(core.jaxprs_in_params(equation.params))
    if equation.params.get("branches_platforms"):
        jaxprs = jaxprs[-1:]  # the default: others fill up rows, or are kernels
    inside = [_count(jaxpr) for jaxpr in jaxprs]
    if not any(inside):
        return 0.0
    if name in ("while", "pallas_call", "shard_map"):
        raise ValueError(
            f"the matrix products inside {name} cannot be counted: the turns of a loop that ends "
            "by its data, of a kernel's grid or of a device's part are not those of the program"
        )
    if name == "cond":
        return max(inside)
    return equation.params["length"] * sum(inside) if name == "scan" else sum(inside)


def _dot_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = _shape(equation.invars[0]), _shape(equation.outvars[0])
    return 2.0 * math.prod(result) * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    """Of pairs that meet an input place: neither padding nor a gap between dilated places."""
    params = equation.params
    numbers = params["dimension_numbers"]  # of each the places of batch and channels come first
    left, right, result = map(_shape, (*equation.invars, *equation.outvars))
    pairs = float(math.prod(result[i] for i in numbers.out_spec[:2]) * right[numbers.rhs_spec[1]])
    for n, (source, kernel, target) in enumerate(
        zip(numbers.lhs_spec[2:], numbers.rhs_spec[2:], numbers.out_spec[2:], strict=True)
    ):
        pairs *= valid_pairs(
            left[source],
            right[kernel],
            result[target],
            stride=params["window_strides"][n],
            dilation=params["rhs_dilation"][n],
            base=params["lhs_dilation"][n],
            before=params["padding"][n][0],
        )
    return 2.0 * pairs


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape
