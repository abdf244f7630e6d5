"""FractalGen's golden cases: every recorded output as our code computes it.

The official code draws for the patches that are hidden alone, ours for all: recorded draws are put
in the places of theirs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.convert import fractal
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import norms, said
from ar_jax.convert.part import Part, empty_params
from ar_jax.nn.patches import patchify
from ar_jax.objectives.nested import NestedDraws, NestedLikelihood
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.nested import NestedNoise, NestedSampler

NOT_APPLICABLE: dict[str, str] = {}
GUIDANCE = {"linear": ("linear_known", "linear_after"), "constant": ("constant", "constant")}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return (
        *("pixels", "image", "labels", "pixel_head_cond", "pixel_head_rgb"),
        *("*_draw[0-9]*_*",),
    )


def summarised(name: str) -> str | None:
    """The total norm is one of these norms' own; a mean loss stands for itself."""
    return "train_grad_norms" if name == "train_grad_total_norm" else None


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""

    @functools.cache
    def model() -> Model:
        return load(case)

    yield Section(("pixel_head_*",), with_model(_pixels, model))
    yield Section(("eval_level0_conditions",), with_model(_conditions, model))
    yield Section(("eval_*",), with_model(_evaluated, model))
    yield Section(("train_*",), with_model(_trained, model))
    for settings in case.spec["config"].get("samplers", ()):
        tag = settings["tag"]
        names = tuple(f"{tag}_{what}" for what in ("image", "pixels", "cfg_per_step"))
        yield Section(names, with_model(_sampled, model, settings))


@dataclasses.dataclass(frozen=True)
class Model:
    """A case's generator as ours, with its weights."""

    case: Case
    part: Part
    config: dict[str, Any]
    params: dict[str, Any]

    @functools.cached_property
    def objective(self) -> NestedLikelihood:
        """That trains it."""
        fields = {name: x for name, x in self.config["objective"].items() if name != "name"}
        return NestedLikelihood(system=build_system(self.config), **fields)

    @property
    def system(self) -> System:
        """The generator."""
        return self.objective.system

    @property
    def codes(self) -> jax.Array:
        """int32 [B, L, 3] of the recorded images."""
        pixels = np.moveaxis(self.case["pixels"], 1, -1)
        return jnp.asarray(pixels.reshape(len(pixels), -1, pixels.shape[-1]), jnp.int32)

    @property
    def null(self) -> dict[str, jax.Array]:
        """The condition of the unconditional model."""
        classes = self.system.backbone.num_classes
        return {"label": jnp.full(len(self.codes), classes, jnp.int32)}


def load(case: Case) -> Model:
    """Ours with the case's weights; raises ValueError where its config and shapes differ."""
    settings = case.config("fractal")
    options = said(
        settings,
        num_classes="class_num",
        conditions="num_conds",
        attention_dropout="attn_dropout",
        dropout="proj_dropout",
        label_dropout="label_drop_prob",
    )
    *heads, pixels = settings["num_heads_list"]
    options |= {"heads": heads, "head.heads": pixels, "image_size": settings["img_size_list"][0]}
    if "r_weight" in settings:
        options["channel_weights"] = (float(settings["r_weight"]), 1.0, 1.0)
    part = fractal.generator(case.shapes("fractal"), options)
    tokenizer = fractal.tokenizer({}, options)
    config = {"dtype": "float32", **tokenizer.section, **part.section}
    params = case.params("fractal", part, empty_params(config, "generator"))
    return Model(case, part, config, {"tokenizer": {}, **params})


def _pixels(model: Model) -> Outputs:
    cond, rgb = (jnp.asarray(model.case[f"pixel_head_{name}"]) for name in ("cond", "rgb"))
    head, backbone = model.system.head, model.system.backbone
    yield "pixel_head_logits", head.apply({"params": model.params["head"]}, cond, rgb)
    again = backbone.round_colour(backbone.normalise_pixels(rgb), jnp.zeros(rgb.shape))
    yield "pixel_head_ids_check", (again == rgb).astype(jnp.int32)


