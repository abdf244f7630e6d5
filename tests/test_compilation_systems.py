"""Which programs of which systems are compiled, from what inputs, and what is searched for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective
from ar_jax.compilation import ahead, trials
from ar_jax.compilation import target as targets
from ar_jax.compilation.ahead import batch_shapes, check_inputs, frozen_params
from ar_jax.compilation.phases import decode_phase, sample_phase, train_phase
from ar_jax.compilation.target import check_program, prepare
from ar_jax.compilation.trials import Trials
from ar_jax.parallel.mesh import use_mesh
from configs.imagenet256.maskgit import get_config
from tests.smoke_runs import ROOT, smoke_config
from tests.tpu_compiler import needs_compiler


@pytest.fixture
def four_devices(monkeypatch):
    """Devices of this machine in place of a topology's."""
    for module in (targets, trials):
        monkeypatch.setattr(module, "topology_devices", lambda *_: jax.devices()[:4])


def test_a_tokenizer_only_trains_and_on_images():
    tokenizer, generator = smoke_config("tokenizer_kl"), smoke_config("mar")
    check_program(tokenizer, "train")
    for program in ("train", "sample", "decode"):
        check_program(generator, program)
    for program in ("sample", "decode"):
        with pytest.raises(ValueError, match=rf"--program={program} is of generators, but .*token"):
            check_program(tokenizer, program)
    with pytest.raises(ValueError, match="--program='eval' is none of"):
        check_program(generator, "eval")
    assert (check_inputs(tokenizer, None), check_inputs(generator, None)) == ("images", "codes")
    assert check_inputs(tokenizer, "images") == check_inputs(generator, "images") == "images"
    with pytest.raises(ValueError, match="--inputs='codes': a tokenizer trains on images"):
        check_inputs(tokenizer, "codes")
    with pytest.raises(ValueError, match="--inputs='latents' is none of"):
        check_inputs(generator, "latents")


def test_a_step_reads_what_training_feeds_it():
    objective: Any = build_objective(smoke_config("mar"))
    length, width = objective.system.tokenizer.codes_shape
    batch = batch_shapes(objective, 6, "codes")
    assert (batch["codes"].shape, batch["codes"].dtype) == ((6, length, 2 * width), jnp.float32)
    assert batch["label"].shape == (6,)
    assert list(frozen_params(objective)) == ["tokenizer"]
    tokenizer = build_objective(smoke_config("tokenizer_kl"))
    (image,) = batch_shapes(tokenizer, 6, "images").values()
    assert (image.shape, image.dtype) == ((6, 28, 28, 1), jnp.uint8)
    assert frozen_params(tokenizer) == {}


def test_attention_is_what_a_tpu_would_choose(four_devices):
    config = smoke_config("mar", backbone__attention_dropout=0.1)
    chosen = {
        program: prepare(config, "v5e:2x2", 8, program=program) for program in targets.PROGRAMS
    }
    kernels = {program: one.objective.system.backbone.attention for program, one in chosen.items()}
    assert kernels == {"train": "xla", "sample": "splash", "decode": "splash"}
    assert [one.remat for one in chosen.values()] == ["none", None, None]
    assert config.attention == "auto" and config.backbone.attention_dropout == 0.1
    assert prepare(smoke_config("mar"), "v5e:2x2", program="train").config.attention == "splash"
    assert prepare(smoke_config("tokenizer_kl"), "v5e:2x2", program="train").remat is None


def searched(name: str, program: str) -> tuple[set[Any], set[Any], dict[str, Any]]:
    found = Trials(config=smoke_config(name), topology="v5e:2x2", program=program)
    candidates = found.candidates([8, 16])
    assert {one.batch_size for one in candidates} == {8, 16}
    assert {one.data * one.fsdp * one.tensor for one in candidates} == {4}
    return {one.remat for one in candidates}, {one.tensor for one in candidates}, found.settings()


@pytest.fixture
def lowered(monkeypatch) -> list[Any]:
    """What would be compiled; reports hold the model's FLOPs alone."""
    lowered: list[Any] = []

    def lower_only(target, lower):
        with use_mesh(target.mesh):
            lowered.append(lower())

    monkeypatch.setattr(ahead, "compile_for", lower_only)
    monkeypatch.setattr(ahead, "report", lambda *arguments: {"flops": arguments[4]})
    return lowered


def test_a_tokenizer_s_step_has_its_discriminator_and_its_perceptual_network(four_devices, lowered):
    config = smoke_config("tokenizer_vq")
    config.objective.adversarial.weight = 0.5
    config.objective.update(perceptual=0.1, perceptual_network="classifier")
    assert ahead.compile_train_step(config, "v5e:2x2")["flops"] > 0
    (state, frozen, *_), _ = lowered[0].args_info
    assert set(state.adversary) == {"params", "opt_state", "stats"}
    assert set(frozen) == {"perceptual"}


