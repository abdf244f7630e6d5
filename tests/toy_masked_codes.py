"""A small masked system of discrete codes, and one whose logits are given."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.objectives.masked_codes import MaskedCodes
from tests.toy_systems import CLASSES, loud_params, toy_config


def masked_codes_config(**changes: Any) -> dict[str, Any]:
    """4 x 4 codes of 8; ``changes`` are dictionaries that update the section they name."""
    config = toy_config("raster")
    config |= dict(
        schedule=dict(name="masked", grid=4, iterations=3, slack=1e-9),
        backbone=dict(
            name="bidirectional", vocab_size=8, num_classes=CLASSES, width=16, depth=2, heads=2
        ),
        objective=dict(name="masked_codes"),
    )
    for section, fields in changes.items():
        config[section] = {**config[section], **fields}
    return config


def masked_codes_system(**changes: Any) -> tuple[System, dict[str, Any]]:
    """(system, {'tokenizer', 'backbone', 'head'}), no gate, bias or scale at its quiet start."""
    system = build_system(masked_codes_config(**changes))

    def init(key: jax.Array) -> Any:
        return {"tokenizer": init_tokenizer(system, key), **MaskedCodes(system=system).init(key)}

    return system, loud_params(init)


@dataclasses.dataclass(frozen=True)
class GivenLogits:
    """A backbone whose hidden states are its parameters: the logits [classes + 1, L, V]."""

    classes: int

    @property
    def conditioner(self) -> GivenLogits:
        return self

    def null(self, cond: Any) -> Any:
        return {"label": jnp.full_like(cond["label"], self.classes)}

    def apply(self, variables: Any, codes: Any, cond: Any, known: Any) -> jax.Array:
        return variables["params"][cond["label"]]


def given_system(logits: np.ndarray, iterations: int = 1) -> tuple[System, dict[str, Any]]:
    """The system of `GivenLogits`, without a tokenizer, and its parameters."""
    classes, length, size = logits.shape
    system = System(
        tokenizer=None,
        schedule=schedules.masked(grid=(1, length), iterations=iterations),
        backbone=GivenLogits(classes - 1),
        head=CategoricalHead(vocab_size=size, bias=False, init_std=0.0),
    )
    return system, {"backbone": jnp.asarray(logits), "head": {"kernel": jnp.eye(size)}}
