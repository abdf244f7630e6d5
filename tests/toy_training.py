"""A small objective, its data and its configuration: what the tests of training train.

Run as a script it trains in a directory of its own, for tests that kill the process.
"""

from __future__ import annotations

import argparse
import dataclasses
import threading
import time
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from ar_jax.api import Array, Aux, Batch, Params, Stats, weighted_mean
from ar_jax.train.loop import train

CLASSES, WIDTH, LAYERS = 8, 16, 2


def uniform(key: Array, shape: tuple[int, ...]) -> Array:
    """Float32 in [-1, 1)."""
    return jax.random.uniform(key, shape, minval=-1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ToyObjective:
    """Classification of 4x4 images by a residual stack, with noise, statistics and a `finish`.

    Attributes:
        noise: of the inputs, drawn from the key; 0 makes the loss a mean over rows.
        poison: rows whose label is this make the loss NaN; -1: none.
    """

    noise: float = 0.0
    poison: int = -1
    tokens_per_image: int = 16

    def init(self, key: Array) -> Params:
        shapes = {
            "up": (LAYERS, WIDTH, 2 * WIDTH),
            "down": (LAYERS, 2 * WIDTH, WIDTH),
            "embed": (CLASSES + 1, WIDTH),
            "head": (WIDTH, CLASSES),
        }
        # One draw for all: a program compiles faster the fewer draws are in it.
        sizes = np.cumsum([0, *map(np.prod, shapes.values())])
        flat = uniform(key, (int(sizes[-1]),)) * 0.3
        draws = {
            name: flat[start:end].reshape(shape)
            for (name, shape), start, end in zip(shapes.items(), sizes, sizes[1:], strict=False)
        }
        blocks = {
            "mlp": {
                "up": {"kernel": draws["up"], "bias": jnp.zeros((LAYERS, 2 * WIDTH))},
                "down": {"kernel": draws["down"]},
            }
        }
        return {
            "backbone": {
                "stack": {"blocks": blocks},
                "class_embed": {"embedding": draws["embed"]},
            },
            "head": {"kernel": draws["head"], "bias": jnp.zeros(CLASSES)},
        }

    def init_stats(self, params: Params) -> Stats:
        return {"counts": jnp.zeros(CLASSES), "rows": jnp.zeros((), jnp.int32)}

    def loss(
        self,
        params: Params,
        stats: Stats,
        frozen: Params,
        batch: Batch,
        key: Array,
        train: bool,
        step: Array | int = 0,
    ) -> tuple[Array, Aux]:
        labels, mask = batch["label"], batch.get("mask")
        x = batch["image"].reshape(len(labels), -1).astype(jnp.float32) / 127.5 - 1.0
        if train and self.noise:
            x = x + self.noise * uniform(key, x.shape)
        x = x + params["backbone"]["class_embed"]["embedding"][(labels * 5) % CLASSES]

        def block(x: Array, layer: Any) -> tuple[Array, None]:
            up, down = layer["mlp"]["up"], layer["mlp"]["down"]
            hidden = jax.nn.relu(x @ up["kernel"] + up["bias"][None])
            return x + hidden @ down["kernel"], None

        x, _ = jax.lax.scan(block, x, params["backbone"]["stack"]["blocks"])
        logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
        losses = jnp.where(labels == self.poison, jnp.nan, -picked)
        guess = jnp.argmax(logits, -1)
        correct = (guess == labels).astype(jnp.float32)
        sums = {"counts": jax.nn.one_hot(guess, CLASSES).sum(0), "rows": jnp.int32(len(labels))}
        return weighted_mean(losses, mask), Aux(
            metrics={"accuracy": weighted_mean(correct, mask)},
            sums=sums,
            last={"label": labels[-1]},
        )

    def finish(
        self, params: Params, stats: Stats, sums: Any, last: Any, key: Array
    ) -> tuple[Params, Stats]:
        stats = {
            "counts": 0.9 * stats["counts"] + 0.1 * sums["counts"],
            "rows": stats["rows"] + sums["rows"],
        }
        head = params["head"]
        bias = head["bias"] + 1e-3 * self.noise * uniform(key, head["bias"].shape)
        return params | {"head": head | {"bias": bias}}, stats


def toy_config(**overrides: Any) -> ml_collections.ConfigDict:
    """Forty steps with everything on; keys of ``overrides`` are 'a.b' with '__' for the dot."""
    config = ml_collections.ConfigDict(
        {
            "seed": 3,
            "precision": "default",
            "train": {
                "steps": 40,
                "batch_size": 16,
                "accumulation": 2,
                "log_every": 1,
                "eval_every": 10,
                "eval_batches": 0,
                "preview_every": 0,
                "checkpoint_every": 7,
                "keep_checkpoints": 2,
                "best_metric": "",
                "best_mode": "min",
                "max_bad_steps": 5,
                "wandb": False,
            },
            "optimizer": {
                "name": "adamw",
                "learning_rate": 1e-2,
                "schedule": "cosine",
                "warmup_steps": 4,
                "warmup_start": 0.1,
                "hold": 0.0,
                "end_ratio": 0.1,
                "b1": 0.9,
                "b2": 0.95,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "weight_decay_end": 0.1,
                "no_decay": ("class_embed",),
                "clip_norm": 1.0,
            },
            "ema": {"decay": 0.9, "warmup": True},
            "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
        }
    )
    config.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in overrides.items()}
    )
    return config


