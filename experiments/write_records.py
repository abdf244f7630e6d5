"""Packs images into ArrayRecord files: a few large files in place of one for each image.

    python experiments/write_records.py --source=folder:data/imagenet --out=data/imagenet_records
    python experiments/train.py ... --config.data.source=arrayrecord:data/imagenet_records

Image files keep their bytes and their order, so that a run reads the same from both. Each is
decoded once: one that cannot be read is named, and nothing is written for its split. The same
command again writes only the splits that are missing.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags

from ar_jax.data import Source, open_source
from ar_jax.data.records import source_items, write_records
from ar_jax.io.console import configure_logging
from ar_jax.io.progress import Progress

SPLITS = ("train", "test")

SOURCE = flags.DEFINE_string("source", None, "Images, as config.data.source.", required=True)
OUT = flags.DEFINE_string("out", None, "Directory that gets train/ and test/.", required=True)
CHANNELS = flags.DEFINE_integer("channels", 3, "Of the images as they are read; 1 or 3.")


def write_split(source: Source, directory: Path, split: str) -> int:
    """Writes ``directory``/``split``, which appears when it is complete; returns its images.

    Raises:
        ValueError: an image that cannot be read, or a source of codes.
    """
    if source.kind != "image":
        raise ValueError(f"--source={SOURCE.value} holds codes; name images")
    partial = directory / f".{split}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a process that was killed
    with Progress(len(source), title=f"packing {split} images", unit="image") as progress:

        def items() -> Iterator[tuple[Any, int]]:
            for item in source_items(source):
                yield item
                progress.advance()

        try:
            count = write_records(partial, items(), class_names=source.class_names)
            os.replace(partial, directory / split)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return count


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}; write --flag=value")
    configure_logging()
    directory = Path(OUT.value)
    for split in SPLITS:
        if (directory / split).exists():
            print(f"{directory / split}: there already")
            continue
        source = open_source(SOURCE.value, split, channels=CHANNELS.value)
        print(f"{directory / split}: {write_split(source, directory, split):,} images")


if __name__ == "__main__":
    app.run(main)
