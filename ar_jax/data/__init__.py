"""Data sources and Grain pipelines, uint8 on the host."""

from __future__ import annotations

from ar_jax.data.codes import CodesSource
from ar_jax.data.codes_writer import CodesWriter
from ar_jax.data.config import Data, from_config
from ar_jax.data.eval_pipeline import EvalBatches, eval_batches
from ar_jax.data.pipeline import TrainIterator, train_iterator
from ar_jax.data.source import SkipUnreadable, Source, UnreadableItem
from ar_jax.data.sources import open_source
from ar_jax.data.transforms import ImageTransform

__all__ = [
    "CodesSource",
    "CodesWriter",
    "Data",
    "EvalBatches",
    "ImageTransform",
    "SkipUnreadable",
    "Source",
    "TrainIterator",
    "UnreadableItem",
    "eval_batches",
    "from_config",
    "open_source",
    "train_iterator",
]
