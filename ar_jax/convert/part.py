"""One converted sub-model, a tokenizer or a generator: its config, its table of places, its checks.

A family's module (`ar_jax.convert.var`, ...) makes the parts, from the shapes of a file or from a
configuration of ours; what is the same for all families is here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.build import build_objective, build_tokenizer
from ar_jax.convert.places import (
    Places,
    Shape,
    Tensors,
    official_shapes,
    to_official,
    to_ours,
)

TOKENIZER, GENERATOR = "tokenizer", "generator"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Buffer:
    """A tensor of a file that carries no parameters.

    Attributes:
        shape: that it has; None: any.
        made_by: what the shape and the numbers come from, for errors.
        make: what an exported file holds there; None: nothing is written.
        computed: the official code computes it and uses what the file holds, so that must be the
            same as `make`. Zeros alone say nothing: a buffer that was never filled.
    """

    shape: Shape | None = None
    made_by: str = "the official code"
    make: Callable[[], np.ndarray] | None = None
    computed: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A tokenizer or a generator of a family.

    Attributes:
        section: our config of it. A tokenizer's: 'tokenizer' and, if it is not that of vector
            quantisers, 'objective'. A generator's:
            'schedule', 'backbone', 'head', 'objective' and the release's 'sampling'.
        places: official key -> our leaves: 'autoencoder/...' and 'quantizer/...' of a tokenizer,
            'backbone/...' and 'head/...' of a generator.
        buffers: what a file may hold beside them.
        leftovers: patterns of keys that training left beside them, which nobody reads.
        container: names under which the official code looks for the state_dict in a file of torch;
            (): the file is the state_dict.
    """

    section: dict[str, Any]
    places: Places
    buffers: Mapping[str, Buffer] = dataclasses.field(default_factory=dict)
    leftovers: tuple[str, ...] = ()
    container: tuple[str, ...] = ()


def shapes_of(tensors: Tensors) -> dict[str, Shape]:
    """Official key -> shape: what a family reads the sizes from."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def empty_params(config: Mapping[str, Any], kind: str) -> Any:
    """Shapes of our parameters: of the tokenizer of ``config``, or of its generator.

    Args:
        config: sections 'dtype', 'tokenizer' and, for a generator, those of `Part`.
        kind: 'tokenizer' or 'generator'.
    """
    if kind == GENERATOR:
        return jax.eval_shape(build_objective(config).init, jax.random.key(0))
    tokenizer: Any = build_tokenizer(config)
    images = jax.ShapeDtypeStruct((1, *tokenizer.image_shape), jnp.float32)
    return jax.eval_shape(tokenizer.init, jax.random.key(0), images).get("params", {})


def to_params(part: Part, tensors: Tensors, expected: Any, source: str) -> dict[str, Any]:
    """Our parameters of a file's tensors, each of which is used, a known buffer or a leftover.

    Args:
        expected: `empty_params` of the configuration.
        source: the file, for errors.

    Raises:
        ValueError: names the file, the official key, our path and the shapes.
    """
    passed = {*part.buffers, *unread(part, tensors)}
    used = {key: tensor for key, tensor in tensors.items() if key not in passed}
    try:
        for key, buffer in part.buffers.items():
            if key in tensors:
                _check_buffer(key, buffer, tensors[key])
        return to_ours(part.places, used, expected)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def unread(part: Part, tensors: Tensors) -> tuple[str, ...]:
    """Keys of what training left in a file beside the model."""
    patterns = part.leftovers
    return tuple(key for key in tensors if any(fnmatch.fnmatchcase(key, p) for p in patterns))


def to_tensors(part: Part, params: Any) -> dict[str, np.ndarray]:
    """The official state_dict of our parameters, buffers included."""
    makers = {key: buffer.make for key, buffer in part.buffers.items()}
    made = {key: make() for key, make in makers.items() if make is not None}
    return to_official(part.places, params) | made


def release_shapes(part: Part, expected: Any) -> dict[str, Shape]:
    """Official key -> shape of every parameter, without any numbers."""
    return official_shapes(part.places, expected)


def _check_buffer(key: str, buffer: Buffer, tensor: np.ndarray) -> None:
    found = tuple(tensor.shape)
    if buffer.shape not in (None, found):
        raise ValueError(
            f"buffer {key!r} has the shape {found}, but by {buffer.made_by} it is {buffer.shape}"
        )
    if not buffer.computed or not np.any(tensor):
        return
    if buffer.make is not None and not np.array_equal(tensor, buffer.make()):
        raise ValueError(
            f"buffer {key!r} holds other numbers than it has by {buffer.made_by}: with it the "
            "official code is another model"
        )


def agree(name: str, found: Any, options: Mapping[str, Any], source: str) -> Any:
    """``found``, which the tensors say, unless ``options`` says something else.

    Args:
        name: of the option.
        found: what the tensors say; None if they do not.
        source: the tensor that says so, for errors.

    Raises:
        ValueError: both speak and differ, or neither does.
    """
    said = options.get(name)
    if isinstance(said, list):
        said = tuple(said)
    if found is None and said is None:
        raise ValueError(f"the tensors do not say {name}: give it as an option")
    if found is not None and said is not None and found != said:
        raise ValueError(f"{name} is {said!r}, but {source} says {found!r}")
    return said if found is None else found


def shape_of(shapes: Mapping[str, Shape], key: str) -> Shape:
    """Shape of a tensor that must be there.

    Raises:
        ValueError: it is not.
    """
    if key not in shapes:
        raise ValueError(f"tensor {key!r} is missing")
    return shapes[key]


def find_state_dict(
    container: Mapping[str, Any], names: tuple[str, ...], key: str
) -> Mapping[str, Any]:
    """The state_dict that holds ``key``: the container, or what it holds under a name.

    Args:
        container: of a file.
        names: 'model' or 'trainer.var_wo_ddp': where to look, in this order, after the container.
        key: of a tensor that every state_dict of this kind has.

    Raises:
        ValueError: there is none; says what there is.
    """
    for name in ("", *names):
        node: Any = container
        for step in name.split(".") if name else ():
            node = node.get(step) if isinstance(node, Mapping) else None
        if isinstance(node, Mapping) and key in node:
            return node
    held = ", ".join(map(repr, list(container)[:8]))
    raise ValueError(
        f"no tensor {key!r}, neither at the top nor under {', '.join(names)}; the file holds {held}"
    )
