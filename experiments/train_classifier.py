"""Trains the small classifier that the evaluation uses, and writes it with its measured accuracy.

    .venv/bin/python experiments/train_classifier.py --source=idx:DIR --skip_first=20000

DIR holds the four gzipped idx files of Fashion-MNIST. The first 20,000 training images are left
out, because they are the package's embedded training set: a classifier that had seen them would
place them elsewhere in feature space than unseen images, and the Frechet distance to them would
say so of every sample. Takes a few minutes on two cores.
"""

from __future__ import annotations

import functools
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from tqdm import tqdm

from ar_jax.data import open_source
from ar_jax.data.embedded import CLASS_NAMES
from ar_jax.evaluation import classifier as classifiers
from ar_jax.nn.classifier import ConvClassifier

_SOURCE = flags.DEFINE_string(
    "source", None, "Where the images are, as in config.data.source.", required=True
)
_SKIP_FIRST = flags.DEFINE_integer("skip_first", 20_000, "Training images left out at the front.")
_EMBEDDED_TEST = flags.DEFINE_integer(
    "embedded_test", 4_000, "Leading test images whose accuracy is stated on its own."
)
_OUTPUT = flags.DEFINE_string("output", str(classifiers.FASHION_MNIST), "The .npz to write.")
_NAME = flags.DEFINE_string("name", "fashion_mnist_classifier", "What reports call it.")
_DATASET = flags.DEFINE_string("dataset", "Fashion-MNIST", "What the weights' json calls the data.")
_CLASS_NAMES = flags.DEFINE_list("class_names", list(CLASS_NAMES), "One name per label, in order.")
_EPOCHS = flags.DEFINE_integer("epochs", 10, "Passes over the training images.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images in a step.")
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 4e-3, "Peak learning rate.")
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.05, "AdamW's, on kernels.")
_SMOOTHING = flags.DEFINE_float("label_smoothing", 0.05, "Mass spread over the other classes.")
_SHIFT = flags.DEFINE_integer("shift", 1, "Largest random shift of a training image, in pixels.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the parameters, the order and the shifts.")


