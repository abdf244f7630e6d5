"""What MAR's and EAR's golden cases share: masks, training with recorded draws, whole samplings."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs
from ar_jax.convert.parity.readings import nchw, norms
from ar_jax.convert.parity.stand_in import stand_in, stand_in_params
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.objectives.masked import Masked, MaskedDraws, hide
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import image_keys
from ar_jax.sampling.refine import RefineNoise, RefineSampler

# Of the official code.
LABEL_DROPOUT, RATE_MIN = 0.1, 0.7
ITERATIONS = 64
# Official names of the schedules of guidance over the iterations -> ours.
GUIDANCE = {"linear": "linear_known", "constant": "constant"}


def channels_last(array: Any) -> jax.Array:
    """NCHW -> NHWC."""
    return jnp.asarray(np.asarray(array).transpose(0, 2, 3, 1))


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights, and a stand-in for an autoencoder."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    generator: Part

    @classmethod
    def load(cls, case: Case, part: str, generator: Part, patch: int) -> Model:
        """Of the case's weights ``part``, which are ``generator``, on latents of this patch."""
        side = generator.section["schedule"]["grid"] * patch
        width = generator.section["head"]["code_width"] // patch**2
        tokenizer = stand_in((side, side), name="kl", patch=patch, code_width=width)
        built = {"dtype": "float32", **tokenizer, **generator.section}
        params = case.params(part, generator, empty_params(built, "generator"))
        params["tokenizer"] = stand_in_params(built)
        return cls(case, build_system(built), params, generator)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

    @property
    def cond(self) -> dict[str, jax.Array]:
        """The labels."""
        return {"label": jnp.asarray(self["labels"], jnp.int32)}

    @property
    def rate(self) -> float:
        """The share of hidden codes; what was recorded in float32 was no other number before."""
        said = self.case.spec["config"].get("mask_rate")
        return float(str(self["mask_rate"])) if said is None else float(said)

    @functools.cached_property
    def codes(self) -> jax.Array:
        """The recorded latent as codes [B, L, C]."""
        return self.ask("tokenizer", "patchify", channels_last(self["latent"]))

    @property
    def hidden(self) -> jax.Array:
        """Which codes of the features are hidden, bool [B, L]."""
        return hide(jnp.asarray(self["orders"], jnp.int32), self.rate)

    def ask(self, part: str, method: str | None, *args: Any) -> Any:
        """What a method of the tokenizer, backbone or head gives, compiled."""
        module = getattr(self.system, part)
        apply = functools.partial(module.apply, method=method)
        return jax.jit(apply)({"params": self.params[part]}, *args)

    def rows(self, name: str, *last: int) -> jax.Array:
        """Recorded rows (repeat, image, position) as [B, R, L, ...]."""
        batch, length, _ = self.codes.shape
        recorded = self[name].reshape(-1, batch, length, *last)
        return jnp.asarray(recorded.swapaxes(0, 1))


def samplers(case: Case) -> list[dict[str, Any]]:
    """The case's runs of the sampler."""
    return case.spec.get("config", {}).get("samplers", [])


def mask(model: Model) -> Outputs:
    """The hidden codes."""
    yield "mask", model.hidden.astype(jnp.float32)


def training(model: Model, config: Mapping[str, Any], draws: Any) -> Outputs:
    """Loss and gradient; ``draws`` are those of the head's loss, leaves [B, R, L, ...]."""
    system = model.system
    drawn = MaskedDraws(
        order=jnp.asarray(model["train_orders"], jnp.int32),
        rate=model.rate,  # no array: of a number the hidden codes are counted as officially
        head=draws,
    )
    probability = config.get("label_drop_prob", LABEL_DROPOUT)
    dropped = jnp.asarray(model["train_class_drop_uniform"] < probability)
    cond = system.backbone.conditioner.null(model.cond, dropped)
    least = min(config.get("mask_ratio_min", RATE_MIN), model.rate)
    repeats = jax.tree.leaves(draws)[0].shape[1]
    objective = Masked(system=system, rate_min=least, repeats=repeats)
    trained = {name: model.params[name] for name in ("backbone", "head")}

    def loss(params: Any) -> jax.Array:
        return objective.loss_of(params, model.codes, cond, drawn)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    places = model.generator.places
    yield "train_loss", value
    for name, found in model.case.names("grad:(.+)"):
        yield name, official_tensor(places, gradient, found[1])
    yield "train_grad_total_norm", np.float32(np.linalg.norm(norms(places, gradient, [*places])))
    if "train_grad_norms" in model.case.io:
        length_of = norms(places, gradient, model.case.spec["train_grad_names"])
        yield "train_grad_norms", length_of.astype(np.float32)


