"""Encodes a data set once with a trained tokenizer, so that generators train on its codes.

    python experiments/cache_codes.py --checkpoint=runs/tokenizer_multiscale --out=runs/codes
    python experiments/train.py --config=configs/fashion_mnist/var.py --workdir=runs/var \
        --config.tokenizer_checkpoint=runs/tokenizer_multiscale \
        --config.data.source=codes:runs/codes

The images are the tokenizer's own (its workdir keeps its configuration) unless --source names
others. A run that trains on the codes needs config.data.crop='none' and flip=False: --copies caches
several cuts and flips of each training image instead. All devices of this machine encode. The same
command again writes what is missing: of a split that was interrupted, the files that are.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from ar_jax.data import codes_writer
from ar_jax.evaluation.cache import cache_codes
from ar_jax.io.console import configure_logging

CHECKPOINT = flags.DEFINE_string(
    "checkpoint", None, "Workdir of a trained tokenizer.", required=True
)
OUT = flags.DEFINE_string("out", None, "Directory that gets train/ and test/.", required=True)
SOURCE = flags.DEFINE_string("source", None, "The images, as config.data.source.")
COPIES = flags.DEFINE_integer("copies", 1, "Augmented versions of each training image.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 500, "Images encoded at a time by all devices.")
SHARD_SIZE = flags.DEFINE_integer(
    "shard_size", codes_writer.SHARD_SIZE, "Images of a file: an interrupted run loses one at most."
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the augmented versions.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    out = cache_codes(
        CHECKPOINT.value,
        OUT.value,
        source=SOURCE.value,
        copies=COPIES.value,
        batch_size=BATCH_SIZE.value,
        seed=SEED.value,
        shard_size=SHARD_SIZE.value,
    )
    print(f"cached codes: train with --config.data.source=codes:{out}")


if __name__ == "__main__":
    app.run(main)
