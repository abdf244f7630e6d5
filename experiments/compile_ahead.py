r"""Compiles a train step, a sampler or a decoder for a TPU topology that is not here.

    python experiments/compile_ahead.py --config=configs/imagenet256/var.py:d16 \
        --topology=v5e:4x4 --batch_size=256 --out=var_d16.json
    python experiments/compile_ahead.py --config=configs/imagenet256/llamagen.py:B \
        --topology=v5e:2x4 --program=sample --batch_size=64
    python experiments/compile_ahead.py --config=configs/imagenet256/tokenizer_vq.py \
        --topology=v5e:4x4
    python experiments/compile_ahead.py --config=configs/imagenet256/var.py:d16 \
        --topology=v5e:4x4 --search --batch_sizes=256,512,1024 --out=search.json

Needs the TPU compiler (pip install -e '.[ahead]', Linux on x86-64) and no TPU. Printed and
written as JSON: HBM of a chip against its capacity, the compiler's estimate of the time, the MFU
that follows, and rooflines, of the whole and of its phases (forward, backward, optimizer; a
sampler's steps); the collectives, the mesh axes they go over, what they take at least over the
chip's links and how much of that no computation hides. Exits with 1 where the program does not fit,
and says what takes the memory and what to change. --slices=n is for n of the topology, over which
the batch is split too: their collectives go over DCN, on the axis slice.

--program=train takes every configuration. A generator trains on cached codes; with --inputs=images
the tokenizer encodes inside the step. --program=sample is what draws a generator's codes and
--program=decode what makes images of them, one after the other for a batch. The model's FLOPs, for
the MFU, are by formula for decoders; for all else the products of the traced program are counted.
The report says which.

--search compiles for several meshes, rematerialisations and batch sizes, prints those that fit by
the predicted time of an image, exposed collectives with it, and keeps all in --out: the same
command again goes on from there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from ar_jax.compilation.chips import prepare_environment

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
TOPOLOGY = flags.DEFINE_string("topology", None, "Like v5e:4x4 or v5p:4x4x4.", required=True)
SLICES = flags.DEFINE_integer(
    "slices", None, "Slices of the topology, over DCN; default config.mesh.slices, or 1."
)
PROGRAM = flags.DEFINE_enum("program", "train", ("train", "sample", "decode"), "What is compiled.")
INPUT = flags.DEFINE_enum(
    "inputs", None, ("codes", "images"), "What a train step reads; default codes, or images."
)
BATCH_SIZE = flags.DEFINE_integer(
    "batch_size", None, "Images of a call, over all chips; default config.train.batch_size."
)
SEARCH = flags.DEFINE_bool("search", False, "Compiles a table of meshes, remats, batch sizes.")
BATCH_SIZES = flags.DEFINE_list(
    "batch_sizes", None, "Of a search; default --batch_size, half of it and its double."
)
OUT = flags.DEFINE_string("out", None, "JSON file; default prints only.")


def write(report: dict[str, Any]) -> None:
    """Writes the report, or the verdict of a program that does not fit, where --out says."""
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def read_batch_sizes(default: int) -> list[int]:
    """Those of --batch_sizes, or around ``default``.

    Raises:
        UsageError: one is no positive number.
    """
    from ar_jax.compilation.search import default_batch_sizes

    if BATCH_SIZES.value is None:
        return default_batch_sizes(default)
    if not all(size.isdigit() and int(size) for size in BATCH_SIZES.value):
        raise app.UsageError(
            f"--batch_sizes={','.join(BATCH_SIZES.value)} must be positive numbers, like 128,256"
        )
    return [int(size) for size in BATCH_SIZES.value]


def run_search() -> None:
    """Compiles the candidates that --out does not have yet and prints the table."""
    from ar_jax.compilation.search import FITS, is_row_of, read_rows, search, table, write_rows
    from ar_jax.compilation.trials import Trials

    config = CONFIG.value
    trials = Trials(
        config=config,
        topology=TOPOLOGY.value,
        slices=SLICES.value,
        program=PROGRAM.value,
        inputs=INPUT.value,
    )
    sizes = read_batch_sizes(BATCH_SIZE.value or config.train.batch_size)
    candidates = trials.candidates(sizes)
    path, settings, earlier = OUT.value and Path(OUT.value), trials.settings(), []

    def save(rows: Sequence[dict[str, Any]]) -> None:
        if path:
            write_rows(path, settings, rows)

    if path:
        earlier = read_rows(path, settings)
        known = sum(any(is_row_of(row, one) for row in earlier) for one in candidates)
        print(f"{known} of {len(candidates)} are in {path}", flush=True)
    rows = search(
        candidates, trials.attempt, earlier, save=save, say=lambda line: print(line, flush=True)
    )
    print(table(rows, candidates))
    if not any(row["outcome"] == FITS for row in rows):
        sys.exit(1)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    if BATCH_SIZES.value is not None and not SEARCH.value:
        raise app.UsageError("--batch_sizes belongs to --search; one size is --batch_size")
    prepare_environment(TOPOLOGY.value)
    if SEARCH.value:
        run_search()
        return
    # These need the environment.
    from ar_jax.compilation.ahead import compile_decoder, compile_sampler, compile_train_step
    from ar_jax.compilation.overflow import DoesNotFit
    from ar_jax.compilation.report import summary

    config, topology = CONFIG.value, TOPOLOGY.value
    sizes = {"batch_size": BATCH_SIZE.value, "slices": SLICES.value}
    try:
        if PROGRAM.value == "train":
            report = compile_train_step(config, topology, inputs=INPUT.value, **sizes)
        else:
            compiles = compile_sampler if PROGRAM.value == "sample" else compile_decoder
            report = compiles(config, topology, **sizes)
    except DoesNotFit as error:
        write({"program": PROGRAM.value, "topology": topology, **error.verdict})
        sys.exit(f"{topology}: {error}")
    print(summary(report))
    write(report)
    if not report["fits"]:
        sys.exit(1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
