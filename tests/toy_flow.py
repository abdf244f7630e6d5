"""A small system of flow matching, with parameters that let every part speak."""

from __future__ import annotations

from typing import Any

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.objectives.flow_matching import FlowMatching
from ar_jax.objectives.likelihood import init_tokenizer
from tests.toy_masked import masked_config
from tests.toy_systems import CLASSES, loud_params

XAR: dict[str, Any] = dict(
    schedule=dict(name="next_entity", grid=4, entity="cell", parts=2),
    backbone=dict(
        name="noisy_decoder",
        code_width=2,
        num_classes=CLASSES,
        width=16,
        depth=2,
        heads=2,
        decoder_depth=1,
        decoder_heads=1,
    ),
    head=dict(name="velocity", code_width=2, sampling_steps=4),
    objective=dict(name="flow_matching"),
)

SCALES = (1, 2, 4)
FLOWAR: dict[str, Any] = dict(
    schedule=dict(name="next_scale", scales=SCALES),
    backbone=dict(
        name="decoder",
        num_classes=CLASSES,
        context="features",
        feature_width=2,
        width=16,
        depth=2,
        heads=2,
        mlp_hidden=24,
        positions="learned",
        norm="layernorm",
        norm_epsilon=1e-6,
        modulation="own",
        attention_bias="qkv",
        activation="silu",
        mlp_bias=True,
    ),
    head=dict(name="flow", code_width=2, width=8, depth=1, heads=2, sampling_steps=4),
    objective=dict(name="flow_matching"),
)


def flow_config(parts: dict[str, Any] = XAR, **changes: Any) -> dict[str, Any]:
    """xAR's or FlowAR's; 4 x 4 codes of 2 numbers. ``changes`` update the section of their name."""
    config = masked_config() | parts
    if parts is FLOWAR:
        config["tokenizer"] = config["tokenizer"] | {"scales": SCALES}
    for section, fields in changes.items():
        config[section] = {**config[section], **fields}
    return config


def flow_system(parts: dict[str, Any] = XAR, **changes: Any) -> tuple[System, dict[str, Any]]:
    """(system, {'tokenizer', 'backbone', 'head'})."""
    system = build_system(flow_config(parts, **changes))

    def init(key: Any) -> Any:
        return {"tokenizer": init_tokenizer(system, key), **FlowMatching(system=system).init(key)}

    return system, loud_params(init)
