"""Values of wrong types or out of range: named with their field when a run is built."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.field_types import check_types, describe, fits
from ar_jax.objectives.kl_tokenizer import KLTokenizerObjective
from ar_jax.objectives.masked import Masked
from ar_jax.train.fields import read_settings
from ar_jax.train.run import check_sections
from tests.test_build_errors import build_all, changed
from tests.toy_training import toy_config


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, np.int64(3)], ["3", 3.0, True, None, (3,)]),
        (float, [3, 3.5, np.float32(3)], ["3.5", False, None]),
        (bool, [True], [1, "True", None]),
        (str, ["a"], [1, None, ("a",)]),
        (int | None, [3, None], ["3", 0.5]),
        (tuple[int, ...], [(), (1, 2), [1, 2]], [1, "12", (1, "2"), (1, 2.5)]),
        (tuple[int, int] | None, [(1, 2), None], [(1,), (1, 2, 3), 1]),
        (Sequence[str], [("a",), []], ["a", (1,)]),
        (int | Sequence[int], [1, (1, 2)], ["1", (1, "2")]),
        (Sequence[int | Sequence[int]], [(1, (2, 3))], [4, ("1",)]),
        (jnp.ndarray | float, [1, 0.5, jnp.ones(())], ["1", None]),
        (Any, [1, "1", None], []),
    ],
    ids=str,
)
def test_values_of_a_type(hint, good, bad):
    assert [value for value in good if not fits(value, hint)] == []
    assert [value for value in bad if fits(value, hint)] == []


def test_types_are_written_as_in_the_code():
    assert describe(int) == "int"
    assert describe(int | None) == "int | None"
    assert describe(tuple[int, ...] | None) == "tuple[int, ...] | None"
    assert describe(Sequence[str]) == "Sequence[str]"


def test_the_field_its_value_and_the_wanted_type_are_named():
    def take(width: int, rate: float = 0.0, free: Any = None) -> None: ...

    check_types("part", {"width": 3, "rate": 1, "free": object(), "unknown": 1}, take)
    with pytest.raises(ValueError, match=r"^part\.width='3' must be of type int$"):
        check_types("part", {"rate": 0.5, "width": "3"}, take)


# (system, field, value, words of the message)
CASES: list[tuple[str, str, Any, list[str]]] = [
    ("raster", "backbone.width", "16", ["backbone.width='16'", "type int"]),
    ("raster", "backbone.rope_base", "x", ["backbone.rope_base='x'", "type float"]),
    ("raster", "backbone.gated", 1, ["backbone.gated=1", "type bool"]),
    ("raster", "backbone.kv_heads", 2.0, ["backbone.kv_heads=2.0", "type int | None"]),
    ("raster", "head.bias", "yes", ["head.bias='yes'", "type bool"]),
    ("raster", "schedule.grid", "4", ["schedule.grid='4'", "int | Sequence[int]"]),
    ("raster", "tokenizer.codebook_size", 8.0, ["tokenizer.codebook_size=8.0", "type int"]),
    (
        "raster",
        "tokenizer.autoencoder.multipliers",
        2,
        ["tokenizer.autoencoder.multipliers=2", "tuple[int, ...]"],
    ),
    ("raster", "objective.label_dropout", "0.1", ["objective.label_dropout='0.1'", "type float"]),
    ("raster", "sampling.top_k", "5", ["sampling.top_k='5'"]),
    ("raster", "sampling.guidance.scale", "2", ["sampling.guidance.scale='2'", "type float"]),
    # Ranges, which would train or sample something else without a word.
    ("raster", "objective.label_dropout", 1.5, ["objective.label_dropout is 1.5", "[0, 1]"]),
    (
        "next_scale",
        "objective.self_correction",
        1.5,
        ["objective.self_correction is 1.5", "[0, 1]"],
    ),
    ("raster", "objective.label_smoothing", -0.1, ["objective.label_smoothing is -0.1", "[0, 1]"]),
    ("raster", "sampling.guidance.power", -1.0, ["sampling.guidance.power is -1.0", ">= 0"]),
    # Sizes that failed in the first trace, with words of a library.
    (
        "raster",
        "backbone.heads",
        8,
        ["backbone.width 16", "backbone.heads 8", "2", "multiple of 4"],
    ),
    (
        "raster",
        "tokenizer.autoencoder.groups",
        3,
        ["tokenizer.autoencoder.groups is 3", "tokenizer.autoencoder.channels 4"],
    ),
    ("raster", "tokenizer.autoencoder.groups", 0, ["tokenizer.autoencoder.groups is 0"]),
    (
        "raster",
        "tokenizer.autoencoder",
        dict(name="pooled", image_size=8, image_channels=1, code_width=4, channels=4)
        | dict(multipliers=(1, 2), groups=3),
        ["tokenizer.autoencoder.groups is 3", "tokenizer.autoencoder.channels 4"],
    ),
]
TOKENIZER_FIELDS = [("l1", -1.0), ("l2", -1.0), ("codebook", -0.1), ("commitment", -0.25)]
TOKENIZER_FIELDS += [("entropy", -0.1), ("usage_decay", 1.0), ("ema_decay", -0.1)]
TOKENIZER_FIELDS += [("restart_below", 1.0), ("restart_below", -0.1)]
CASES += [
    ("raster", "objective", {"name": "tokenizer", field: value}, [f"objective.{field} is {value}"])
    for field, value in TOKENIZER_FIELDS
]


@pytest.mark.parametrize(
    ("name", "path", "value", "words"), CASES, ids=[f"{c[1]}={c[2]}"[:50] for c in CASES]
)
def test_a_system_s_fields(name, path, value, words):
    with pytest.raises(ValueError) as error:
        build_all(changed(name, path, value))
    for word in words:
        assert word in str(error.value), str(error.value)


@pytest.mark.parametrize(
    ("objective", "fields"),
    [
        (Masked, dict(system=None, label_dropout=-0.1)),
        (KLTokenizerObjective, dict(tokenizer=None, kl=-1e-6)),
        (KLTokenizerObjective, dict(tokenizer=None, l2=math.inf)),
    ],
)
def test_objectives_of_continuous_codes(objective, fields):
    (_, (field, value)) = fields.items()
    with pytest.raises(ValueError, match=rf"objective\.{field} is {value}"):
        objective(**fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train__steps", "100", r"^config\.train\.steps='100' must be of type int$"),
        ("train__batch_size", 16.0, r"^config\.train\.batch_size=16\.0 must be of type int$"),
        ("optimizer__learning_rate", "1e-3", r"^config\.optimizer\.learning_rate='1e-3' must"),
        ("optimizer__no_decay", "bias", r"no_decay='bias' must be of type Sequence\[str\]$"),
        ("ema__warmup", 1, r"^config\.ema\.warmup=1 must be of type bool$"),
        ("mesh__data", "8", r"^config\.mesh\.data='8' must be of type int$"),
        ("seed", "0", r"^config\.seed='0' must be of type int$"),
    ],
)
def test_what_the_loop_reads(field, value, message):
    config = toy_config().to_dict()
    *sections, name = field.split("__")
    (config[sections[0]] if sections else config)[name] = value
    with pytest.raises(ValueError, match=message):
        read_settings(config)


def test_an_objective_without_a_name():
    with pytest.raises(ValueError, match=r"objective\.name is missing; .*'likelihood'.*tokenizer"):
        check_sections({"objective": {"label_dropout": 0.1}})
