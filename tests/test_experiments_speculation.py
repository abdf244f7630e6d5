"""Speculation from the command line: figures of the benchmark, what is said and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import app

from ar_jax.build import build_objective
from ar_jax.convert.conversion import Converted
from ar_jax.convert.directory import write_directory
from ar_jax.evaluation.speculation import Speculation, call_figures, law_distance, load_draft
from ar_jax.sampling.loop import CachedSampler
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import script, smoke_config
from tests.toy_systems import toy_params

pytestmark = pytest.mark.usefixtures("quick_compilation")


def write_raster(folder: Path, tokenizer: Any = None, **changes: Any) -> CachedSampler:
    """A LlamaGen on 28x28 images, as if it had been trained on codes of a tokenizer."""
    config = smoke_config("llamagen", ema__decay=0.0, **changes)
    config.tokenizer_checkpoint = ""
    system = build_objective(config).system  # type: ignore[attr-defined]
    params = toy_params(system)
    params["tokenizer"] = tokenizer or params["tokenizer"]
    write_directory(Converted(config.to_dict(), params, "generator"), folder)
    return CachedSampler.create(system, params)


@pytest.mark.slow
def test_the_benchmark_and_the_script_of_samples(tmp_path, capsys):
    tokenizer = write_raster(tmp_path / "large").params["tokenizer"]
    write_raster(tmp_path / "small", tokenizer, backbone__depth=1)
    out = tmp_path / "found.json"
    flags = [f"--workdir={tmp_path / 'large'}", f"--draft={tmp_path / 'small'}", f"--out={out}"]
    flags += ["--num_images=10", "--batch_size=5", "--turns=1", "--windows=4", "--branches=2-1"]
    with script("benchmarks/speculation", *flags) as module:
        module.main(["speculation"])
    found = json.loads(out.read_text())
    assert len(found["rules"]) == 7 and found["about"]["steps"] == 49
    rules = {name: figures for name, figures in found["rules"].items() if "plain" not in name}
    for figures in rules.values():
        assert 49 / 5 <= figures["calls_per_image"] <= figures["calls_per_batch"] <= 49
        assert figures["steps_saved"] == pytest.approx(49 / figures["calls_per_image"])
    assert out.with_suffix(".md").read_text().count("lossy") == 1

    picture = [f"--out={tmp_path / 'some.png'}", "--num_images=3", "--overwrite"]
    both = [f"--checkpoint={tmp_path / 'large'}", *picture]
    ways = (["--speculate=draft", f"--draft={tmp_path / 'small'}"], ["--speculate=gumbel"])
    for way in ways:
        with script("sample", *both, *way) as module:
            module.main(["sample"])
        assert "steps per image: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--window=4"], "--window=4 goes with --speculate"),
        (["--speculate=gumbel", "--draft=x"], "--draft=x means nothing to gumbel"),
        (["--speculate=draft", "--draft=x", "--branches=2,x"], "--branches=2,x must be numbers"),
    ],
)
def test_flags_that_do_not_fit(flags, message):
    with (
        script("sample", "--checkpoint=x", "--out=x.png", *flags) as module,
        pytest.raises(app.UsageError, match=message),
    ):
        module.speculation()


def test_rules_and_their_drafting_models(tmp_path):
    for wrong in (dict(rule="draft"), dict(rule="gumbel", draft="x"), dict(rule="best")):
        with pytest.raises(ValueError, match="speculation is '"):
            Speculation(**wrong)  # type: ignore[arg-type]
    sampler = write_raster(tmp_path / "large")
    assert load_draft(tmp_path / "large", sampler).system == sampler.system
    zeros = jax.tree.map(jnp.zeros_like, sampler.params)
    other = CachedSampler(sampler.system, zeros)
    with pytest.raises(ValueError, match="codes of another tokenizer"):
        load_draft(tmp_path / "large", other)


def test_figures():
    found = call_figures(np.array([10, 20, 30, 20, 20]), 40, 2)
    assert found["calls_per_image"] == 20 and found["steps_saved"] == 2
    assert found["calls_per_batch"] == pytest.approx((20 + 30 + 20) / 3)
    rng = np.random.default_rng(0)
    plain, same = rng.normal(100, 5, 2_000), rng.normal(100, 5, 2_000)
    assert law_distance(same, plain)["chi_square_p"] > 1e-3
    found = law_distance(same + 2, plain)
    assert found["chi_square_p"] < 1e-9 and found["nats_off_in_standard_errors"] > 5
    # Of two normals 0.4 deviations apart it is 2 Phi(0.2) - 1 = 0.159.
    assert found["total_variation_of_nats"] == pytest.approx(0.159, abs=0.03)
