"""The sections of a configuration that the loop reads, checked against what takes them."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
from jax.sharding import Mesh

from ar_jax.field_types import check_types
from ar_jax.io.best_checkpoint import choose_best
from ar_jax.parallel.mesh import check_batch, make_mesh
from ar_jax.train.optimizer import Optimizer, build_optimizer

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainFields:
    """``config.train``. Every ``*_every`` counts steps; 0 never; the last step always counts.

    Attributes:
        steps: of the whole run.
        batch_size: rows of one step, over all devices and microbatches.
        accumulation: microbatches of a step.
        eval_batches: of one evaluation, spread over the test split; 0: all of it.
        sample_images: so many samples of a generator are judged by our own classifier at every
            evaluation, see `ar_jax.train.sampled`; 0: none.
        keep_checkpoints: newest ones that are kept.
        skip_damaged_checkpoints: go on from the newest checkpoint that can be read if later ones
            are damaged; those are kept as ``<step>.damaged``. False: a damaged one is an error.
        best_metric: of an evaluation, as 'eval/loss' or 'samples/class_accuracy': the checkpoint
            with the best one so far is kept beside the newest, saved whenever an evaluation finds a
            better; '': none is.
        best_mode: 'min' or 'max': which is the best.
        stuck_after_seconds: the process ends if one batch, step, evaluation batch, preview or save
            takes longer, compilation aside; 0: it waits for ever.
        max_bad_steps: the run stops after so many skipped steps in a row.
        wandb: also log to Weights & Biases.
    """

    steps: int
    batch_size: int
    accumulation: int = 1
    log_every: int
    eval_every: int
    eval_batches: int = 0
    sample_images: int = 0
    preview_every: int
    checkpoint_every: int
    keep_checkpoints: int = 2
    skip_damaged_checkpoints: bool = False
    best_metric: str = ""
    best_mode: str = "min"
    stuck_after_seconds: int = 1800
    max_bad_steps: int = 20
    wandb: bool = False

    def __post_init__(self) -> None:
        least = {"steps": 1, "batch_size": 1, "accumulation": 1}
        least |= {"keep_checkpoints": 1, "max_bad_steps": 1, "log_every": 1}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, bool | str) and value < least.get(field.name, 0):
                raise ValueError(
                    f"config.train.{field.name}={value} must be at least {least.get(field.name, 0)}"
                )
        if self.sample_images and not self.eval_every:
            raise ValueError(
                f"config.train.sample_images={self.sample_images} are judged by evaluations, of "
                "which config.train.eval_every=0 makes none"
            )
        if choose_best(self.best_metric, self.best_mode) is not None and not self.eval_every:
            raise ValueError(
                f"config.train.best_metric={self.best_metric!r} is measured by evaluations, of "
                "which config.train.eval_every=0 makes none"
            )

    def due(self, step: int, every: int) -> bool:
        """Whether what happens ``every`` steps happens after ``step`` steps."""
        return every > 0 and (step % every == 0 or step == self.steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmaFields:
    """``config.ema``: see `ar_jax.train.step.make_train_step`."""

    decay: float
    warmup: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"config.ema.decay={self.decay} must lie in [0, 1); 0 turns the EMA off"
            )


def call_with(
    function: Callable[..., T], section: Mapping[str, Any], name: str, **placed: Any
) -> T:
    """``function(**section, **placed)``.

    Raises:
        ValueError: names the field of config.``name`` that is unknown, missing or of another type.
    """
    signature = inspect.signature(function).parameters
    known = [field for field in signature if field not in placed]
    for field in section:
        if field not in known:
            raise ValueError(
                f"config.{name}.{field}={section[field]!r} is no field; config.{name} takes "
                f"{', '.join(known)}"
            )
    for field in known:
        if signature[field].default is inspect.Parameter.empty and field not in section:
            raise ValueError(f"config.{name}.{field} is missing")
    check_types(f"config.{name}", section, function)
    return function(**{field: section[field] for field in section}, **placed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """All that the loop takes from a configuration, checked as far as it goes without a model."""

    train: TrainFields
    ema: EmaFields
    optimizer: Optimizer
    discriminator_optimizer: Optimizer | None
    mesh: Mesh
    precision: str
    seed: int


def read_settings(
    config: Mapping[str, Any], devices: Sequence[jax.Device] | None = None
) -> Settings:
    """Settings of seed, precision and the sections train, (discriminator_)optimizer, ema and mesh.

    Args:
        devices: of the mesh; None: all there are.

    Raises:
        ValueError: names the field, its value and what would be right.
    """
    check_types("config", {"seed": config["seed"]}, Settings)
    fields = call_with(TrainFields, config["train"], "train")
    if fields.wandb and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            "config.train.wandb=True needs the package wandb: pip install 'ar_jax[wandb]', or set "
            "config.train.wandb=False"
        )
    mesh = call_with(make_mesh, config["mesh"], "mesh", devices=devices)
    check_batch(mesh, batch_size=fields.batch_size, accumulation=fields.accumulation)
    return Settings(
        train=fields,
        ema=call_with(EmaFields, config["ema"], "ema"),
        optimizer=call_with(build_optimizer, config["optimizer"], "optimizer", steps=fields.steps),
        discriminator_optimizer=_discriminator_optimizer(config, fields.steps),
        mesh=mesh,
        precision=matmul_precision(config),
        seed=config["seed"],
    )


def _discriminator_optimizer(config: Mapping[str, Any], steps: int) -> Optimizer | None:
    """Of ``config.discriminator_optimizer``, which has the fields of ``config.optimizer``."""
    name = "discriminator_optimizer"
    if name not in config:
        return None
    try:
        return call_with(build_optimizer, config[name], name, steps=steps)
    except ValueError as error:
        raise ValueError(str(error).replace("config.optimizer.", f"config.{name}.")) from error


def matmul_precision(config: Mapping[str, Any]) -> str:
    """``config.precision``: of float32 matrix products, for `jax.default_matmul_precision`."""
    precision = config["precision"]
    if precision not in ("default", "highest"):
        raise ValueError(f"config.precision={precision!r} is none of 'default', 'highest'")
    return precision
