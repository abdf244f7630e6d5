"""Measures a trained tokenizer or generator, or stored images, and writes a report with pictures.

    python experiments/evaluate.py --checkpoint=runs/tokenizer_multiscale
    python experiments/evaluate.py --checkpoint=runs/var --num_images=1000 --out=runs/var_report
    python experiments/evaluate.py --checkpoint=runs/var_d16 --inception=inception.npz \
        --reference=VIRTUAL_imagenet256_labeled.npz --source=folder:PATH --out=runs/var_d16_fid
    python experiments/evaluate.py --kind=generation --samples=samples.npz --out=report \
        --reference=VIRTUAL_imagenet256_labeled.npz --inception=inception.npz
    python experiments/evaluate.py --kind=reconstruction --samples=reconstructions.npz \
        --reference=folder:PATH --inception=inception.npz --out=report

Tokenizers: MSE, PSNR, SSIM, with --lpips=FILE.npz (of convert.py --family=lpips) the LPIPS of its
network, usage and perplexity of the codebook at every scale. Generators: test
and train likelihood, token accuracy at every scale, samples with balanced labels (samples.npz) and,
for Fashion-MNIST, their class accuracy and Frechet distance by our own classifier beside the floor
of real images and the bound of reconstructions, and the nearest training images. Each number in
report.md says what was measured.

With --inception also FID, sFID, inception score, precision and recall as ADM's evaluator defines
them, and rFID of reconstructions: of 50,000 images, 50 of each of 1,000 classes, or of --num_images
under the name fid@N. Stored images are judged by our own classifier without it, under its name.
Inception's weights are made once by experiments/convert.py --family=inception.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from ar_jax.build import trains_tokenizer
from ar_jax.evaluation.adm import STANDARD_COUNT, Rules, Standard
from ar_jax.evaluation.classifier import load_classifier
from ar_jax.evaluation.features import ClassifierFeatures, Extractor, InceptionFeatures
from ar_jax.evaluation.files import evaluate_reconstructions, evaluate_samples
from ar_jax.evaluation.inception import load_inception
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.io.best_checkpoint import best_step
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import read_config

KINDS = ("generation", "reconstruction")
KIND = flags.DEFINE_enum("kind", None, KINDS, "Of stored images; of a checkpoint it is known.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run.")
SAMPLES = flags.DEFINE_string("samples", None, "Or: stored images, an .npz or a folder of PNG.")
REFERENCE = flags.DEFINE_string(
    "reference", None, "ADM's reference .npz, or images: .npz, folder of PNG, source folder:PATH."
)
INCEPTION = flags.DEFINE_string("inception", None, "Inception's weights; see above.")
OUT = flags.DEFINE_string("out", None, "Directory of the report; default WORKDIR/evaluation.")
NUM_IMAGES = flags.DEFINE_integer(
    "num_images", None, "Samples; a multiple of the classes. Default 50,000 for FID, else 1,000."
)
NUM_CLASSES = flags.DEFINE_integer("num_classes", None, "Of stored samples, to be balanced over.")
ALLOW_UNBALANCED = flags.DEFINE_bool(
    "allow_unbalanced", False, "Stored samples of unbalanced or unknown classes."
)
ALLOW_RANK_DEFICIENT = flags.DEFINE_bool(
    "allow_rank_deficient", False, "Fewer images than Inception has features, 2,048."
)
PRECISION_RECALL = flags.DEFINE_bool("precision_recall", True, "Measure these too.")
LIKELIHOOD_IMAGES = flags.DEFINE_integer(
    "likelihood_images", None, "Test and as many train images to score; default all test images."
)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images at a time.")
SOURCE = flags.DEFINE_string("source", None, "The real images, as config.data.source.")
SEED = flags.DEFINE_integer("seed", 0, "Of the samples.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default the newest.")
BEST = flags.DEFINE_bool("best", False, "The checkpoint that config.train.best_metric kept.")
LPIPS = flags.DEFINE_string("lpips", None, "Converted weights, for the LPIPS of reconstructions.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace a report that exists.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    if (CHECKPOINT.value is None) == (SAMPLES.value is None):
        raise app.UsageError("give --checkpoint=WORKDIR or --samples=FILE")
    configure_logging()
    if CHECKPOINT.value is not None:
        out = evaluate_checkpoint(CHECKPOINT.value)
    else:
        out = evaluate_stored(SAMPLES.value or "")
    print(f"report: {out / 'report.md'}")


def evaluate_stored(samples: str) -> Path:
    """Of files; returns the report's directory."""
    if KIND.value is None or OUT.value is None:
        raise app.UsageError("--samples needs --kind=generation or reconstruction, and --out")
    overwrite: Any = {"overwrite": OVERWRITE.value}
    if KIND.value == "reconstruction":
        evaluate_reconstructions(samples, OUT.value, standard(), lpips=LPIPS.value, **overwrite)
    elif LPIPS.value is not None:
        raise app.UsageError("--lpips is of reconstructions")
    else:
        evaluate_samples(samples, OUT.value, standard(), **overwrite)
    return Path(OUT.value)


def evaluate_checkpoint(workdir: str) -> Path:
    """Of a run; returns the report's directory."""
    kind = KINDS[trains_tokenizer(read_config(workdir))]
    if KIND.value not in (None, kind):
        raise app.UsageError(f"--kind={KIND.value}, but {workdir} is of {kind}")
    measured = INCEPTION.value is not None or REFERENCE.value is not None
    default = STANDARD_COUNT if measured else 1000
    evaluate_workdir(
        workdir,
        OUT.value,
        num_images=default if NUM_IMAGES.value is None else NUM_IMAGES.value,
        likelihood_images=LIKELIHOOD_IMAGES.value,
        batch_size=BATCH_SIZE.value,
        source=SOURCE.value,
        seed=SEED.value,
        step=chosen_step(workdir),
        lpips=LPIPS.value,
        overwrite=OVERWRITE.value,
        standard=standard() if measured else None,
    )
    return Path(OUT.value or Path(workdir) / "evaluation")


def standard() -> Standard:
    """What FID and its like are measured with."""
    rules = Rules(
        num_images=NUM_IMAGES.value,
        num_classes=NUM_CLASSES.value,
        allow_unbalanced=ALLOW_UNBALANCED.value,
        allow_rank_deficient=ALLOW_RANK_DEFICIENT.value,
        precision_recall=PRECISION_RECALL.value,
        batch_size=BATCH_SIZE.value,
    )
    return Standard(extractor=extractor(), reference=REFERENCE.value, rules=rules)


def extractor() -> Extractor:
    """Inception, or our own classifier where there are no weights."""
    if INCEPTION.value is None:
        return ClassifierFeatures(load_classifier())
    return InceptionFeatures(load_inception(INCEPTION.value), BATCH_SIZE.value)


def chosen_step(workdir: str) -> int | None:
    """Of the checkpoint; None for the newest."""
    if not BEST.value:
        return STEP.value
    if STEP.value is not None:
        raise app.UsageError(f"--step={STEP.value} and --best: give one of them")
    return best_step(workdir, read_config(workdir)["train"])


if __name__ == "__main__":
    app.run(main)
