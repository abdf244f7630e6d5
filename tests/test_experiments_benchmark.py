"""The throughput benchmark: what it times, and what it writes."""

from __future__ import annotations

import json

import jax
import pytest

from ar_jax.train.benchmark import benchmark
from tests.quick_compilation import quick_compilation  # noqa: F401
from tests.smoke_runs import ROOT, script, smoke_config

CONFIGS = ROOT / "configs" / "fashion_mnist"


def check(measured: dict, images: int, tokens: int) -> None:
    assert measured["batch_size"] == images
    seconds = measured["call_seconds"]
    assert 0 < measured["fastest_call_seconds"] <= seconds <= measured["slowest_call_seconds"]
    assert measured["images_per_second"] == images / seconds
    assert measured["tokens_per_second"] == pytest.approx(images * tokens / seconds)
    assert measured["compile_seconds"] > 0
    assert measured["process_peak_bytes"] > 2**20
    assert measured["program"]["argument_bytes"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_generator_by_the_script(tmp_path, capsys):
    out = tmp_path / "new" / "throughput.json"
    arguments = (f"--config={CONFIGS / 'llamagen.py'}:smoke", f"--out={out}", "--inputs=codes")
    counts = ("--steps=3", "--warmup=1", "--batch_size=16", "--sample_batch_size=4")
    with script("benchmarks/throughput", *arguments, *counts, "--config.mesh.fsdp=2") as throughput:
        throughput.main(["throughput"])
    result = json.loads(out.read_text())
    assert json.loads(capsys.readouterr().out) == result
    assert list(result) == ["environment", "parameters", "train", "sample", "decode"]
    check(result["train"], 16, 49)
    check(result["sample"], 4, 49)
    check(result["decode"], 4, 49)
    assert result["train"]["mesh"] == {"data": 4, "fsdp": 2, "tensor": 1}
    assert result["train"]["inputs"] == "codes"
    assert result["sample"]["guided"]
    assert result["environment"]["devices"] == f"8 x {jax.devices()[0].device_kind}"


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.slow
def test_tokenizer():
    result = benchmark(smoke_config("tokenizer_vq"), steps=1, warmup=0, sample_batch_size=2)
    assert list(result) == ["environment", "parameters", "train", "encode", "decode"]
    check(result["train"], 8, 49)
    check(result["encode"], 2, 49)
    check(result["decode"], 2, 49)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inputs": "latents"}, "--inputs='latents' is none of"),
        ({"inputs": "codes"}, "a tokenizer trains on images"),
        ({"steps": 0}, "--steps=0 must be at least 1"),
        ({"warmup": -1}, "--warmup=-1 must be at least 0"),
        ({"batch_size": 12}, r"config\.train\.batch_size=12 must be a multiple of 8"),
        ({"sample_batch_size": 0}, "--sample_batch_size=0 must be at least 1"),
    ],
)
def test_bad_arguments(fields, message):
    with pytest.raises(ValueError, match=message):
        benchmark(smoke_config("tokenizer_vq"), **fields)
