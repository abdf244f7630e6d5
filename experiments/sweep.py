"""Measures samples of a generator over settings of its sampler: a table, a plot, a file of points.

    python experiments/sweep.py --checkpoint=runs/var --out=runs/var_sweep --guidance=1,1.5,2,3,4
    python experiments/sweep.py --checkpoint=runs/var --out=runs/var_sweep2 --guidance=2,3 \
        --guidance_kind=constant,linear --top_k=0,100 --num_images=2000

All combinations are measured, and the first axis that is given in the order below is the plot's
horizontal one. The same command goes on where it was stopped, and with more values measures those
alone. Judged by our own classifier where it knows the images; with --inception and --reference by
FID, under the name fid@N unless --num_images=50000.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import app, flags

from ar_jax.evaluation.adm import Rules, Standard
from ar_jax.evaluation.features import InceptionFeatures
from ar_jax.evaluation.inception import load_inception
from ar_jax.evaluation.sweep import sweep_workdir
from ar_jax.io.best_checkpoint import best_step
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import read_config

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of the generator.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory of the points and the report.", required=True)
# Flag -> (field of config.sampling, type).
AXES: dict[str, tuple[str, type]] = {
    "guidance": ("guidance.scale", float),
    "guidance_kind": ("guidance.kind", str),
    "guidance_power": ("guidance.power", float),
    "guidance_start": ("guidance.start", int),
    "guidance_stop": ("guidance.stop", int),
    "temperature": ("temperature", float),
    "top_k": ("top_k", int),
    "top_p": ("top_p", float),
    "min_p": ("min_p", float),
}
VALUES = {
    name: flags.DEFINE_list(name, None, f"Values of config.sampling.{field}.")
    for name, (field, _) in AXES.items()
}
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Of a point; a multiple of the classes.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images at a time.")
SOURCE = flags.DEFINE_string("source", None, "The real images, as config.data.source.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples, the same at every point.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default the newest.")
BEST = flags.DEFINE_bool("best", False, "The checkpoint that config.train.best_metric kept.")
REFERENCE = flags.DEFINE_string("reference", None, "Of FID; see experiments/evaluate.py.")
INCEPTION = flags.DEFINE_string("inception", None, "Inception's weights; see there too.")
ALLOW_RANK_DEFICIENT = flags.DEFINE_bool(
    "allow_rank_deficient", False, "Fewer images than Inception has features, 2,048."
)
PRECISION_RECALL = flags.DEFINE_bool("precision_recall", True, "Measure these too, with FID.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    if STEP.value is not None and BEST.value:
        raise app.UsageError(f"--step={STEP.value} and --best: give one of them")
    if (INCEPTION.value is None) != (REFERENCE.value is None):
        raise app.UsageError("--inception and --reference go together")
    configure_logging()
    train = read_config(CHECKPOINT.value)["train"]
    sweep_workdir(
        CHECKPOINT.value,
        OUT.value,
        chosen_axes(),
        num_images=NUM_IMAGES.value,
        batch_size=BATCH_SIZE.value,
        source=SOURCE.value,
        seed=SEED.value,
        step=best_step(CHECKPOINT.value, train) if BEST.value else STEP.value,
        standard=standard(),
    )
    print(f"report: {OUT.value}/report.md, {OUT.value}/sweep.png")


def chosen_axes() -> dict[str, list[Any]]:
    """Field of config.sampling -> values, of the flags that were given."""
    found = {}
    for name, (field, kind) in AXES.items():
        values = VALUES[name].value
        if values is None:
            continue
        try:
            found[field] = [kind(value) for value in values]
        except ValueError:
            raise app.UsageError(
                f"--{name}={','.join(values)} must be {kind.__name__}s, as --guidance=1,2,3"
            ) from None
    return found


def standard() -> Standard | None:
    """What FID is measured with; None: our own classifier judges."""
    if INCEPTION.value is None:
        return None
    rules = Rules(
        num_images=NUM_IMAGES.value,
        allow_rank_deficient=ALLOW_RANK_DEFICIENT.value,
        precision_recall=PRECISION_RECALL.value,
        batch_size=BATCH_SIZE.value,
    )
    extractor = InceptionFeatures(load_inception(INCEPTION.value), BATCH_SIZE.value)
    return Standard(extractor=extractor, reference=REFERENCE.value, rules=rules)


if __name__ == "__main__":
    app.run(main)
