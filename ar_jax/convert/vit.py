"""What MAR's and EAR's transformers share: ViT blocks, a head of adaptive MLP blocks, sizes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

from ar_jax.convert.part import shape_of
from ar_jax.convert.places import Places, Shape, dense, fused, fused_bias, reshaped, same

Shapes = Mapping[str, Shape]


def block(key: str, stack: str, width: int, heads: int, layer: int) -> Places:
    """A layer of one of our stacks of plain blocks."""
    head_width = width // heads
    root = f"{stack}/blocks"
    attention = f"{root}/attention"
    return {
        **norm(f"{key}.norm1", f"{root}/attention_norm", layer),
        f"{key}.attn.qkv.weight": fused(attention, (width, heads, head_width), layer),
        f"{key}.attn.qkv.bias": fused_bias(attention, (heads, head_width), layer),
        f"{key}.attn.proj.weight": dense(
            f"{attention}/out/kernel", (heads, head_width, width), 2, layer
        ),
        f"{key}.attn.proj.bias": same(f"{attention}/out/bias", layer),
        **norm(f"{key}.norm2", f"{root}/mlp_norm", layer),
        **linear(f"{key}.mlp.fc1", f"{root}/mlp/up", layer),
        **linear(f"{key}.mlp.fc2", f"{root}/mlp/down", layer),
    }


def adaptive_mlp(root: str, depth: int, width: int) -> Places:
    """The residual blocks of a head and its last layer."""
    places: Places = {}
    for i in range(depth):
        key, ours = f"{root}.res_blocks.{i}", f"head/blocks_{i}"
        places |= norm(f"{key}.in_ln", f"{ours}/norm")
        places |= linear(f"{key}.mlp.0", f"{ours}/mlp/up")
        places |= linear(f"{key}.mlp.2", f"{ours}/mlp/down")
        places |= modulation(f"{key}.adaLN_modulation.1", f"{ours}/modulation", 3, width)
    places |= linear(f"{root}.final_layer.linear", "head/output")
    final = f"{root}.final_layer.adaLN_modulation.1"
    return places | modulation(final, "head/final_modulation", 2, width)


def modulation(key: str, ours: str, vectors: int, width: int) -> Places:
    """A linear layer of several vectors."""
    return {
        f"{key}.weight": dense(f"{ours}/kernel", (width, vectors, width)),
        f"{key}.bias": reshaped(f"{ours}/bias", (vectors, width), (-1,)),
    }


def linear(key: str, ours: str, layer: int | None = None) -> Places:
    """A linear layer with its bias."""
    return {
        f"{key}.weight": dense(f"{ours}/kernel", layer=layer),
        f"{key}.bias": same(f"{ours}/bias", layer),
    }


def norm(key: str, ours: str, layer: int | None = None) -> Places:
    """A layer norm's scale and bias."""
    return {
        f"{key}.weight": same(f"{ours}/scale", layer),
        f"{key}.bias": same(f"{ours}/bias", layer),
    }


def mlp_ratio(shapes: Shapes, widths: Mapping[str, int], options: Mapping[str, Any]) -> float:
    """The one ratio of all feed-forward widths, which officially are int(width * ratio).

    Many ratios give the same widths: the option's, or the one of fewest digits.

    Args:
        widths: key of a first feed-forward weight -> width of its blocks.
    """
    inner = {key: shape_of(shapes, key)[0] for key in widths}

    def fits(ratio: float) -> bool:
        return all(int(width * ratio) == inner[key] for key, width in widths.items())

    said = options.get("mlp_ratio")
    if said is not None:
        if not fits(said):
            blocks = " and ".join(map(str, widths.values()))
            rows = " and ".join(f"{key!r} has {n}" for key, n in inner.items())
            raise ValueError(f"mlp_ratio is {said}, but for blocks of width {blocks} {rows} rows")
        return float(said)
    least = max(inner[key] / width for key, width in widths.items())
    end = min((inner[key] + 1) / width for key, width in widths.items())
    for ratio in (*(round(least, digits) for digits in range(16)), least, (least + end) / 2):
        if fits(ratio):
            return float(ratio)
    ratios = " and ".join(f"{key!r} {inner[key] / width:g}" for key, width in widths.items())
    raise ValueError(f"one ratio is for all feed-forward layers, but of their widths are {ratios}")


def heads_of(
    name: str,
    size: tuple[int, int],
    sizes: Mapping[tuple[int, int], int],
    options: Mapping[str, Any],
) -> int:
    """The option ``name``, or the heads of an official (depth, width) of ``sizes``.

    Raises:
        ValueError: neither says it.
    """
    if name not in options and size not in sizes:
        flag = "--heads=N" if name == "heads" else f"--option={name}=N"
        raise ValueError(
            f"{size[0]} blocks of width {size[1]} are no official size, and the tensors do not say "
            f"{name}, the number of heads: give it with {flag}"
        )
    return options.get(name, sizes.get(size))


def count_of(shapes: Shapes, pattern: str) -> int:
    """How many layers there are, by the key of one with ``{}`` in place of its number."""
    found = next(i for i in itertools.count() if pattern.format(i) not in shapes)
    if not found:
        raise ValueError(f"tensor {pattern.format(0)!r} is missing")
    return found
