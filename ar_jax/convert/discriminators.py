"""Discriminators: the official state_dicts of LlamaGen's two and of 1d-tokenizer's.

Our variables are ``{'params': ..., 'batch_stats': ...}``, the latter of PatchGAN's norms alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert.part import Buffer, Part, shape_of
from ar_jax.convert.places import Place, Places, Shape, convolution, dense, same
from ar_jax.nn.discriminators import PatchDiscriminator, PooledDiscriminator, StyleDiscriminator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """A discriminator of ours and where the official tensors are in it.

    Attributes:
        module: of the sizes that the shapes say.
        part: its table of places and its buffers.
    """

    module: Any
    part: Part

    def expected(self, image_shape: tuple[int, int, int]) -> Any:
        """Shapes of our variables for images of a shape."""
        images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
        return jax.eval_shape(self.module.init, jax.random.key(0), images)


def patchgan(shapes: Mapping[str, Shape]) -> Released:
    """LlamaGen's discriminator_patchgan.py, which is taming-transformers'."""
    layers = sum(key.endswith("running_mean") for key in shapes)
    places = _convolution("main.0", "conv0")
    buffers = {}
    for i in range(1, layers + 1):
        norm = f"main.{3 * i}"
        places |= _convolution(f"main.{3 * i - 1}", f"conv{i}", bias=False)
        places[f"{norm}.weight"] = same(f"params/norm{i}/scale")
        places[f"{norm}.bias"] = same(f"params/norm{i}/bias")
        places[f"{norm}.running_mean"] = same(f"batch_stats/norm{i}/mean")
        places[f"{norm}.running_var"] = same(f"batch_stats/norm{i}/var")
        buffers[f"{norm}.num_batches_tracked"] = Buffer(shape=(), made_by="the norm")
    places |= _convolution(f"main.{3 * layers + 2}", f"conv{layers + 1}")
    module = PatchDiscriminator(channels=shape_of(shapes, "main.0.weight")[0], layers=layers)
    return Released(module=module, part=Part(section={}, places=places, buffers=buffers))


def stylegan(shapes: Mapping[str, Shape]) -> Released:
    """LlamaGen's discriminator_stylegan.py; for square images of a power of two."""
    width = shape_of(shapes, "final_conv.0.weight")[0]
    places = _convolution("blocks.0", "conv_in")
    buffers = {}
    for i in range(sum(key.endswith("conv_res.weight") for key in shapes)):
        theirs, ours = f"blocks.{i + 2}", f"block{i}"
        places |= _convolution(f"{theirs}.conv_res", f"{ours}/shortcut")
        places |= _convolution(f"{theirs}.net.0", f"{ours}/conv0")
        places |= _convolution(f"{theirs}.net.2", f"{ours}/conv1")
        places |= _convolution(f"{theirs}.downsample.1", f"{ours}/down")
        buffers[f"{theirs}.downsample.0.f"] = Buffer(shape=(3,), made_by="the blur")
    places |= _convolution("final_conv.0", "conv_out")
    places["final_linear.0.weight"] = _flattened("params/hidden/kernel", (width, 4, 4))
    places["final_linear.0.bias"] = same("params/hidden/bias")
    places["final_linear.2.weight"] = dense("params/output/kernel")
    places["final_linear.2.bias"] = same("params/output/bias")
    part = Part(section={}, places=places, buffers=buffers)
    return Released(module=StyleDiscriminator(width=width), part=part)


def pooled(shapes: Mapping[str, Shape]) -> Released:
    """1d-tokenizer's modules/discriminator.py."""
    stages = sum(key.endswith(".1.kernel") for key in shapes)
    places = _convolution("block_in.0", "conv_in")
    buffers = {}
    for i in range(stages):
        places |= _convolution(f"blocks.{i}.0", f"stage{i}/conv")
        places[f"blocks.{i}.2.weight"] = same(f"params/stage{i}/norm/scale")
        places[f"blocks.{i}.2.bias"] = same(f"params/stage{i}/norm/bias")
        buffers[f"blocks.{i}.1.kernel"] = Buffer(shape=(1, 1, 4, 4), made_by="the blur")
    places |= _convolution("to_logits.0", "hidden") | _convolution("to_logits.2", "output")
    channels = shape_of(shapes, "block_in.0.weight")[0]
    part = Part(section={}, places=places, buffers=buffers)
    return Released(module=PooledDiscriminator(channels=channels, stages=stages), part=part)


def _convolution(theirs: str, ours: str, bias: bool = True) -> Places:
    places = {f"{theirs}.weight": convolution(f"params/{ours}/kernel")}
    return places | ({f"{theirs}.bias": same(f"params/{ours}/bias")} if bias else {})


def _flattened(path: str, shape: Shape) -> Place:
    """A linear weight [out, C h w] of a map (C, h, w) that we flatten with the channels last."""
    channels, height, width = shape

    def ours(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1, channels, height, width).transpose(2, 3, 1, 0).reshape(-1, len(a))

    def official(a: np.ndarray) -> np.ndarray:
        return a.reshape(height, width, channels, -1).transpose(3, 2, 0, 1).reshape(a.shape[1], -1)

    return Place((path,), ours, official)
