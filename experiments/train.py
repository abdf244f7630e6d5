r"""Trains a tokenizer or a generator, or goes on with a run that was stopped.

    python experiments/train.py --config=configs/fashion_mnist/tokenizer_multiscale.py \
        --workdir=runs/tokenizer
    python experiments/train.py --config=configs/fashion_mnist/var.py --workdir=runs/var \
        --config.tokenizer_checkpoint=runs/tokenizer --config.train.batch_size=128

A converted release is fine-tuned in a new workdir, here on five classes of one's own:

    python experiments/train.py --config=runs/var_d16/config.py --workdir=runs/flowers \
        --config.init_from.workdir=runs/var_d16 --config.data.source=folder:data/flowers \
        --config.data.num_classes=5 --config.backbone.num_classes=5 \
        --config.init_from.reinitialise="('backbone/condition/class_embed',)"

Whatever does not fit and is not listed is named before anything is written. For images of another
size set data.image_size, tokenizer.autoencoder.image_size and the scales or grid of tokenizer and
schedule, and list the tables of positions in init_from.interpolate.

The workdir gets checkpoints, metrics (JSON lines and TensorBoard events), pictures and the resolved
configuration. The same command again resumes; SIGTERM saves and exits with 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
from absl import app, flags
from ml_collections import config_flags

from ar_jax.io.console import configure_logging
from ar_jax.parallel.distributed import connect
from ar_jax.train.run import train_and_evaluate

CONFIG = config_flags.DEFINE_config_file("config", None, "Config file.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of this run.", required=True)
CACHE = flags.DEFINE_string("compilation_cache", None, "Directory of compiled programs, kept.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "Connect the processes of a pod or cluster; start all of them. Said by the next three as well.",
)
ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "HOST:PORT of process 0, where jax does not find out on its own."
)
PROCESSES = flags.DEFINE_integer("num_processes", None, "Of the whole job, likewise.")
PROCESS = flags.DEFINE_integer("process_id", None, "Number of this process, likewise.")
HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "Seconds after which a host that gives no sign of life ends the job."
)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    if CACHE.value:
        jax.config.update("jax_compilation_cache_dir", CACHE.value)
    connect_processes()
    train_and_evaluate(CONFIG.value, WORKDIR.value)


def connect_processes() -> None:
    """Joins the other processes if a flag says that there are any."""
    addresses = (ADDRESS.value, PROCESSES.value, PROCESS.value)
    if not DISTRIBUTED.value and all(value is None for value in addresses):
        return
    try:
        connect(
            coordinator_address=ADDRESS.value,
            num_processes=PROCESSES.value,
            process_id=PROCESS.value,
            heartbeat_timeout=HEARTBEAT.value,
        )
    except TimeoutError as error:  # of other hosts: where in this program says nothing
        raise SystemExit(f"train.py: {error}") from error


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