def _conditions(model: Model) -> Outputs:
    """What the first level gives, unconditionally, for the recorded mask."""
    backbone = model.system.backbone
    share = _draws(model, "eval").shares[0]
    size = backbone.schedule.grids[0][0]

    def first(module: Any, codes: jax.Array) -> jax.Array:
        images = codes.swapaxes(1, 2).reshape(len(codes), -1, size, size)
        patches = module.normalise(patchify(images, size // module.sides[0]))
        fed, conditions = patches.reshape(*patches.shape[:2], -1), module.begin(model.null)
        if share is None:
            return module.levels[0](fed, conditions)
        return module.levels[0](fed, conditions, share > 0, None)

    found = backbone.apply({"params": model.params["backbone"]}, model.codes, method=first)
    yield "eval_level0_conditions", found


def _evaluated(model: Model) -> Outputs:
    draws = _draws(model, "eval")
    loss, aux = jax.jit(model.objective.loss_of)(model.params, model.codes, model.null, draws)
    yield "eval_loss_nats", loss
    yield "eval_bits_per_dim", aux.metrics["bits_per_dim"]


def _trained(model: Model) -> Outputs:
    objective, case = model.objective, model.case
    drawn = [case[name] for name in _recorded(case, "train") if name.endswith("_uniform")]
    cond = {"label": jnp.asarray(case["labels"], jnp.int32)}
    if drawn:
        dropped = jnp.asarray(drawn[0] < objective.label_dropout)
        cond = objective.system.backbone.conditioner.null(cond, dropped)
    draws = _draws(model, "train")
    trained = {name: model.params[name] for name in ("backbone", "head")}

    @jax.jit
    def run(params: Any) -> Any:
        return jax.value_and_grad(
            lambda p: objective.loss_of(p, model.codes, cond, draws, train=True)[0]
        )(params)

    loss, gradient = run(trained)
    yield "train_loss", loss
    found = norms(model.part.places, gradient, case.spec["train_grad_names"])
    yield "train_grad_norms", found
    yield "train_grad_total_norm", np.linalg.norm(found)


def _recorded(case: Case, run: str) -> list[str]:
    """Names of the draws of a run, in the order in which they were consumed."""
    names = case.spec.get(f"{run}_draws_in_order")
    if names is None:
        raise ValueError(f"{case.name}: spec.json has no {run}_draws_in_order")
    return names


def _draws(model: Model, run: str) -> NestedDraws:
    """The recorded masks and noise of 'eval' or 'train', each level's in turn."""
    case, backbone = model.case, model.system.backbone
    names = iter(name for name in _recorded(case, run) if not name.endswith("_uniform"))
    count = len(case["labels"])
    rows = np.arange(count)  # of all patches of the levels above, those that are hidden
    shares: list[Any] = []
    noise: list[Any] = []
    for index, level in enumerate(backbone.schedule.levels):
        hidden = np.ones((len(rows), level.length), bool)
        if not backbone.causal(index):
            order, amount = case[next(names)].astype(np.int64), case[next(names)]
            if run == "train":
                order = np.argsort(order, axis=1)
                counts = np.ceil(level.length * amount)
            else:
                counts = np.broadcast_to(amount + 1, len(rows))
            ranks = np.argsort(order, axis=1)
            hidden = ranks < counts[:, None]
            share = np.zeros((count, level.length), np.float32)
            share[rows] = hidden
            shares.append(jnp.asarray(share))
        else:
            shares.append(None)
        if backbone.has_colour(index):
            drawn = np.zeros((count, backbone.channels), np.float32)
            drawn[rows] = case[next(names)]
            noise.append(jnp.asarray(drawn))
        else:
            noise.append(None)
        rows = (rows[:, None] * level.length + np.arange(level.length))[hidden]
        count *= level.length
    return NestedDraws(shares=tuple(shares), noise=tuple(noise))


def _sampled(model: Model, settings: dict[str, Any]) -> Outputs:
    tag, case = settings["tag"], model.case
    levels = model.system.schedule.levels
    iterations = tuple(
        min(n, level.length) if level.mask else 0
        for n, level in zip(settings["num_iter_list"], levels, strict=True)
    )
    config = dict(model.config)
    config["schedule"] = config["schedule"] | {"iterations": iterations}
    config["head"] = config["head"] | {
        "filter_threshold": settings.get("filter_threshold", fractal.FILTER_THRESHOLD)
    }
    system = build_system(config)
    first = system.schedule.levels[0]
    kind = GUIDANCE[settings.get("cfg_schedule", "linear")][system.backbone.causal(0)]
    guidance = Guidance(scale=settings["cfg"], kind=kind)
    yield f"{tag}_cfg_per_step", guidance.scales(first.num_steps, first.known)
    # Without noise the largest logit is drawn; the temperature counts, as guidance filters by it.
    knobs = Knobs(temperature=1.0 / settings.get("temperature", 1.0))
    noise = NestedNoise(orders=_orders(case, tag, system), gumbel=_silence(case, system))
    cond = {"label": jnp.asarray(case["labels"], jnp.int32)}
    sampler = NestedSampler.create(system, model.params)
    codes = sampler(cond, knobs=knobs, guidance=guidance, noise=noise).codes
    size = system.schedule.grids[0][0]
    pixels = codes.swapaxes(1, 2).reshape(len(codes), -1, size, size)
    yield f"{tag}_pixels", pixels
    yield f"{tag}_image", system.backbone.normalise(pixels)


def _above(case: Case, system: System) -> list[tuple[int, ...]]:
    """(B, L_0, ...) of the images of every level, and last of the pixels."""
    shape = len(case["labels"]), *(level.length for level in system.schedule.levels)
    return [shape[: count + 1] for count in range(len(shape))]


def _silence(case: Case, system: System) -> tuple[jax.Array | None, ...]:
    """No Gumbel noise at all."""
    backbone, shape = system.backbone, (system.backbone.channels, system.backbone.values)
    *images, pixels = _above(case, system)
    colours = [
        jnp.zeros((*above, *shape)) if backbone.has_colour(index) else None
        for index, above in enumerate(images)
    ]
    return (*colours, jnp.zeros((*pixels, *shape)))


def _orders(case: Case, tag: str, system: System) -> tuple[jax.Array | None, ...]:
    """The recorded orders of masked levels, by the places of the patches that they are of.

    An official order ends with the patches that are drawn first.
    """
    backbone = system.backbone
    names = iter(_recorded(case, tag))
    levels = system.schedule.levels
    found = [
        np.zeros((*above, level.length), np.int32)
        for above, level in zip(_above(case, system), levels, strict=False)
    ]

    def visit(index: int, images: list[tuple[int, ...]]) -> None:
        """The images (image, place, place, ...) of a level, drawn together."""
        if index == len(levels):
            return
        level = levels[index]
        orders = np.broadcast_to(np.arange(level.length), (len(images), level.length))
        if not backbone.causal(index):
            orders = case[next(names)][:, ::-1].astype(np.int32)
            for image, order in zip(images, orders, strict=True):
                found[index][image] = order
        for start, size in zip(level.starts, level.sizes, strict=True):
            chosen = np.sort(orders[:, start : start + size], axis=1)
            below = [
                (*image, int(place))
                for image, places in zip(images, chosen, strict=True)
                for place in places
            ]
            visit(index + 1, below)

    visit(0, [(image,) for image in range(len(case["labels"]))])
    return tuple(
        None if backbone.causal(index) else jnp.asarray(orders)
        for index, orders in enumerate(found)
    )