def read_split(source: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """All images uint8 [N, H, W, C] and labels int32 [N] of a split."""
    examples = open_source(source, split)
    images = np.stack([examples[i]["image"] for i in range(len(examples))])
    labels = np.array([examples[i]["label"] for i in range(len(examples))], np.int32)
    names = _CLASS_NAMES.value
    if len(names) != examples.num_classes:
        raise ValueError(
            f"--class_names: {len(names)} of them, but {source} has {examples.num_classes} classes"
        )
    return images, labels


def shift_images(images: jax.Array, key: jax.Array, shift: int) -> jax.Array:
    """Moves every image [B, H, W, C] by up to `shift` pixels each way, zeros coming in."""
    padded = jnp.pad(images, ((0, 0), (shift, shift), (shift, shift), (0, 0)))
    corners = jax.random.randint(key, (images.shape[0], 2), 0, 2 * shift + 1)

    def crop(image: jax.Array, corner: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, corners)


def make_step(module: ConvClassifier, tx: optax.GradientTransformation) -> Any:
    """One jitted update: (variables, opt_state, images, labels, key) -> the first two, loss."""
    smoothing, shift = _SMOOTHING.value, _SHIFT.value

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(variables: Any, opt_state: Any, images: jax.Array, labels: jax.Array, key: jax.Array):
        shift_key, dropout_key = jax.random.split(key)
        shifted = shift_images(images, shift_key, shift)
        targets = optax.smooth_labels(jax.nn.one_hot(labels, module.num_classes), smoothing)

        def loss_of(params: Any) -> tuple[jax.Array, Any]:
            (logits, _), mutated = module.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                shifted,
                train=True,
                rngs={"dropout": dropout_key},
                mutable=["batch_stats"],
            )
            return optax.losses.softmax_cross_entropy(logits, targets).mean(), mutated

        params = variables["params"]
        (loss, mutated), grads = jax.value_and_grad(loss_of, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return {"params": optax.apply_updates(params, updates), **mutated}, opt_state, loss

    return step


def train(module: ConvClassifier, images: np.ndarray, labels: np.ndarray) -> Any:
    """Folded parameters after the configured epochs over images [N, H, W, C], labels [N]."""
    batch_size = _BATCH_SIZE.value
    per_epoch = len(images) // batch_size
    steps = per_epoch * _EPOCHS.value
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, _LEARNING_RATE.value, max(1, steps // 20), steps
    )
    tx = optax.adamw(
        schedule,
        weight_decay=_WEIGHT_DECAY.value,
        mask=lambda params: jax.tree.map(lambda p: p.ndim > 1, params),
    )
    key = jax.random.key(_SEED.value)
    variables = jax.jit(module.init)(key, images[:1])
    opt_state = tx.init(variables["params"])
    step = make_step(module, tx)
    order = np.random.default_rng(_SEED.value)
    losses: list[jax.Array] = []
    with tqdm(total=steps, unit="step", mininterval=1.0) as bar:
        for _ in range(_EPOCHS.value):
            permutation = order.permutation(len(images))[: per_epoch * batch_size]
            for chosen in permutation.reshape(per_epoch, batch_size):
                step_key = jax.random.fold_in(key, len(losses))
                variables, opt_state, loss = step(
                    variables, opt_state, images[chosen], labels[chosen], step_key
                )
                losses.append(loss)
                bar.update()
            bar.set_postfix(loss=f"{np.mean(jax.device_get(losses[-per_epoch:])):.3f}")
    return classifiers.fold_batch_norm(variables["params"], variables["batch_stats"])


def main(argv: list[str]) -> None:
    """Trains, rounds to the shipped precision, measures, writes."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: everything is a --flag")
    train_images, train_labels = read_split(_SOURCE.value, "train")
    test_images, test_labels = read_split(_SOURCE.value, "test")
    skip = _SKIP_FIRST.value
    if not 0 <= skip < len(train_images):
        raise ValueError(f"--skip_first={skip}: the source has {len(train_images)} train images")
    module = ConvClassifier(num_classes=len(_CLASS_NAMES.value), batch_norm=True)
    started = time.time()
    params = train(module, train_images[skip:], train_labels[skip:])
    seconds = time.time() - started
    trained = classifiers.Classifier(
        name=_NAME.value,
        module=module.clone(batch_norm=False),
        params=classifiers.round_to_shipped(params),
        image_shape=train_images.shape[1:],
        class_names=tuple(_CLASS_NAMES.value),
        meta={},
    )
    first = _EMBEDDED_TEST.value
    correct = trained(test_images).predictions == test_labels
    correct_train = trained(train_images).predictions == train_labels
    trained.meta.update(
        test_accuracy=float(correct[:first].mean()),
        test_images=f"the first {len(correct[:first])} test images (the embedded test set)",
        full_test_accuracy=float(correct.mean()),
        full_test_images=len(correct),
        train_accuracy=float(correct_train[skip:].mean()),
        unseen_train_accuracy=float(correct_train[:skip].mean()) if skip else None,
        trained_on=f"train images {skip} to {len(train_images)} of {_DATASET.value}",
        recipe={
            "epochs": _EPOCHS.value,
            "batch_size": _BATCH_SIZE.value,
            "learning_rate": _LEARNING_RATE.value,
            "weight_decay": _WEIGHT_DECAY.value,
            "label_smoothing": _SMOOTHING.value,
            "shift": _SHIFT.value,
            "seed": _SEED.value,
        },
    )
    classifiers.save_classifier(trained, _OUTPUT.value)
    print(f"{seconds:.0f} s of training; {_OUTPUT.value}: {trained.meta}")


if __name__ == "__main__":
    app.run(main)
