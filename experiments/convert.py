r"""Turns official PyTorch files into a directory of ours, and back.

    python experiments/convert.py --family=var --tokenizer=vae_ch160v4096z32.pth \
        --transformer=var_d16.pth --out=runs/var_d16
    python experiments/sample.py --checkpoint=runs/var_d16 --labels=207,388 --guidance=4 \
        --top_k=900 --top_p=0.95 --out=samples.png
    python experiments/convert.py --family=var --export --checkpoint=runs/var_d16 \
        --out=var.safetensors,tokenizer.safetensors

Files are .pth, .pt, .ckpt, .bin or .safetensors; nothing in them is run. Every tensor is used or a
known buffer, and every parameter of ours is set. Sizes are read from the tensors; what they cannot
say is given by flags (--option=decoder_heads=6 for what has no flag of its own), or with --config,
a configuration of ours, whose training sections the directory then has:

    python experiments/convert.py --family=var --tokenizer=... --transformer=... --out=... \
        --config=configs/imagenet256/var.py:d16

Without --transformer the directory is a tokenizer's. Networks that images are judged with become
one file each, for the perceptual loss of tokenizers and for evaluation:

    python experiments/convert.py --family=lpips --files=vgg16-397923af.pth,vgg.pth \
        --out=weights/lpips_vgg.npz

(the backbone is torchvision's, or alexnet-owt-7be5be79.pth, and the linear layers are those of
lpips/weights/v0.1 of github.com/richzhang/PerceptualSimilarity);

    python experiments/convert.py --family=inception \
        --files=pt_inception-2015-12-05-6726825d.pth --out=weights/inception.npz

(of the releases of github.com/mseitzer/pytorch-fid). Nothing is ever overwritten.
"""

from __future__ import annotations

import ast
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from ar_jax.convert.conversion import convert_files
from ar_jax.convert.directory import check_absent, export_directory, write_directory
from ar_jax.convert.networks import NETWORK_FAMILIES, convert_network
from ar_jax.convert.places import flat_leaves
from ar_jax.convert.release import FAMILIES, choose
from ar_jax.io.console import configure_logging
from ar_jax.io.run_info import config_dict

FAMILY = flags.DEFINE_enum(
    "family", None, sorted({*FAMILIES, *NETWORK_FAMILIES}), "Whose files.", required=True
)
FILES = flags.DEFINE_list("files", None, "Official files of a network that judges images.")
TOKENIZER = flags.DEFINE_string("tokenizer", None, "Official file of the tokenizer.")
TRANSFORMER = flags.DEFINE_string("transformer", None, "Official file of the generator.")
OUT = flags.DEFINE_list(
    "out", None, "Directory; with --export the file(s): generator, tokenizer.", required=True
)
CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration to check and to take over.")
IMAGE_SIZE = flags.DEFINE_integer("image_size", None, "Pixels, where the files do not say.")
SCALES = flags.DEFINE_list("scales", None, "Sides of the scales, as 1,2,3,4, if not official ones.")
HEADS = flags.DEFINE_integer("heads", None, "Attention heads, where the files do not say.")
OPTION = flags.DEFINE_multi_string(
    "option", [], "NAME=VALUE: what else a file cannot say; see ar_jax/convert/FAMILY.py."
)
EXPORT = flags.DEFINE_bool("export", False, "The other way: --checkpoint into official files.")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir to export.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "auto", ("auto", "ema", "params"), "Which to export; auto: the EMA if there is one."
)
STEP = flags.DEFINE_integer("step", None, "Of the checkpoint to export; default the newest.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    if FAMILY.value in NETWORK_FAMILIES:
        _convert_network()
        return
    _refuse(f"--family={FAMILY.value}", files=FILES)
    family, start = choose(FAMILY.value), time.perf_counter()
    if EXPORT.value:
        _refuse("--export", tokenizer=TOKENIZER, transformer=TRANSFORMER)
        if not CHECKPOINT.value:
            raise app.UsageError("--export needs --checkpoint=DIR, the workdir to export")
        for line in export_directory(
            family, CHECKPOINT.value, OUT.value, WEIGHTS.value, STEP.value
        ):
            print(line)
        return
    _refuse("a conversion", checkpoint=CHECKPOINT, step=STEP)
    if not TOKENIZER.value and not hasattr(family, "NO_TOKENIZER"):
        raise app.UsageError("--tokenizer=FILE is needed: a generator's codes mean nothing alone")
    if len(OUT.value) != 1:
        raise app.UsageError(f"--out={','.join(OUT.value)} must be one directory")
    out = Path(OUT.value[0])
    check_absent(out)
    config = None if CONFIG.value is None else config_dict(CONFIG.value)
    converted = convert_files(
        family, TOKENIZER.value or None, TRANSFORMER.value, _options(), config
    )
    count = sum(leaf.size for leaf in flat_leaves(converted.params).values())
    write_directory(converted, out)
    seconds = time.perf_counter() - start
    print(f"{out}: {converted.kind}, {count:,} parameters, {seconds:.0f} s")


def _convert_network() -> None:
    name = FAMILY.value
    _refuse(f"--family={name}", tokenizer=TOKENIZER, transformer=TRANSFORMER, config=CONFIG)
    _refuse(f"--family={name}", checkpoint=CHECKPOINT, step=STEP)
    if EXPORT.value or _options():
        raise app.UsageError(f"--family={name} takes --files and --out alone")
    if not FILES.value or len(OUT.value) != 1:
        raise app.UsageError(f"--family={name} needs --files=FILE,... and one --out=FILE.npz")
    params = convert_network(name, FILES.value, OUT.value[0])
    count = sum(leaf.size for leaf in flat_leaves(params).values())
    print(f"{OUT.value[0]}: {name}, {count:,} parameters")


def _options() -> dict[str, Any]:
    options: dict[str, Any] = {"image_size": IMAGE_SIZE.value, "heads": HEADS.value}
    if SCALES.value is not None:
        if not all(side.isdigit() for side in SCALES.value):
            raise app.UsageError(f"--scales={','.join(SCALES.value)} must be numbers, as 1,2,3,4")
        options["scales"] = tuple(int(side) for side in SCALES.value)
    for text in OPTION.value:
        name, equals, value = text.partition("=")
        if not equals:
            raise app.UsageError(f"--option={text} must be NAME=VALUE")
        try:
            options[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[name] = value  # a word
    return {name: value for name, value in options.items() if value is not None}


def _refuse(what: str, **given: Any) -> None:
    for name, flag in given.items():
        if flag.value is not None:
            raise app.UsageError(f"--{name} does not go with {what}")


if __name__ == "__main__":
    app.run(main)