def sampling(
    model: Model, sampler: dict[str, Any], head: Any, read: Callable[[str, int], Any]
) -> Outputs:
    """A guided or plain run of all iterations, fed the recorded orders and noise.

    Args:
        sampler: the run's entry in spec.json.
        head: of the run.
        read: (start of names, n) -> the first n recorded rows of the head's noise, leaves [n, ...].

    Raises:
        ValueError: the official code has no such schedule of guidance, or an array is missing.
    """
    tag, system = sampler["tag"], model.system
    iterations = sampler.get("num_iter", ITERATIONS)
    schedule = schedules.masked(grid=system.schedule.grids[0], iterations=iterations)
    backbone = system.backbone.clone(schedule=schedule)
    system = dataclasses.replace(system, schedule=schedule, backbone=backbone, head=head)
    guidance = guidance_of(model.case.name, sampler)
    yield f"{tag}_tokens_per_iter", np.asarray(schedule.sizes)
    yield f"{tag}_cfg_per_iter", guidance.scales(schedule.num_steps, schedule.known)
    noise, parts = _recorded_noise(model, tag, schedule, read)
    null = backbone.conditioner.null(model.cond)
    cond = null if sampler.get("labels", True) is None else model.cond
    keys = image_keys(0, 0, len(noise.order))  # not used: the noise is given
    knobs = Knobs(temperature=sampler.get("temperature", 1.0))
    sample = RefineSampler.create(system, model.params)
    drawn = sample(cond, keys, knobs=knobs, guidance=guidance, noise=noise)
    codes = np.asarray(drawn.codes)

    @jax.jit
    def hidden(params: Any, known: jax.Array, cond: Any) -> jax.Array:
        return backbone.apply({"params": params}, jnp.asarray(codes), cond, known)

    known = np.zeros(codes.shape[:2], bool)
    images = np.arange(len(codes))[:, None]
    passes = (cond, null) if guidance.scale != 1.0 else (cond,)
    for i, part in enumerate(parts):
        if f"{tag}_iter{i}_z" in model.case.io:
            states = [hidden(model.params["backbone"], known, labels) for labels in passes]
            picked = [
                np.asarray(state)[images, part].reshape(-1, state.shape[-1]) for state in states
            ]
            yield f"{tag}_iter{i}_z", np.concatenate(picked)
        yield f"{tag}_iter{i}_tokens", codes[images, part].reshape(-1, codes.shape[-1])
        known[images, part] = True
    yield f"{tag}_latent", nchw(model.ask("tokenizer", "unpatchify", drawn.codes))


def guidance_of(case: str, sampler: dict[str, Any]) -> Guidance:
    """Of a run; raises ValueError, which names the case, for a schedule of no official name."""
    kind = sampler.get("cfg_schedule", "linear")
    if kind not in GUIDANCE:
        raise ValueError(
            f"{case}: cfg_schedule of the sampler {sampler['tag']!r} is {kind!r}; the official "
            f"code has {' and '.join(GUIDANCE)}"
        )
    return Guidance(scale=sampler.get("cfg", 1.0), kind=GUIDANCE[kind])


def _recorded_noise(
    model: Model, tag: str, schedule: schedules.Schedule, read: Callable[[str, int], Any]
) -> tuple[RefineNoise, list[np.ndarray]]:
    """Ours from the recorded draws, and the positions [B, n] that every iteration predicts.

    Official orders are revealed from their ends; the rows of an iteration are in (image, position)
    order, and guided ones may be followed by as many that nothing uses.
    """
    orders = model[f"{tag}_orders"]
    batch, length = orders.shape
    parts, drawn, end = [], [], length
    for i, size in enumerate(schedule.sizes):
        parts.append(np.sort(orders[:, end - size : end], axis=1))
        end -= size
        rows = read(f"{tag}_iter{i}", batch * size)
        drawn.append(jax.tree.map(lambda x, n=size: x.reshape(batch, n, *x.shape[1:]), rows))
    order = jnp.asarray(np.concatenate(parts, axis=1), jnp.int32)
    head = jax.tree.map(lambda *leaves: jnp.asarray(np.concatenate(leaves, axis=1)), *drawn)
    return RefineNoise(order=order, head=head), parts