@pytest.mark.slow  # lowers for TPUs
@pytest.mark.parametrize("config", ["smoke", pytest.param("imagenet256", marks=pytest.mark.slow)])
def test_masked_codes_are_lowered(config, four_devices, lowered):
    """A step, a guided sampler and a decoder; more iterations take as many more FLOPs."""
    config = smoke_config("maskgit") if config == "smoke" else get_config()
    config.train.batch_size = 8
    assert ahead.compile_train_step(config, "v5e:2x2")["flops"] > 0
    (_, _, batch, _), _ = lowered[-1].args_info
    assert batch["codes"].shape == (8, config.schedule.grid**2)
    sampled = ahead.compile_sampler(config, "v5e:2x2", batch_size=8)
    assert sampled["guided"] == (config.sampling.guidance.scale != 1)
    assert ahead.compile_decoder(config, "v5e:2x2", batch_size=8)["flops"] > 0
    with config.unlocked():
        config.schedule.iterations *= 2
    twice = ahead.compile_sampler(config, "v5e:2x2", batch_size=8)["flops"]
    np.testing.assert_allclose(twice, 2 * sampled["flops"], rtol=1e-6)


@pytest.mark.slow  # lowers for TPUs
@pytest.mark.parametrize("name", ["xar", "flowar"])
def test_flows_are_lowered(name, four_devices, lowered):
    """A step, a guided sampler and a decoder; twice the evaluations take less than twice the FLOPs.

    Beside them a pass of every clean cell but the last, or one of the decoder.
    """
    config = smoke_config(name)
    assert ahead.compile_train_step(config, "v5e:2x2", batch_size=8)["flops"] > 0
    (_, _, batch, _), _ = lowered[-1].args_info
    assert batch["codes"].shape == (8, 49, 8)
    sampled = ahead.compile_sampler(config, "v5e:2x2", batch_size=8)
    assert sampled["guided"] and sampled["attention"] == "xla (cached)"
    assert ahead.compile_decoder(config, "v5e:2x2", batch_size=8)["flops"] > 0
    config.head.sampling_steps *= 2
    twice = ahead.compile_sampler(config, "v5e:2x2", batch_size=8)["flops"]
    assert 1.2 < twice / sampled["flops"] < 2


def test_what_is_searched_for_each_system(four_devices, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda package: "1.0")  # libtpu is optional
    remats, tensors, settings = searched("tokenizer_kl", "train")
    assert (remats, tensors, settings["inputs"]) == ({"none"}, {1}, "images")
    remats, tensors, settings = searched("mar", "train")
    assert (remats, settings["inputs"]) == ({"none", "dots", "block"}, "codes")
    heads = smoke_config("mar").backbone
    assert tensors == {n for n in (1, 2, 4) if not (heads.heads % n or heads.decoder_heads % n)}
    assert searched("mar", "sample")[0] == {"none"}
    remats, tensors, settings = searched("var", "decode")
    assert (remats, tensors) == ({"none"}, {1}) and "inputs" not in settings
    with pytest.raises(ValueError, match="--program=decode is of generators"):
        searched("tokenizer_kl", "decode")


@pytest.mark.parametrize(
    ("phase", "op_name", "expected"),
    [
        (train_phase, "jit(train_step)/jvp(tokenizer)/KLTokenizer.codes_of/exp", "tokenizer"),
        (train_phase, "jit(train_step)/jvp(KLTokenizer)/autoencoder/encoder/conv", "forward"),
        (train_phase, "jit(train_step)/transpose(jvp(Tokenizer))/quantizer/dot", "backward"),
        (
            sample_phase,
            "jit(draw_codes)/while/body/refine_backbone/EncoderDecoder.decode/dot",
            "refine_backbone",
        ),
        (
            sample_phase,
            "jit(draw_codes)/while/body/refine_head/while/body/DiffusionHead/dot",
            "refine_head",
        ),
        (sample_phase, "jit(draw_codes)/while/body/scatter", None),
        (decode_phase, "jit(decode_codes)/Tokenizer.decode/quantizer.lookup/take", "quantizer"),
        (decode_phase, "jit(decode_codes)/KLTokenizer.decode/autoencoder/decoder/conv", "decoder"),
        (decode_phase, "jit(decode_codes)/Tokenizer.decode/max", None),
    ],
)
def test_phases(phase, op_name, expected):
    assert phase(op_name) == expected


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "program", "phases"),
    [
        ("mar", "train", {"forward", "head and loss", "head and loss backward", "backward"}),
        ("mar", "sample", {"refine_backbone", "refine_head"}),
        ("mar", "decode", {"decoder"}),
        ("var", "decode", {"quantizer", "decoder"}),
        ("tokenizer_kl", "train", {"forward", "backward", "optimizer"}),
        ("tokenizer_multiscale", "train", {"forward", "backward", "optimizer"}),
    ],
)
@needs_compiler
def test_every_program_compiles_for_a_topology(config, program, phases, tmp_path):
    out = tmp_path / "report.json"
    command = [sys.executable, "experiments/compile_ahead.py", "--topology=v5e:2x2"]
    command += [f"--config=configs/fashion_mnist/{config}.py:smoke", f"--program={program}"]
    command += ["--config.mesh.data=2", "--config.mesh.fsdp=2", f"--out={out}", "--batch_size=16"]
    done = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    report = json.loads(out.read_text())
    assert (report["program"], report["batch_size"], report["fits"]) == (program, 16, True)
    assert phases <= set(report["phases"])
    seconds = report["seconds"]["compiler"]
    taken = {name: row["compiler"] for name, row in report["phases"].items()}
    assert np.isclose(sum(taken.values()), seconds) and taken.get("other", 0) < 0.5 * seconds
    assert 0 < report["mfu"] < 1 and report["model_flops_rule"] in done.stdout
