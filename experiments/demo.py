"""Everything once, on embedded data: trains a tokenizer and a generator, samples, evaluates.

    python experiments/demo.py --system=var --workdir=demo/var

``make demo`` runs this. Eight minutes on two CPU cores with the default ``--mode=demo``; an empty
``--mode=`` runs the hour-long default configs. Stopped, the same command goes on where it was.
The workdir gets report.md, samples.npz, the pictures, and the two runs under tokenizer/ and
generator/, which sample.py and evaluate.py take as they are.
"""

from __future__ import annotations

import runpy
import time
from collections.abc import Sequence
from pathlib import Path

import ml_collections
from absl import app, flags

from ar_jax.evaluation.cache import cache_codes
from ar_jax.evaluation.run import evaluate_workdir
from ar_jax.io.console import configure_logging
from ar_jax.train.run import train_and_evaluate

CONFIGS = Path(__file__).parents[1] / "configs" / "fashion_mnist"

# The tokenizer that each system's config names; "" for pixels, which need no training.
SYSTEMS = {
    "var": "tokenizer_multiscale",
    "llamagen": "tokenizer_vq",
    "rar": "tokenizer_vq",
    "randar": "tokenizer_vq",
    "arpg": "tokenizer_vq",
    "par": "tokenizer_vq_fine",
    "token_shuffle": "tokenizer_vq_fine",
    "mar": "tokenizer_kl",
    "ear": "tokenizer_kl",
    "givt": "tokenizer_kl",
    "xar": "tokenizer_kl",
    "flowar": "tokenizer_kl",
    "maskgit": "tokenizer_vq",
    "infinity": "tokenizer_bitwise",
    "fractal": "",
}

SYSTEM = flags.DEFINE_enum("system", "var", sorted(SYSTEMS), "What to train.")
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the results.", required=True)
MODE = flags.DEFINE_string("mode", "demo", "Argument of the configs: demo, smoke or none.")
SEED = flags.DEFINE_integer("seed", 0, "Of both trainings, in place of the configs' own 0.")
TOKENIZERS = flags.DEFINE_string(
    "tokenizers", None, "Directory of tokenizers and codes that several demos share."
)
NUM_IMAGES = flags.DEFINE_integer("num_images", 1_000, "Samples to evaluate.")


def load_config(name: str, mode: str, seed: int) -> ml_collections.ConfigDict:
    """The Fashion-MNIST config ``name`` in ``mode``."""
    config = runpy.run_path(str(CONFIGS / f"{name}.py"))["get_config"](mode)
    config.seed = seed
    return config


def run_demo(
    system: str,
    workdir: str | Path,
    *,
    mode: str = "demo",
    num_images: int = 1_000,
    seed: int = 0,
    tokenizers: str | Path | None = None,
) -> None:
    """Trains, samples and evaluates ``system`` in ``workdir``; see the top of this file.

    Args:
        tokenizers: the tokenizer and its codes are kept (and taken, if they are there) in its
            subfolder of the tokenizer's name; None: in ``workdir``.
    """
    workdir = Path(workdir)
    shared = Path(tokenizers) / SYSTEMS[system] if tokenizers else workdir
    tokenizer, codes, generator = shared / "tokenizer", shared / "codes", workdir / "generator"
    start = time.monotonic()

    def announce(what: str) -> None:
        minutes, seconds = divmod(int(time.monotonic() - start), 60)
        print(f"\n[{minutes}:{seconds:02d}] {what}", flush=True)

    config = load_config(system, mode, seed)
    if SYSTEMS[system]:
        announce(f"1/5 training the tokenizer in {tokenizer}")
        trained = load_config(SYSTEMS[system], mode, seed)
        if not train_and_evaluate(trained, tokenizer).finished:
            announce("stopped: the same command goes on from here")
            return
        announce(f"2/5 evaluating the tokenizer, report in {tokenizer / 'evaluation'}")
        evaluate_workdir(tokenizer, overwrite=True)
        announce(f"3/5 encoding all images once, in {codes}")
        cache_codes(tokenizer, codes)
        config.tokenizer_checkpoint = str(tokenizer)
        config.data.source = f"codes:{codes}"
    announce(f"4/5 training the generator in {generator}")
    if not train_and_evaluate(config, generator).finished:
        announce("stopped: the same command goes on from here")
        return
    announce(f"5/5 drawing and evaluating {num_images} samples")
    evaluate_workdir(generator, workdir, num_images=num_images, overwrite=True)
    announce(f"done: read {workdir / 'report.md'} and look at the pictures in {workdir}")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    run_demo(
        SYSTEM.value,
        WORKDIR.value,
        mode=MODE.value,
        num_images=NUM_IMAGES.value,
        seed=SEED.value,
        tokenizers=TOKENIZERS.value,
    )


if __name__ == "__main__":
    app.run(main)
