r"""Compiles a generator's train step for a TPU topology that is not here, and says what it takes.

    python experiments/compile_ahead.py --config=configs/imagenet256/var.py:d16 \
        --topology=v5e:4x4 --config.train.batch_size=256 --out=var_d16.json

Needs the TPU compiler (pip install 'ar_jax[ahead]', Linux on x86-64) and no TPU. Printed and
written as JSON: HBM of a chip against its capacity, the collectives, the compiler's estimate of the
step's time and the MFU that follows. The step trains on cached codes. Exits with 1 where it does
not fit.
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
OUT = flags.DEFINE_string("out", None, "JSON file; default prints only.")


def summary(report: dict[str, Any]) -> str:
    """The report as lines to read."""
    memory, seconds = report["memory"], report["seconds"]
    gib = 2**30
    lines = [
        f"{report['topology']}, mesh {report['mesh']}, {report['batch_size']} images a step, "
        f"{report['parameters']:,} parameters, attention {report['attention']}",
        f"HBM: peak {memory['peak'] / gib:.2f} of {memory['capacity'] / gib:.0f} GiB a chip "
        f"(arguments {memory['argument'] / gib:.2f}, temporaries {memory['temp'] / gib:.2f})",
        f"step: {seconds['total'] * 1e3:.1f} ms (compiler {seconds['compiler'] * 1e3:.1f}, custom "
        f"kernels at least {seconds['kernels'] * 1e3:.1f}; no waiting for collectives)",
        f"MFU by this estimate: {report['mfu']:.2f}",
    ]
    for found in report["collectives"]:
        where = "in the layer loop" if found["in_loop"] else "outside of loops"
        lines.append(
            f"{found['kind']}: {found['count']} x {found['bytes'] / 2**20:.1f} MiB over groups of "
            f"{found['group']}, {where}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    prepare_environment(TOPOLOGY.value)
    from ar_jax.compilation.ahead import DoesNotFit, compile_train_step  # needs the environment

    try:
        report = compile_train_step(CONFIG.value, TOPOLOGY.value)
    except DoesNotFit as verdict:
        sys.exit(f"{TOPOLOGY.value}: {verdict}")
    print(summary(report))
    if OUT.value:
        Path(OUT.value).parent.mkdir(parents=True, exist_ok=True)
        Path(OUT.value).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main)
