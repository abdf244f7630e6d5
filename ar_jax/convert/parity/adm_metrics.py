"""The golden cases of the ADM evaluator's arithmetic: FID, inception score, precision and recall.

There are no weights: features are regenerated from the recipes in spec.json.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section
from ar_jax.evaluation.frechet import frechet_parts, gaussian_stats
from ar_jax.evaluation.inception_score import inception_score, log_softmax
from ar_jax.evaluation.manifold import (
    NEIGHBOURS,
    Distances,
    half_distances,
    inside,
    manifold_radii,
    rough_distances,
    squared_distances,
)

NOT_APPLICABLE: dict[str, str] = {}
CLASSES = 1008
# What the READMEs ask of a correct port.
LIMITS = {
    "fid_*": 1e-5,
    "is_split*": 1e-5,
    # Ten times the 0.4 % by which two ways to add float16 squares differ.
    "pr_*_radii_ref": 0.04,
    "pr_*_radii_sample": 0.04,
    "pr_*_dist": 0.02,
    # Differences of float32 squares: ten times what was measured where they cancel most.
    "pr_*_radii_*_f32": 1e-4,
}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return ("*_head",)


def limits(case: Case) -> dict[str, float]:
    """The relative limits that the READMEs name."""
    return LIMITS


def absolute(case: Case) -> dict[str, float]:
    """The absolute limits that the READMEs name: identical sets, and counts that may flip."""
    found = {f"fid_{fid['name']}*": 1e-9 for fid in _comparisons(case, "fid") if fid.get("same")}
    for settings in _comparisons(case, "pr"):
        name = f"pr_{settings['name']}"
        one = 1 / min(settings[part]["n"] for part in ("ref", "sample"))
        found[f"{name}_f32"] = max(one, _flips(settings)) if settings.get("dup") else one
        found |= {name: _flips(settings), f"{name}_f16acc32": _flips(settings)}
    return found


def flips(case: Case) -> dict[str, float]:
    """The share of a manifold's members that may fall on the other side, in float16."""
    return {f"pr_{pr['name']}_*_inside": _flips(pr) for pr in _comparisons(case, "pr")}


def _comparisons(case: Case, kind: str) -> list[dict[str, Any]]:
    """The settings of every comparison of a kind; unlike other sections this is a list."""
    found: Any = case.config(kind)
    return list(found)


def _flips(settings: Mapping[str, Any]) -> float:
    return 0.03 if settings.get("dup") else 0.02  # duplicates are ties


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    for settings in _comparisons(case, "fid"):
        outputs = (f"fid_{settings['name']}", f"fid_{settings['name']}_*")
        yield Section(outputs, functools.partial(_frechet, case, settings))
    yield Section(("is_*",), lambda: _inception_score(case))
    for settings in _comparisons(case, "pr"):
        outputs = (f"pr_{settings['name']}", f"pr_{settings['name']}_*")
        yield Section(outputs, functools.partial(_precision_recall, settings))


def features(recipe: Mapping[str, Any]) -> np.ndarray:
    """A recipe's features, float32 [n, d], as the READMEs say."""
    shape = (recipe["n"], recipe["d"])
    z = np.random.RandomState(recipe["seed"]).standard_normal((shape[0], recipe["rank"]))
    noise = np.random.RandomState(recipe["seed"] + 1).standard_normal(shape)
    scale = np.random.RandomState(recipe["scale_seed"]).uniform(0.3, 1.0, shape[1])
    column = np.arange(shape[1])
    x = recipe["mean"] + recipe["shift"] * np.cos(column)
    x = x + recipe["std"] * scale * z[:, column % recipe["rank"]] * recipe["spread"]
    x = x + recipe["noise"] * noise
    x = np.abs(x) if recipe["abs"] else x
    x[:, : recipe["const_dims"]] = 0.25
    x = x * recipe["gain"]
    if recipe["gain_last_rows"]:
        x[-recipe["gain_last_rows"] :] *= 400
    return x.astype(np.float32)


def _pair(settings: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """Reference and sample features of a comparison."""
    reference = features(settings["ref"])
    if settings.get("same"):
        return reference, reference
    samples = features(settings["sample"])
    if count := settings.get("dup"):
        samples[:count] = samples[count : 2 * count] = reference[:count]
    return reference, samples


def _check_head(case: Case, name: str, made: np.ndarray) -> None:
    """Raises ValueError if what was regenerated is not what was recorded."""
    if name in case.io:
        rows, columns = case[name].shape
        if not np.array_equal(made[:rows, :columns], case[name]):
            raise ValueError(f"the features of {name} are regenerated otherwise than recorded")


def _frechet(case: Case, settings: Mapping[str, Any]) -> Outputs:
    reference, samples = _pair(settings)
    if settings.get("first"):
        _check_head(case, "fid_ref_head", reference)
    stats, theirs = gaussian_stats(reference), gaussian_stats(samples)
    parts = frechet_parts(theirs, stats)
    name = f"fid_{settings['name']}"
    for end in ("", "_eigh", "_eigh_f64mean"):
        yield name + end, parts.distance
    yield f"{name}_parts", np.array(parts)
    yield f"{name}_mu", stats.mean
    yield f"{name}_sigma8", stats.covariance[:8, :8]


def _inception_score(case: Case) -> Outputs:
    settings = case.config("is")
    x = features(settings["features"])
    _check_head(case, "is_features_head", x)
    seed = zlib.crc32(settings["weight_key"].encode())
    weights = np.random.RandomState(seed).standard_normal((x.shape[1], CLASSES))
    weights = (settings["weight_std"] * weights).astype(np.float32)
    logits = x @ weights
    for size in settings["splits"]:
        yield f"is_split{size}", inception_score(logits, size)
        yield f"is_split{size}_f64", inception_score(logits, size)
    probabilities = np.exp(log_softmax(logits))
    yield "is_probs4", probabilities[:4, ::16].astype(np.float32)
    yield "is_min_prob", probabilities.min().astype(np.float32)
    # Ours stays finite there; that ADM's does not is a fact of its probabilities.
    large = np.exp(log_softmax((x * np.float32(settings["underflow_gain"])) @ weights))
    yield "is_underflow_isnan", np.bool_((large.astype(np.float32) == 0).any())


def _precision_recall(settings: Mapping[str, Any]) -> Outputs:
    reference, samples = _pair(settings)
    block = (settings["row_batch"], settings["col_batch"])
    name = f"pr_{settings['name']}"
    ways: dict[str, Distances] = {"": half_distances, "_f32": squared_distances}
    for end, distances in ways.items():
        radii = [
            manifold_radii(x, NEIGHBOURS, distances=distances, block=block)
            for x in (reference, samples)
        ]
        hits = [
            inside(points, members, reach, distances=distances, block=block)
            for points, members, reach in (
                (samples, reference, radii[0]),
                (reference, samples, radii[1]),
            )
        ]
        shares = np.array([hit.mean() for hit in hits])
        yield name + end, shares
        yield f"{name}_radii_ref{end}", radii[0]
        yield f"{name}_radii_sample{end}", radii[1]
        if distances is half_distances:
            yield f"{name}_f16acc32", shares
            yield f"{name}_sample_inside", hits[0]
            yield f"{name}_ref_inside", hits[1]
    pair = jnp.asarray(reference), jnp.asarray(samples)
    yield f"{name}_dist", np.asarray(half_distances(*pair))[:8, :8]
    yield f"{name}_fell_back", np.bool_(not np.isfinite(rough_distances(*pair)).all())
