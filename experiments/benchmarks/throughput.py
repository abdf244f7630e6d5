"""Times the train step and the sampler of any config on synthetic data, and writes JSON.

    python experiments/benchmarks/throughput.py --config=configs/fashion_mnist/var.py:demo \
        --out=throughput.json
    python experiments/benchmarks/throughput.py --config=configs/imagenet256/var.py:d16 \
        --batch_size=64 --inputs=codes --config.mesh.fsdp=8

Tokens and images per second (medians over --steps calls, each waited for), compile time, and
memory: what the compiler plans, and the peaks of process and device. No data and no checkpoint are
read; reading of data is not in the numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags
from ml_collections import config_flags

from ar_jax.io.console import configure_logging
from ar_jax.train.benchmark import INPUTS, benchmark

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Of a train step; default the config's.")
SAMPLE_BATCH_SIZE = flags.DEFINE_integer(
    "sample_batch_size", None, "Images sampled at a time; default as --batch_size."
)
STEPS = flags.DEFINE_integer("steps", 10, "Timed calls.")
WARMUP = flags.DEFINE_integer("warmup", 2, "Calls before them.")
INPUT = flags.DEFINE_enum("inputs", "images", INPUTS, "What a generator trains on.")
SAMPLE = flags.DEFINE_bool("sample", True, "Also measure the sampler (encoder and decoder).")
OUT = flags.DEFINE_string("out", None, "JSON file; default prints only.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    result = benchmark(
        CONFIG.value,
        batch_size=BATCH_SIZE.value,
        sample_batch_size=SAMPLE_BATCH_SIZE.value,
        steps=STEPS.value,
        warmup=WARMUP.value,
        inputs=INPUT.value,
        sample=SAMPLE.value,
    )
    text = json.dumps(result, indent=2)
    print(text)
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
