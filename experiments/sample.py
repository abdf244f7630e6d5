"""Draws images of a trained generator: a PNG grid, and an npz as ADM's evaluator reads it.

    python experiments/sample.py --checkpoint=runs/var --per_class=8 --guidance=3 --out=samples.png
    python experiments/sample.py --checkpoint=runs/var --labels=0,8,9 --num_images=24 --strip \
        --out=some.png
    python experiments/sample.py --checkpoint=runs/var --num_images=50000 --batch_size=250 \
        --out=grid.png --npz=samples.npz
    python experiments/sample.py --checkpoint=runs/t2i --captions=captions.npz --out=some.png

The workdir is all that is needed: it keeps the configuration, whose `sampling` section gives what
no flag sets, and the tokenizer. Images are a function of (--seed, position, label).
Captions come as the features of a text encoder, see ar_jax/evaluation/captions.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from absl import app, flags

from ar_jax.evaluation.samples import sample_workdir
from ar_jax.io.best_checkpoint import best_step
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import read_config
from ar_jax.sampling.filters import CONFIDENCES
from ar_jax.sampling.guidance import KINDS

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of the generator.", required=True)
OUT = flags.DEFINE_string("out", None, "The PNG grid to write.", required=True)
NPZ = flags.DEFINE_string("npz", None, "Also write all images and labels there.")
STRIP = flags.DEFINE_bool("strip", False, "Also write images as they form, OUT_strip.png.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace files that exist.")
LABELS = flags.DEFINE_list("labels", None, "Classes to draw from, as 207,388; default all.")
CAPTIONS = flags.DEFINE_string(
    "captions", None, "For a generator of captions: npz of their features, an image of each."
)
PER_CLASS = flags.DEFINE_integer("per_class", None, "Images of each class, one row a class.")
NUM_IMAGES = flags.DEFINE_integer("num_images", None, "Or: all images, the classes in turn.")
GUIDANCE = flags.DEFINE_float("guidance", None, "Classifier-free guidance; 1 is none.")
KIND = flags.DEFINE_enum("guidance_kind", None, KINDS, "How guidance runs over the steps.")
POWER = flags.DEFINE_float("guidance_power", None, "Exponent of power_cosine.")
START = flags.DEFINE_integer("guidance_start", None, "First guided step.")
STOP = flags.DEFINE_integer("guidance_stop", None, "First step after the guided ones; -1: none.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Divides logits (0: greedy), or scales a head's noise."
)
TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k most probable codes; 0 keeps all.")
TOP_P = flags.DEFINE_float("top_p", None, "Keep the most probable codes up to this mass.")
MIN_P = flags.DEFINE_float("min_p", None, "Keep codes of this fraction of the likeliest one's.")
CHOICE = flags.DEFINE_float(
    "choice_temperature", None, "Noise on which codes confidence decoding keeps; 0: the surest."
)
CONFIDENCE = flags.DEFINE_enum("confidence", None, CONFIDENCES, "What it compares codes by.")
SMOOTH = flags.DEFINE_bool("smooth", None, "Mix code vectors between scales (more_smooth).")
SEED = flags.DEFINE_integer("seed", 0, "Of all draws.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images drawn at a time.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default the newest.")
BEST = flags.DEFINE_bool("best", False, "The checkpoint that config.train.best_metric kept.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    labels = LABELS.value
    if labels is not None and not all(label.isdigit() for label in labels):
        raise app.UsageError(f"--labels={','.join(labels)} must be class numbers, as 0,8,9")
    configure_logging()
    drawn = sample_workdir(
        CHECKPOINT.value,
        OUT.value,
        labels=None if labels is None else [int(label) for label in labels],
        per_class=PER_CLASS.value,
        num_images=NUM_IMAGES.value,
        captions=CAPTIONS.value,
        sampling={
            "temperature": TEMPERATURE.value,
            "top_k": TOP_K.value,
            "top_p": TOP_P.value,
            "min_p": MIN_P.value,
            "smooth": SMOOTH.value,
            "choice_temperature": CHOICE.value,
            "confidence": CONFIDENCE.value,
            "guidance.scale": GUIDANCE.value,
            "guidance.kind": KIND.value,
            "guidance.power": POWER.value,
            "guidance.start": START.value,
            "guidance.stop": STOP.value,
        },
        seed=SEED.value,
        batch_size=BATCH_SIZE.value,
        step=chosen_step(),
        npz=NPZ.value,
        strip=STRIP.value,
        overwrite=OVERWRITE.value,
    )
    print(f"{len(drawn.images):,} images: {OUT.value}" + (f", {NPZ.value}" if NPZ.value else ""))


def chosen_step() -> int | None:
    """Of the checkpoint; None for the newest."""
    if not BEST.value:
        return STEP.value
    if STEP.value is not None:
        raise app.UsageError(f"--step={STEP.value} and --best: give one of them")
    return best_step(CHECKPOINT.value, read_config(CHECKPOINT.value)["train"])


if __name__ == "__main__":
    app.run(main)
