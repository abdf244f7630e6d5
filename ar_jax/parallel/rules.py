"""Where parameters lie: path pattern -> logical axes -> mesh axes.

One table serves parameters, their EMA and the optimiser's moments, because all of them end in the
same path. The named axes are those of the last dimensions: a stack of scanned layers or any other
leading dimension is left whole.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule:
    """One line of the table.

    Attributes:
        pattern: regular expression, searched in 'a/b/c' paths.
        axes: logical names of the last dimensions, None for a whole one; () replicates.
        may_replicate: leave a dimension whole, and log it, where the mesh axis does not divide it;
            an error otherwise.
    """

    pattern: str
    axes: tuple[str | None, ...]
    may_replicate: bool = False


RULES: tuple[Rule, ...] = (
    Rule(
        pattern=r"(^|/)(cross_|pool_)?attention/(query|key|value)/kernel$",
        axes=("embed", "heads", None),
    ),  # D H K
    Rule(
        pattern=r"(^|/)(cross_|pool_)?attention/out/kernel$", axes=("heads", None, "embed")
    ),  # H K D
    Rule(pattern=r"(^|/)mlp/(up|gate)/kernel$", axes=("embed", "mlp")),
    Rule(pattern=r"(^|/)mlp/down/kernel$", axes=("mlp", "embed")),
    # The six (or two) vectors leave the layer as [n, D]: the input's dimension is the one to split.
    Rule(pattern=r"(^|/)(\w+_)?modulation/kernel$", axes=("embed", None, "width")),  # D n D
    Rule(pattern=r"(^|/)head/((output|bit)/)?kernel$", axes=("embed", "vocab"), may_replicate=True),
    Rule(pattern=r"(^|/)token_embed/embedding$", axes=("vocab", "embed"), may_replicate=True),
    # One row of it for an image: split, XLA would gather the table and move the rows in each step.
    Rule(pattern=r"(^|/)(class_embed/embedding|class_features)$", axes=()),
    # Other linear embeddings (of continuous codes, of a hidden state, of a time, of a text), and
    # what takes codes to a part of a row and back.
    Rule(
        pattern=r"(^|/)(\w+_embed(_\d)?|caption_(up|down)|reduce|restore)/kernel$",
        axes=("embed",),
        may_replicate=True,
    ),
    Rule(
        pattern=r"(^|/)(position|position_start|scale_embed|modulation_table|null_caption"
        r"|cell_positions/\w+|step_embed|start_row|transition|instruction|\w+_position|mask_token|null_embed"
        r"|learned_query|cross_gate)$",
        axes=("embed",),
        may_replicate=True,
    ),
    # Every code is compared with every row: a split codebook would be gathered in each step.
    Rule(pattern=r"(^|/)codebook$", axes=()),
    # Vectors of a layer; a stack of layers makes matrices of them.
    Rule(pattern=r"(^|/)(\w+_)?(bias|scale)$", axes=()),
    # Convolutions [h, w, I, O] and remaining linear layers [I, O]: output channels, whose number
    # is 1 or 3 at the image's side.
    Rule(pattern=r"(^|/)kernel$", axes=("embed",), may_replicate=True),
)

# Logical axis -> mesh axis; names not listed stay whole.
MESH_AXES = {"embed": "fsdp", "heads": "tensor", "mlp": "tensor", "vocab": "tensor"}


def path_name(path: tuple[Any, ...]) -> str:
    """'a/b/c' of a key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def find_rule(name: str, rules: Sequence[Rule] = RULES) -> Rule | None:
    """The first rule whose pattern is in ``name``."""
    return next((rule for rule in rules if re.search(rule.pattern, name)), None)


def shardings(tree: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """A NamedSharding for every leaf of ``tree`` (arrays or ShapeDtypeStructs).

    Leaves without a rule (biases, norm scales, counts) are replicated.

    Raises:
        ValueError: names the parameter, its dimension and the mesh axis that does not divide it.
    """

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, partition(path_name(path), leaf.shape, mesh, rules))

    return jax.tree_util.tree_map_with_path(one, tree)


def partition(name: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule] = RULES) -> P:
    """The PartitionSpec of one parameter; see `shardings`."""
    rule = find_rule(name, rules)
    if rule is None or not rule.axes:
        return P()
    if len(shape) < len(rule.axes):
        raise ValueError(
            f"parameter {name} of shape {shape} matches the rule {rule.pattern!r}, which names "
            f"{len(rule.axes)} dimensions {rule.axes}: rename it or give it a rule of its own"
        )
    lead = len(shape) - len(rule.axes)
    spec: list[str | None] = [None] * lead
    for dim, logical in enumerate(rule.axes, start=lead):
        axis = MESH_AXES.get(logical) if logical else None
        size = mesh.shape[axis] if axis else 1
        if axis and shape[dim] % size:
            reason = f"parameter {name} {shape}: dimension {dim} ({logical}) is {shape[dim]}, "
            if not rule.may_replicate:
                divisors = [n for n in range(1, size + 1) if shape[dim] % n == 0]
                raise ValueError(
                    f"{reason}which config.mesh.{axis}={size} does not divide; use one of "
                    f"{divisors}"
                )
            log.info("%sno multiple of %s=%d: replicated", reason, axis, size)
            axis = None
        spec.append(axis if size > 1 else None)
    return P(*spec)


def check_coverage(tree: Any, *, min_bytes: int = 2**16, rules: Sequence[Rule] = RULES) -> None:
    """Checks that no large parameter is replicated for want of a rule.

    Args:
        tree: parameters or their ShapeDtypeStructs.
        min_bytes: smaller parameters, and those of fewer than two dimensions, need no rule.

    Raises:
        ValueError: names every parameter that no rule matches.
    """
    missing = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = path_name(path)
        size = leaf.size * leaf.dtype.itemsize
        if leaf.ndim >= 2 and size >= min_bytes and find_rule(name, rules) is None:
            missing.append(f"{name} {leaf.shape}")
    if missing:
        raise ValueError(
            "no rule of ar_jax/parallel/rules.py says how these parameters are sharded: "
            + ", ".join(missing)
        )
