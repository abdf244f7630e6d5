"""Golden cases as the files that the official code writes, and their conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ar_jax.convert import weight_file
from ar_jax.convert.conversion import Converted, convert_files
from ar_jax.convert.parity.case import Case
from ar_jax.convert.release import choose

GOLDEN = Path(__file__).parent / "golden"
# Of each family: its case, the names of tokenizer and generator in the case, the entries of a file
# that hold them, and what the files cannot say.
CASES = {
    "var": "var/tiny_a",
    "llamagen": "llamagen/tiny",
    "rar": "rar/tiny",
    "mar": "mar/tiny",
}
PARTS = {
    "var": ("tokenizer", "transformer"),
    "llamagen": ("tokenizer", "gpt_c2i"),
    "rar": ("tokenizer", "generator"),
    "mar": ("vae", "mar"),
}
CONTAINERS = {"llamagen": ("model", "model"), "mar": ("model", "model_ema")}
OPTIONS: dict[str, dict[str, Any]] = {
    "var": {"scales": (1, 2, 3, 4)},
    "llamagen": {"heads": 4, "image_size": 32},
    "rar": {},
    "mar": {"heads": 4, "decoder_heads": 6, "buffer": 4},
}


def official(case: Case, part: str) -> dict[str, np.ndarray]:
    """A whole state_dict; buffers are zeros but for VAR's numbering of the scales."""
    made = {t["key"]: np.zeros(t["shape"], t["dtype"]) for t in case.tensors(part)}
    if "lvl_1L" in made:
        sides = np.array(case.spec["config"][part]["patch_nums"])
        made["lvl_1L"][0] = np.repeat(np.arange(len(sides)), sides**2)
    return made | case.state_dict(part)


def write_files(family: str, folder: Path) -> tuple[Path, Path]:
    """The tokenizer's and the transformer's file of a family's case, as it is released."""
    case = Case.load(GOLDEN / CASES[family])
    paths = folder / "tokenizer.pt", folder / "transformer.pt"
    entries = CONTAINERS.get(family, ("", ""))
    for path, part, entry in zip(paths, PARTS[family], entries, strict=True):
        tensors = official(case, part)
        weight_file.write(path, {entry: tensors} if entry else tensors)
    return paths


def convert(family: str, files: tuple[Path, Path | None], **changes: Any) -> Converted:
    """The files with the case's options; a tokenizer alone has no heads to speak of."""
    options = {**OPTIONS[family], **changes}
    if files[1] is None:
        options.pop("heads", None)
    return convert_files(choose(family), *files, options)
