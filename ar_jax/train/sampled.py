"""What a generator's own samples score while it trains."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.api import Params
from ar_jax.build import build_sampling, create_sampler
from ar_jax.evaluation.generation import Judge, score_samples
from ar_jax.evaluation.labels import balanced_labels
from ar_jax.evaluation.load import image_section
from ar_jax.evaluation.real import find_judge, open_splits
from ar_jax.evaluation.samples import check_class_conditional
from ar_jax.parallel.mesh import fetch
from ar_jax.sampling.loop import image_keys
from ar_jax.tokenizers.tokenizer import to_uint8
from ar_jax.train.loop import Measure

BATCH_SIZE = 100


def build_measure(config: Any, objective: Any, tokenizer: Params, count: int) -> Measure:
    """Class accuracy and Frechet distance of ``count`` samples by our own classifier.

    Always of the same keys and as many images of every class, drawn as `config.sampling` says, the
    distance to the training images. It falls with more samples: compare it with its own kind only.

    Args:
        config: of the run.
        objective: the generator's.
        tokenizer: its parameters.

    Raises:
        ValueError: no generator of classes, a count that they do not divide, or images that our
            classifier does not know.
    """
    field, system = f"config.train.sample_images={count}", objective.system
    check_class_conditional(system)
    classes = system.backbone.num_classes
    if count % classes:
        raise ValueError(f"{field} is no multiple of the {classes} classes")
    data = open_splits(image_section(config), system.tokenizer, tokenizer)
    judge, reason = find_judge(data["train"], data["test"], system.tokenizer.image_shape)
    if judge is None:
        raise ValueError(f"{field}: nothing judges the samples. {reason} Set it to 0")
    return measure_with(judge, config, system, balanced_labels(count, classes))


def measure_with(judge: Judge, config: Any, system: Any, labels: np.ndarray) -> Measure:
    """See `build_measure`; ``labels`` int32 [N]."""
    knobs, guidance = build_sampling(config)
    batch_size = min(BATCH_SIZE, len(labels))
    keys = image_keys(config["seed"], 0, len(labels))

    def measure(params: Params, frozen: Params) -> dict[str, float]:
        sampler = create_sampler(system, {**frozen, **params})
        parts = []
        for start in range(0, len(labels), batch_size):
            # The last batch is filled up: one program draws all.
            rows = np.minimum(np.arange(start, start + batch_size), len(labels) - 1)
            cond = {"label": jnp.asarray(labels[rows])}
            samples = sampler(cond, keys[rows], knobs=knobs, guidance=guidance)
            parts.append(fetch(to_uint8(samples.images)))
        return score_samples(judge, np.concatenate(parts)[: len(labels)], labels)

    return measure
