"""Measures a trained tokenizer or generator and writes a report with pictures.

    python experiments/evaluate.py --checkpoint=runs/tokenizer_multiscale
    python experiments/evaluate.py --checkpoint=runs/var --num_images=1000 --out=runs/var_report

Tokenizers: MSE, PSNR, SSIM, with --lpips=FILE.npz (of convert.py --family=lpips) the LPIPS of its
network, usage and perplexity of the codebook at every scale. Generators: test
and train likelihood, token accuracy at every scale, samples with balanced labels (samples.npz) and,
for Fashion-MNIST, their class accuracy and Frechet distance by our own classifier beside the floor
of real images and the bound of reconstructions, and the nearest training images. Each number in
report.md says what was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.io.console import configure_logging

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory of the report; default WORKDIR/evaluation.")
NUM_IMAGES = flags.DEFINE_integer("num_images", 1000, "Samples; a multiple of the classes.")
LIKELIHOOD_IMAGES = flags.DEFINE_integer(
    "likelihood_images", None, "Test and as many train images to score; default all test images."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images at a time.")
SOURCE = flags.DEFINE_string("source", None, "The real images, as config.data.source.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default the newest.")
LPIPS = flags.DEFINE_string("lpips", None, "Converted weights, for the LPIPS of reconstructions.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a report that exists.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    evaluate_workdir(
        CHECKPOINT.value,
        OUT.value,
        num_images=NUM_IMAGES.value,
        likelihood_images=LIKELIHOOD_IMAGES.value,
        batch_size=BATCH_SIZE.value,
        source=SOURCE.value,
        seed=SEED.value,
        step=STEP.value,
        lpips=LPIPS.value,
        overwrite=OVERWRITE.value,
    )
    print(f"report: {Path(OUT.value or Path(CHECKPOINT.value) / 'evaluation') / 'report.md'}")


if __name__ == "__main__":
    app.run(main)
