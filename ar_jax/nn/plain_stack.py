"""A stack of plain blocks, for sequences whose rows all see each other or the earlier ones."""

from __future__ import annotations

from typing import Any

from jax.typing import DTypeLike

from ar_jax.nn.blocks import Stack


def plain_stack(
    *,
    name: str,
    width: int,
    depth: int,
    heads: int,
    mlp_hidden: int,
    norm_epsilon: float,
    activation: str,
    attention_dropout: float,
    dropout: float,
    hidden_dropout: float,
    init_std: float,
    attention: str,
    remat: str,
    scan: bool,
    dtype: DTypeLike,
    post_norm: bool = False,
    row_steps: tuple[int, ...] | None = None,
) -> Stack:
    """Blocks with affine layer norms and biases whose rows all see each other.

    ``dropout`` follows attention and the feed-forward layer, ``hidden_dropout`` is inside of that.
    With ``row_steps`` rows do not see those of a later step.
    """
    fields: dict[str, Any] = dict(
        heads=heads,
        kv_heads=heads,
        kernel=attention,
        row_steps=row_steps,
        mlp_hidden=mlp_hidden,
        norm="affine_layernorm",
        norm_epsilon=norm_epsilon,
        modulation="none",
        qk_norm="none",
        logit_scale=(width // heads) ** -0.5,
        attention_bias="qkv",
        activation=activation,
        gated=False,
        mlp_bias=True,
        attention_dropout=attention_dropout,
        residual_dropout=dropout,
        mlp_hidden_dropout=hidden_dropout,
        mlp_dropout=dropout,
        init_std=init_std,
        out_init_std=init_std,
        gate_init=0.0,
        modulation_init=0.0,
        dtype=dtype,
        post_norm=post_norm,
    )
    block = tuple(fields.items())
    return Stack(depth=depth, block=block, scan=scan, remat=remat, drop_path=0.0, name=name)
