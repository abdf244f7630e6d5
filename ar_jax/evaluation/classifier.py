"""A small image classifier whose answers and features the evaluation of generators is built on.

It ships with the package (`weights/`), so that generated images can be judged where nothing can be
downloaded. Its Frechet distance is reported as `classifier_frechet_distance`, never as FID.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.nn.classifier import BATCH_NORM_EPSILON, ConvClassifier

WEIGHTS = Path(__file__).parent / "weights"
FASHION_MNIST = WEIGHTS / "fashion_mnist_classifier.npz"


def fold_batch_norm(params: Any, batch_stats: Any) -> Any:
    """Parameters of the same network without normalisation layers, equal at evaluation.

    Args:
        params: of a `ConvClassifier(batch_norm=True)`.
        batch_stats: its running means and variances.

    Returns:
        Parameters of the same module with `batch_norm=False`.
    """
    folded = {}
    for name, layer in params.items():
        if name.endswith("_norm"):
            continue
        norm = params.get(f"{name}_norm")
        if norm is None:
            folded[name] = dict(layer)
            continue
        stats = batch_stats[f"{name}_norm"]
        scale = norm["scale"] * jax.lax.rsqrt(stats["var"] + BATCH_NORM_EPSILON)  # [out]
        kernel = layer["kernel"]  # [..., out]
        folded[name] = {
            "kernel": kernel * scale.reshape((1,) * (kernel.ndim - 1) + scale.shape),
            "bias": norm["bias"] - stats["mean"] * scale,
        }
    return folded


class ClassifierOutput(NamedTuple):
    """What the classifier says of N images, as numpy arrays."""

    logits: np.ndarray  # [N, num_classes] float32
    features: np.ndarray  # [N, num_features] float32

    @property
    def probabilities(self) -> np.ndarray:
        """Softmax of the logits in float64, [N, num_classes]."""
        shifted = self.logits.astype(np.float64) - self.logits.max(axis=1, keepdims=True)
        exp = np.exp(shifted)
        return exp / exp.sum(axis=1, keepdims=True)

    @property
    def predictions(self) -> np.ndarray:
        """The most probable class, [N] int."""
        return self.logits.argmax(axis=1)


@functools.partial(jax.jit, static_argnames="module")
def _forward(module: ConvClassifier, params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return module.apply({"params": params}, images)  # type: ignore[return-value]


@dataclass(frozen=True)
class Classifier:
    """A trained classifier: call it on uint8 images.

    Attributes:
        name: what reports call it.
        module: the network.
        params: its parameters, float32.
        image_shape: (H, W, C) of the images it was trained on, the only shape it accepts.
        class_names: one name for each logit.
        meta: everything the weights' json says (accuracies, training data, seed).
    """

    name: str
    module: ConvClassifier
    params: Any
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    meta: dict[str, Any]

    def __call__(self, images: np.ndarray, batch_size: int = 256) -> ClassifierOutput:
        """Logits and features of uint8 images [N, H, W, C], computed `batch_size` at a time.

        Raises:
            ValueError: images of another dtype or shape than the classifier was trained on.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8:
            raise ValueError(
                f"images: dtype {images.dtype}, but the classifier {self.name!r} takes uint8 0..255"
            )
        if images.ndim != 4 or images.shape[1:] != self.image_shape:
            raise ValueError(
                f"images: shape {images.shape}, but the classifier {self.name!r} takes "
                f"[N, {', '.join(map(str, self.image_shape))}]"
            )
        logits = np.empty((len(images), self.module.num_classes), np.float32)
        features = np.empty((len(images), self.module.num_features), np.float32)
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            count = len(batch)
            if count < batch_size:  # one compiled program: the last batch is filled up with zeros
                filler = np.zeros((batch_size - count, *self.image_shape), np.uint8)
                batch = np.concatenate([batch, filler])
            out = jax.device_get(_forward(self.module, self.params, batch))
            logits[start : start + count] = out[0][:count]
            features[start : start + count] = out[1][:count]
        return ClassifierOutput(logits, features)


def accuracy(classifier: Classifier, images: np.ndarray, labels: np.ndarray) -> float:
    """Fraction of images [N, H, W, C] whose most probable class is their label [N]."""
    labels = np.asarray(labels)
    if len(labels) != len(images):
        raise ValueError(f"labels: {len(labels)} of them for {len(images)} images")
    return float((classifier(images).predictions == labels).mean())


def load_classifier(path: str | Path = FASHION_MNIST) -> Classifier:
    """Reads a classifier written by `save_classifier`; by default the shipped Fashion-MNIST one.

    Raises:
        ValueError: the npz or the json beside it is missing, or they do not fit each other.
    """
    path = Path(path)
    meta_path = path.with_suffix(".json")
    for file in (path, meta_path):
        if not file.is_file():
            raise ValueError(
                f"{file}: no such file; a classifier is an .npz with its .json beside it, "
                "written by experiments/train_classifier.py"
            )
    meta = json.loads(meta_path.read_text())
    fields = meta["module"]
    module = ConvClassifier(
        num_classes=fields["num_classes"],
        widths=tuple(fields["widths"]),
        blocks=tuple(fields["blocks"]),
        num_features=fields["num_features"],
        dropout=fields["dropout"],
    )
    shape = tuple(meta["image_shape"])
    expected = jax.eval_shape(
        module.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *shape), jnp.uint8)
    )["params"]
    with np.load(path) as arrays:
        stored = {name: arrays[name] for name in arrays.files}
    params: dict[str, dict[str, jax.Array]] = {}
    for layer, leaves in expected.items():
        for leaf, want in leaves.items():
            name = f"{layer}/{leaf}"
            if name not in stored:
                raise ValueError(f"{path}: no array {name!r}, which {meta_path.name} asks for")
            array = stored.pop(name)
            if array.shape != want.shape:
                raise ValueError(f"{path}: {name!r} has shape {array.shape}, expected {want.shape}")
            params.setdefault(layer, {})[leaf] = jnp.asarray(array, jnp.float32)
    if stored:
        raise ValueError(f"{path}: arrays {sorted(stored)} belong to no layer of {meta_path.name}")
    return Classifier(
        name=meta["name"],
        module=module,
        params=params,
        image_shape=shape,
        class_names=tuple(meta["class_names"]),
        meta=meta,
    )


def save_classifier(classifier: Classifier, path: str | Path) -> None:
    """Writes parameters (float16) to `path` (.npz) and everything else to the .json beside it.

    Evaluate the classifier on `round_to_shipped` parameters before stating its accuracy.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise ValueError(f"path: {str(path)!r} must end in .npz")
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {
        f"{layer}/{leaf}": np.asarray(value, np.float16)
        for layer, leaves in classifier.params.items()
        for leaf, value in leaves.items()
    }
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    module = classifier.module
    meta = {
        "name": classifier.name,
        "class_names": list(classifier.class_names),
        "image_shape": list(classifier.image_shape),
        "module": {
            "num_classes": module.num_classes,
            "widths": list(module.widths),
            "blocks": list(module.blocks),
            "num_features": module.num_features,
            "dropout": module.dropout,
        },
        **classifier.meta,
    }
    path.with_suffix(".json").write_text(json.dumps(meta, indent=2) + "\n")


def round_to_shipped(params: Any) -> Any:
    """Parameters as they will be after `save_classifier` and `load_classifier`."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float16).astype(jnp.float32), params)
