"""The golden cases of FID's Inception-v3: resize, every block, features and logits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.convert import inception
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section
from ar_jax.convert.parity.readings import nchw
from ar_jax.nn.inception import BLOCKS, STEM, Inception, preprocess, resize

NOT_APPLICABLE: Mapping[str, str] = {}
MEANS = {"feat_64": "MaxPool_1", "feat_192": "MaxPool_2", "feat_768": "Mixed_6e"}


def inputs(case: Case) -> Sequence[str]:
    """Images."""
    return ("images__*",)


def sections(case: Case) -> Iterable[Section]:
    """The resize, and the network, on all batches of images."""
    yield Section(("resized_*", "scaled_*"), lambda: _resized(case))
    yield Section(("stage_*", "spatial_*", "feat_*", "probs_*"), lambda: _network(case))


def load(case: Case) -> Any:
    """Our parameters of the case."""
    part = inception.network(case.shapes("inception"))
    return case.params("inception", part, inception.expected(part))


def _batches(case: Case) -> dict[str, jax.Array]:
    """The end of their names -> uint8 [N, H, W, 3]."""
    found = case.names("images(__.+)")
    return {match[1]: jnp.moveaxis(jnp.asarray(case[name]), 1, -1) for name, match in found}


def _resized(case: Case) -> Outputs:
    for end, images in _batches(case).items():
        resized = nchw(resize(images))
        yield f"resized_s13{end}", resized[..., ::13, ::13]
        yield f"resized_corner{end}", resized[..., 295:, 295:]
        yield f"scaled_s13{end}", nchw(preprocess(images))[..., ::13, ::13]


def _network(case: Case) -> Outputs:
    """All batches in one program, which is what takes long."""
    params, batches = load(case), _batches(case)

    @jax.jit
    def run(params: Any, x: jax.Array) -> Any:
        return Inception().apply({"params": params}, x, mutable=["intermediates"])

    out = run(params, jnp.concatenate([preprocess(images) for images in batches.values()]))
    start = 0
    for end, images in batches.items():
        rows = slice(start, start + len(images))
        start += len(images)
        features, inside = jax.tree.map(lambda leaf, rows=rows: np.asarray(leaf[rows]), out)
        inside = inside["intermediates"]
        after = {name: inside[f"after_{name}"][0] for name in (*(u[0] for u in STEM), *BLOCKS)}
        for name, stage in after.items():
            channels, step = max(1, stage.shape[-1] // 8), max(1, stage.shape[1] // 5)
            yield f"stage_{name}{end}", nchw(stage)[:, ::channels, ::step, ::step]
        before = inside["Mixed_6d"]["branch1x1"]["normed"][0]
        yield f"spatial_prerelu_c0{end}", before[..., 0]
        yield f"spatial{end}", features.spatial
        for name, stage in MEANS.items():
            yield f"{name}{end}", after[stage].mean((1, 2))
        yield f"feat_pool3{end}", features.pool
        yield f"feat_logits_nobias{end}", features.logits
        yield f"feat_logits{end}", features.logits + np.asarray(params["fc_bias"])
        yield f"probs_nobias{end}", jax.nn.softmax(features.logits)[:, ::8]
