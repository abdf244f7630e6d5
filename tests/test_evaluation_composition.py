"""Samplers with other models and a search around them, by the names that flags give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import app

from ar_jax.build import build_objective
from ar_jax.convert.conversion import Converted
from ar_jax.convert.directory import write_directory
from ar_jax.evaluation.composition import Composition
from ar_jax.sampling.refine import RefineSampler
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import script
from tests.tiny_runs import tiny_generator
from tests.toy_systems import toy_params


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> Path:
    """Generators 'a' and 'b' of the same codes, and 'c' of others."""
    folder = tmp_path_factory.mktemp("composition")
    config: Any = tiny_generator("")
    config.ema.decay = 0.0
    system = build_objective(config).system  # type: ignore[attr-defined]
    params = {name: toy_params(system, seed) for seed, name in enumerate("abc")}
    params["b"] |= {"tokenizer": params["a"]["tokenizer"]}
    for name, trees in params.items():
        write_directory(Converted(config.to_dict(), trees, "generator"), folder / name)
    return folder


@pytest.mark.slow  # a program for each set of flags
@pytest.mark.usefixtures("quick_compilation")
def test_flags_of_the_command(workdirs, tmp_path):
    def draw(name: str, *flags: str) -> tuple[np.ndarray, str]:
        out, npz = tmp_path / f"{name}.png", tmp_path / f"{name}.npz"
        common = (f"--checkpoint={workdirs / 'a'}", f"--out={out}", f"--npz={npz}", "--labels=0,2")
        with script("sample", *common, *flags) as sample:
            sample.main(["sample"])
        with np.load(npz) as arrays:
            return arrays["arr_0"], npz.with_suffix(".json").read_text()

    other = f"--weak={workdirs / 'b'}"
    ordinary, _ = draw("ordinary", "--guidance=2")
    weak, said = draw("weak", other, "--guidance=2")
    assert f"guided away from {workdirs / 'b'} (parameters of step" in said
    assert not np.array_equal(weak, ordinary)
    same, said = draw("same", f"--weak={workdirs / 'a'}", "--weak_null", "--guidance=2")
    assert "guided away from without condition" in said
    np.testing.assert_array_equal(same, ordinary)
    rewards = (f"--rewards={workdirs / 'b'}", "--reward_weights=0.5")
    steps = ("--step_guidance=1,2,3", "--step_top_k=0,3,2", "--entropy_gain=2.5")
    found, said = draw("found", other, *rewards, *steps, "--beams=2", "--beam_candidates=3")
    assert "2 beams of 3 drawn candidates" in said and "reward 0.5 of" in said
    assert "guidance 1, 2, 3 (steps)" in said and "top-k 0, 3, 2 by step" in said
    assert found.shape == ordinary.shape and not np.array_equal(found, ordinary)


@pytest.mark.parametrize(
    "flags", [("--step_top_k=1,2.5,3",), ("--step_guidance=1,2,3", "--guidance=2")]
)
def test_flags_that_mean_nothing(flags, workdirs, tmp_path):
    common = (f"--checkpoint={workdirs / 'a'}", f"--out={tmp_path / 'a.png'}")
    with script("sample", *common, *flags) as sample, pytest.raises(app.UsageError):
        sample.main(["sample"])


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (dict(weak_null=True), "name one with --weak"),
        (dict(rewards=("a", "b"), reward_weights=(1.0,)), "1 numbers for 2 models"),
        (dict(beams=-1), "--beams=-1"),
        (dict(likeliest=True), "say how many --beams"),
    ],
)
def test_what_is_given_without_what_it_goes_with(fields, words):
    with pytest.raises(ValueError, match=words):
        Composition(**fields)


def test_samplers_of_sets_take_none_of_it():
    masked: Any = RefineSampler.__new__(RefineSampler)
    plain: Any = Composition().around(masked, "somewhere")
    assert plain is masked
    with pytest.raises(ValueError, match="somewhere has a RefineSampler"):
        Composition(beams=2).around(masked, "somewhere")
