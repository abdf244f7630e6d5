"""A small convolutional classifier, and its features for a perceptual distance."""

from __future__ import annotations

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

# Matrix units of accelerators round float32 operands to bfloat16 unless told otherwise, and the
# same images would then score differently from one machine to the next.
_PRECISION = jax.lax.Precision.HIGHEST
BATCH_NORM_EPSILON = 1e-5


class ConvClassifier(nn.Module, kw_only=True):
    """Strided stem, residual convolutions at half and at quarter size, one dense layer.

    Attributes:
        num_classes: number of logits.
        widths: channels at half and at quarter resolution.
        blocks: residual convolutions at half and at quarter resolution.
        num_features: width of the penultimate layer.
        dropout: rate on the penultimate layer while training.
        batch_norm: normalise before every ReLU, as in training; the shipped parameters have the
            normalisation folded in (`fold_batch_norm`) and are read without it.
    """

    num_classes: int = 10
    widths: tuple[int, int] = (32, 64)
    blocks: tuple[int, int] = (1, 2)
    num_features: int = 64
    dropout: float = 0.1
    batch_norm: bool = False

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> tuple[jax.Array, jax.Array]:
        """Images in 0..255 [B, H, W, C], H and W multiples of 4, to logits and features (float32).

        Returns:
            logits [B, num_classes] and penultimate features [B, num_features] (after the ReLU).
        """
        bias = not self.batch_norm
        layer = functools.partial(self._layer, train=train)
        conv = functools.partial(
            nn.Conv, use_bias=bias, precision=_PRECISION, kernel_init=nn.initializers.he_normal()
        )
        # Zero is the background of the pictures and the padding of the convolutions alike.
        x = images.astype(jnp.float32) / 255.0  # [B, H, W, C]
        for stage, (width, blocks) in enumerate(zip(self.widths, self.blocks, strict=True)):
            kernel = 5 if stage == 0 else 3
            x = layer(conv(width, (kernel, kernel), strides=(2, 2), name=f"down_{stage}"), x)
            for block in range(blocks):
                x = x + layer(conv(width, (3, 3), name=f"block_{stage}_{block}"), x)
            self.sow("intermediates", f"stage_{stage}", x)
        x = x.reshape(x.shape[0], -1)  # [B, H/4 * W/4 * widths[-1]]
        dense = nn.Dense(self.num_features, use_bias=bias, precision=_PRECISION, name="features")
        features = layer(dense, x)
        hidden = nn.Dropout(self.dropout, deterministic=not train)(features)
        logits = nn.Dense(self.num_classes, precision=_PRECISION, name="logits")(hidden)
        return logits, features

    def _layer(self, affine: nn.Module, x: jax.Array, train: bool) -> jax.Array:
        x = affine(x)  # type: ignore[operator]
        if self.batch_norm:
            x = nn.BatchNorm(
                use_running_average=not train,
                momentum=0.98,
                epsilon=BATCH_NORM_EPSILON,
                use_fast_variance=False,
                name=f"{affine.name}_norm",
            )(x)
        return nn.relu(x)


def stage_features(module: ConvClassifier, params: Any, images: jax.Array) -> list[jax.Array]:
    """Feature maps [B, H/2, W/2, C] and [B, H/4, W/4, C] of images in [-1, 1] [B, H, W, C]."""
    _, state = module.apply({"params": params}, (images + 1.0) * 127.5, mutable=["intermediates"])
    return [state["intermediates"][f"stage_{i}"][0] for i in range(len(module.widths))]