def toy_item(index: int, delay: float = 0.0) -> dict[str, np.ndarray]:
    """Item ``index``: an image that mostly shows its label."""
    time.sleep(delay)
    rng = np.random.default_rng(index)
    label = index % CLASSES
    image = rng.integers(0, 120, (4, 4, 1))
    image[label // 4, label % 4] += 120
    return {"image": image.astype(np.uint8), "label": np.array(label, np.int32)}


def own_rows(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """This process's block of a global batch."""
    count, index = jax.process_count(), jax.process_index()
    return {name: np.split(rows, count)[index] for name, rows in batch.items()}


def toy_data(config: ml_collections.ConfigDict, delay: float = 0.0, hang_at: int = 0) -> Any:
    """Endless shuffled batches; ``delay`` seconds an item; the ``hang_at``th batch never comes."""

    def hang(index: int, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if index + 1 == hang_at:
            threading.Event().wait()
        return batch

    return iter(
        grain.MapDataset.range(64)
        .seed(config.seed)
        .shuffle()
        .map(lambda index: toy_item(int(index), delay))
        .repeat(None)
        .batch(config.train.batch_size)
        .map(own_rows)
        .map_with_index(hang)
        .to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
    )


def toy_eval(rows: int = 40, batch_size: int = 16) -> list[dict[str, np.ndarray]]:
    """Masked batches of ``rows`` unseen items."""
    batches = []
    for start in range(0, rows, batch_size):
        items = [toy_item(1000 + i) for i in range(start, start + batch_size)]
        batch = {name: np.stack([item[name] for item in items]) for name in items[0]}
        batch["mask"] = (np.arange(start, start + batch_size) < rows).astype(np.float32)
        batches.append(own_rows(batch))
    return batches


def toy_train(config: ml_collections.ConfigDict, workdir: Any, **fields: Any) -> Any:
    """Trains the noisy toy (or another ``objective``) on its data."""
    data = toy_data(config, fields.pop("delay", 0.0))
    objective = fields.pop("objective", ToyObjective(noise=0.1))
    return train(config, objective, {}, workdir, data, toy_eval(), **fields)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("workdir")
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--process", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--address", default="")
    arguments = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    if arguments.processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(arguments.address, arguments.processes, arguments.process)
    toy_train(
        toy_config(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
        arguments.workdir,
        delay=arguments.delay,
    )
