"""Draws or edits images with a trained generator: a PNG grid, an npz as ADM's evaluator reads it.

    python experiments/sample.py --checkpoint=runs/var --per_class=8 --guidance=3 --out=samples.png
    python experiments/sample.py --checkpoint=runs/var --labels=0,8,9 --num_images=24 --strip \
        --out=some.png
    python experiments/sample.py --checkpoint=runs/var --num_images=50000 --batch_size=250 \
        --out=grid.png --npz=samples.npz
    python experiments/sample.py --checkpoint=runs/llamagen --speculate=maximal --out=some.png
    python experiments/sample.py --checkpoint=runs/llamagen --speculate=draft --draft=runs/small \
        --branches=2,1,1 --out=some.png
    python experiments/sample.py --checkpoint=runs/t2i --captions=captions.npz --out=some.png
    python experiments/sample.py --checkpoint=runs/var --edit=shoe.png --mask=box:4,4,24,24 \
        --labels=7,8,9 --feather=2 --out=edits.png --frames=edits.gif
    python experiments/sample.py --checkpoint=runs/var --edit=shoe.png --invert --source_labels=7 \
        --labels=9 --out=edits.png
    python experiments/sample.py --checkpoint=runs/var --weak=runs/small --guidance=2 --out=some.png
    python experiments/sample.py --checkpoint=runs/var --beams=4 --beam_candidates=4 --out=some.png

The workdir is all that is needed: it keeps the configuration, whose `sampling` section gives what
no flag sets, and the tokenizer. Images are a function of (--seed, position, label).
An edit draws what the mask covers: white in a picture, TOP,LEFT,BOTTOM,RIGHT inside a box: or
around: it, or all. See ar_jax/evaluation/edit_sources.py.
Another generator of the same codes and steps takes the null class's place in guidance (--weak, or
an earlier checkpoint by --weak_step alone) or is an autoregressive reward (--rewards). --beams
searches for likely images. Lists by step, as --step_top_k=0,0,100, have a value for every step.
Captions come as the features of a text encoder, see ar_jax/data/captions.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from absl import app, flags

from ar_jax.evaluation.composition import Composition
from ar_jax.evaluation.edits import edit_workdir
from ar_jax.evaluation.samples import Generated, sample_workdir
from ar_jax.evaluation.speculation import RULES, Speculation
from ar_jax.io.best_checkpoint import best_step
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import read_config
from ar_jax.sampling.edit import COARSE_SHARE
from ar_jax.sampling.filters import CONFIDENCES
from ar_jax.sampling.guidance import KINDS

CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of the generator.", required=True)
OUT = flags.DEFINE_string("out", None, "The PNG grid to write.", required=True)
NPZ = flags.DEFINE_string("npz", None, "Also write all images and labels there.")
STRIP = flags.DEFINE_bool("strip", False, "Also write images as they form, OUT_strip.png.")
FRAMES = flags.DEFINE_string("frames", None, "Also write images as they form there, GIF or PNG.")
OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace files that exist.")
LABELS = flags.DEFINE_list("labels", None, "Classes to draw from, as 207,388; default all.")
flags.DEFINE_alias("label", "labels")
EDIT = flags.DEFINE_string("edit", None, "Edit this picture, npz or folder instead.")
MASK = flags.DEFINE_string("mask", None, "What of it to draw: picture, npz, box:, around: or all.")
KEEP_FIRST = flags.DEFINE_integer("keep_first", 0, "Scales, or codes of one grid, to keep anyway.")
COARSE = flags.DEFINE_float("coarse_share", COARSE_SHARE, "Masked share that redraws a cell.")
FEATHER = flags.DEFINE_integer(
    "feather", None, "Put back pixels off the mask, fading over so many."
)
INVERT = flags.DEFINE_bool("invert", False, "Draw under the noise that gives the image itself.")
SOURCE_LABELS = flags.DEFINE_list("source_labels", None, "What it is; default as the npz says.")
KEEP_NOISE = flags.DEFINE_float("keep_noise", 1.0, "Share of that noise to keep.")
EDITING = (MASK, KEEP_FIRST, COARSE, FEATHER, INVERT, SOURCE_LABELS, KEEP_NOISE)
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
GUIDANCES = flags.DEFINE_list("step_guidance", None, "In place of both, a scale for every step.")
WEAK = flags.DEFINE_string("weak", None, "Workdir of a model to be guided away from.")
WEAK_STEP = flags.DEFINE_integer("weak_step", None, "Its checkpoint, or an earlier one of ours.")
WEAK_NULL = flags.DEFINE_bool("weak_null", False, "Show it the null class, not the condition.")
REWARDS = flags.DEFINE_list("rewards", [], "Workdirs of autoregressive rewards.")
REWARD_WEIGHTS = flags.DEFINE_list("reward_weights", [], "An exponent for each; default 1.")
BEAMS = flags.DEFINE_integer("beams", 0, "Of a search for likely images; 0: no search.")
CANDIDATES = flags.DEFINE_integer("beam_candidates", 4, "Of every beam at every step.")
LIKELIEST = flags.DEFINE_bool("likeliest", False, "Take the likeliest candidates, draw none.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", None, "Divides logits (0: greedy), or scales a head's noise."
)
TOP_K = flags.DEFINE_integer("top_k", None, "Keep the k most probable codes; 0 keeps all.")
TOP_P = flags.DEFINE_float("top_p", None, "Keep the most probable codes up to this mass.")
TEMPERATURES = flags.DEFINE_list("step_temperatures", None, "Factors on it, one a step.")
TOP_KS = flags.DEFINE_list("step_top_k", None, "In place of top_k, one for every step.")
TOP_PS = flags.DEFINE_list("step_top_p", None, "In place of top_p, one for every step.")
GAIN = flags.DEFINE_float("entropy_gain", None, "a of the temperature's a exp(-entropy / b) + c.")
WIDTH = flags.DEFINE_float("entropy_width", None, "b, in nats.")
FLOOR = flags.DEFINE_float("entropy_floor", None, "c.")
MIN_P = flags.DEFINE_float("min_p", None, "Keep codes of this fraction of the likeliest one's.")
CHOICE = flags.DEFINE_float(
    "choice_temperature", None, "Noise on which codes confidence decoding keeps; 0: the surest."
)
CONFIDENCE = flags.DEFINE_enum("confidence", None, CONFIDENCES, "What it compares codes by.")
SMOOTH = flags.DEFINE_bool("smooth", None, "Mix code vectors between scales (more_smooth).")
SPECULATE = flags.DEFINE_enum(
    "speculate", None, RULES, "Fewer calls of a model that draws code by code; grouped is lossy."
)
WINDOW = flags.DEFINE_integer("window", 16, "Codes that one call checks.")
DRAFT = flags.DEFINE_string("draft", None, "Workdir of a smaller generator, of --speculate=draft.")
BRANCHES = flags.DEFINE_list("branches", ["1"] * 4, "Its drafts for each of the next codes.")
SEED = flags.DEFINE_integer("seed", 0, "Of all draws.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 100, "Images drawn at a time.")
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint; default the newest.")
BEST = flags.DEFINE_bool("best", False, "The checkpoint that config.train.best_metric kept.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    sampling = {
        "temperature": TEMPERATURE.value,
        "top_k": TOP_K.value,
        "top_p": TOP_P.value,
        "min_p": MIN_P.value,
        "step_temperatures": numbers(TEMPERATURES),
        "step_top_k": numbers(TOP_KS, int),
        "step_top_p": numbers(TOP_PS),
        "entropy_gain": GAIN.value,
        "entropy_width": WIDTH.value,
        "entropy_floor": FLOOR.value,
        "smooth": SMOOTH.value,
        "choice_temperature": CHOICE.value,
        "confidence": CONFIDENCE.value,
        "guidance.scale": GUIDANCE.value,
        "guidance.kind": KIND.value if GUIDANCES.value is None else "steps",
        "guidance.steps": numbers(GUIDANCES),
        "guidance.power": POWER.value,
        "guidance.start": START.value,
        "guidance.stop": STOP.value,
    }
    if GUIDANCES.value is not None:
        refuse((GUIDANCE, KIND), "does not go with --step_guidance")
    composition = Composition(
        weak=WEAK.value,
        weak_step=WEAK_STEP.value,
        weak_null=WEAK_NULL.value,
        rewards=tuple(REWARDS.value),
        reward_weights=numbers(REWARD_WEIGHTS) or (),
        beams=BEAMS.value,
        candidates=CANDIDATES.value,
        likeliest=LIKELIEST.value,
    )
    settings: dict[str, Any] = dict(
        labels=classes(LABELS),
        per_class=PER_CLASS.value,
        sampling=sampling,
        composition=composition,
        seed=SEED.value,
        batch_size=BATCH_SIZE.value,
        step=chosen_step(),
        npz=NPZ.value,
        frames=FRAMES.value,
        overwrite=OVERWRITE.value,
    )
    if EDIT.value is None:
        refuse(EDITING, "goes with --edit")
        drawn: Any = sample_workdir(
            CHECKPOINT.value,
            OUT.value,
            num_images=NUM_IMAGES.value,
            captions=CAPTIONS.value,
            strip=STRIP.value,
            speculation=speculation(),
            **settings,
        )
    else:
        refuse((NUM_IMAGES, CAPTIONS, STRIP, SPECULATE), "does not go with --edit")
        drawn = edit_workdir(
            CHECKPOINT.value,
            OUT.value,
            image=EDIT.value,
            mask=MASK.value,
            inverted=INVERT.value,
            source_labels=classes(SOURCE_LABELS),
            keep_noise=KEEP_NOISE.value,
            keep_first=KEEP_FIRST.value,
            coarse_share=COARSE.value,
            feather=FEATHER.value,
            **settings,
        )
    written = [OUT.value, NPZ.value, FRAMES.value]
    print(f"{len(drawn.images):,} images: {', '.join(path for path in written if path)}")
    if isinstance(drawn, Generated) and drawn.calls is not None:
        calls = drawn.calls
        print(
            f"steps per image: {calls.mean():.1f} ({calls.min()} to {calls.max()}) of "
            f"{drawn.codes.shape[1]} without speculation"
        )


def speculation() -> Speculation | None:
    """Of --speculate and the flags that go with it."""
    if SPECULATE.value is None:
        refuse((WINDOW, DRAFT, BRANCHES), "goes with --speculate")
        return None
    drafting = SPECULATE.value == "draft"
    refuse((WINDOW,) if drafting else (DRAFT, BRANCHES), f"means nothing to {SPECULATE.value}")
    if not all(count.isdigit() for count in BRANCHES.value):
        raise app.UsageError(f"--branches={','.join(BRANCHES.value)} must be numbers, as 2,1,1")
    return Speculation(
        rule=SPECULATE.value,
        window=WINDOW.value,
        draft=DRAFT.value,
        branches=tuple(map(int, BRANCHES.value)),
    )


def classes(flag: flags.FlagHolder) -> list[int] | None:
    """The class numbers of a flag."""
    if flag.value is not None and not all(label.isdigit() for label in flag.value):
        raise app.UsageError(
            f"--{flag.name}={','.join(flag.value)} must be class numbers, as 0,8,9"
        )
    return None if flag.value is None else [int(label) for label in flag.value]


def numbers(flag: flags.FlagHolder, kind: type = float) -> tuple | None:
    """The numbers of a flag."""
    try:
        return None if flag.value is None else tuple(kind(number) for number in flag.value)
    except ValueError:
        wanted = "whole numbers, as 0,0,100" if kind is int else "numbers, as 1,0.9,0.8"
        raise app.UsageError(f"--{flag.name}={','.join(flag.value)} must be {wanted}") from None


def refuse(given: Sequence[flags.FlagHolder], why: str) -> None:
    """Raises for flags that would be passed over in silence."""
    for flag in given:
        if flag.present:
            raise app.UsageError(f"--{flag.name}={flag.value} {why}")


def chosen_step() -> int | None:
    """Of the checkpoint; None for the newest."""
    if not BEST.value:
        return STEP.value
    if STEP.value is not None:
        raise app.UsageError(f"--step={STEP.value} and --best: give one of them")
    return best_step(CHECKPOINT.value, read_config(CHECKPOINT.value)["train"])


if __name__ == "__main__":
    app.run(main)
