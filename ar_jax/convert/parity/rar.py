"""RAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Cond, System
from ar_jax.build import build_schedule, build_system, build_tokenizer
from ar_jax.convert import rar
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import (
    corner,
    find_key,
    loss_and_gradient,
    nchw,
    norms,
    said,
)
from ar_jax.convert.parity.stand_in import stand_in, stand_in_params
from ar_jax.convert.parity.stepwise import stepwise_logits
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.objectives.orders import random_share
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.schedules import Grid, Schedule

NOT_APPLICABLE: dict[str, str] = {}
LABEL_DROPOUT = 0.1  # of the recorded draws
COMMITMENT = 0.25  # official default
# The releases' guidance: scale and power.
RELEASES = {"b": (16.0, 2.75), "l": (15.5, 2.5), "xl": (6.9, 1.5), "xxl": (8.0, 1.2)}
GRADIENTS = {"target_pos": "target_aware_pos_embed"}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return (
        *("tok_images", "ids", "labels", "orders", "drop_u", "gen_sampled_gumbel"),
        "anneal_steps",
    )


def summarised(name: str) -> str | None:
    """The logits whose mean loss or accuracy an array is, or the features."""
    found = re.fullmatch("(?:loss|correct)_(random|raster).*", name)
    return f"logits_{found[1]}" if found else {"tok_vq_loss": "tok_latent"}.get(name)


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    model = functools.cache(functools.partial(load, case))
    yield Section(("tok_*",), functools.partial(_tokenizer, case))
    yield Section(("cfg_schedule*",), functools.partial(_guidance_schedules, case))
    yield Section(("anneal_ratio",), functools.partial(_annealing, case))
    yield Section(("condition_ids*",), with_model(_conditions, model))
    for order in ("random", "raster"):
        outputs = f"logits_{order}", f"labels_{order}"
        yield Section(outputs, with_model(_logits, model, order))
    losses = ("loss_random", "loss_raster", "correct_*", "loss_*_dropped", "grad_*")
    yield Section(losses, with_model(_losses, model))
    runs = case.names(r"gen_(\w+?)_(?:ids|step_logits|image)")
    for run in dict.fromkeys(found[1] for _, found in runs):
        drawn = tuple(f"gen_{run}_{what}" for what in ("ids", "step_logits", "image"))
        yield Section(drawn, with_model(_drawn, model, run))


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights, and a stand-in for a tokenizer."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    generator: Part

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

    @property
    def settings(self) -> dict[str, Any]:
        """Of sampling."""
        return self.case.spec.get("sampling", {})

    @property
    def codes(self) -> jax.Array:
        """int32 [B, L] in raster order."""
        return jnp.asarray(self["ids"], jnp.int32)

    @property
    def cond(self) -> Cond:
        """The labels."""
        return {"label": jnp.asarray(self["labels"], jnp.int32)}

    @property
    def dropped(self) -> Cond:
        """The labels, some of them null."""
        drop = jnp.asarray(self["drop_u"] < LABEL_DROPOUT)
        return self.system.backbone.conditioner.null(self.cond, drop)

    def order(self, name: str) -> jax.Array:
        """int32 [B, L]: the recorded 'random' orders, or 'raster'."""
        if name == "random":
            return jnp.asarray(self["orders"], jnp.int32)
        return jnp.broadcast_to(jnp.arange(self.codes.shape[1])[None], self.codes.shape)

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        """Compiled once for all that differs in traced settings."""
        return CachedSampler.create(self.system, self.params)

    @functools.cached_property
    def loss_and_gradient(self) -> Any:
        """(cond, order) -> ((loss, metrics), gradient) of our objective; compiled once."""
        return loss_and_gradient(self.system, self.params, self.codes)


def tokenizer_part(case: Case, image_size: Any) -> Part:
    """The tokenizer's part for images of a size; raises ValueError where spec and shapes differ."""
    options = said(
        case.config("tokenizer"),
        image_channels="num_channels",
        code_width="embedding_dim",
        channels="hidden_channels",
        multipliers="channel_mult",
        blocks="num_res_blocks",
        codebook_size="num_embeddings",
    )
    return rar.tokenizer(case.shapes("tokenizer"), options | {"image_size": image_size})


def load_tokenizer(case: Case, image_size: Any) -> tuple[Any, Any]:
    """(our module, its parameters) for images of a size."""
    part = tokenizer_part(case, image_size)
    config = {"dtype": "float32", **part.section}
    return build_tokenizer(config), case.params(
        "tokenizer", part, empty_params(config, "tokenizer")
    )


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    options = said(
        case.config("generator"),
        width="hidden_size",
        depth="num_hidden_layers",
        heads="num_attention_heads",
        mlp_hidden="intermediate_size",
        num_classes="condition_num_classes",
        codebook_size="codebook_size",
    )
    grid = _grid(case)
    options |= {"grid": grid} | said(case.spec.get("sampling", {}), anneal="anneal")
    generator = rar.generator(case.shapes("generator"), options)
    size = generator.section["head"]["vocab_size"]
    tokenizer = stand_in(grid, name="vq", codebook_size=size)
    config = {"dtype": "float32", **tokenizer, **generator.section}
    params = case.params("generator", generator, empty_params(config, "generator"))
    params["tokenizer"] = stand_in_params(config)
    return Model(case, build_system(config), params, generator)


def _grid(case: Case) -> Grid:
    """(rows, columns) of codes: those of a recorded image, else a square."""
    length = case.config("generator")["image_seq_len"]
    image = next((case[name] for name, _ in case.names(r"gen_\w+_image")), None)
    if image is None or "tokenizer" not in case.spec["config"]:
        rows = columns = math.isqrt(length)
    else:
        factor = _downsampling(case)
        rows, columns = (side // factor for side in image.shape[2:])
    if rows * columns != length:
        raise ValueError(
            f"{case.name}: image_seq_len is {length}, which is no {rows} x {columns} codes"
        )
    return rows, columns


def _downsampling(case: Case) -> int:
    autoencoder = tokenizer_part(case, 1).section["tokenizer"]["autoencoder"]
    return 2 ** (len(autoencoder["multipliers"]) - 1)


def _tokenizer(case: Case) -> Outputs:
    images = jnp.asarray(case["tok_images"].transpose(0, 2, 3, 1) * 2 - 1)
    module, params = load_tokenizer(case, tuple(images.shape[1:3]))

    def passes(module: Any, images: jax.Array) -> tuple:
        features = module.autoencoder.encode(images)
        quantized = module.quantizer.quantize(features)
        raw = module.autoencoder.decode(module.quantizer.lookup(quantized.codes))
        return features, quantized, raw, module.decode(quantized.codes)

    run = jax.jit(functools.partial(module.apply, method=passes))
    features, quantized, raw, image = run({"params": params}, images)
    yield "tok_latent", nchw(features)
    yield "tok_ids", quantized.codes
    cost = case.config("tokenizer").get("commitment_cost", COMMITMENT)
    yield "tok_vq_loss", (quantized.commitment_loss + cost * quantized.codebook_loss).mean()
    yield "tok_recon_raw", (nchw(raw) + 1) / 2
    yield "tok_recon", (nchw(image) + 1) / 2


def _guidance_schedules(case: Case) -> Outputs:
    settings = case.spec.get("sampling", {})
    for name, found in case.names(r"cfg_schedule_rar_(b|l|xl|xxl)_(\d+)"):
        yield name, _guidance(*RELEASES[found[1]]).scales(int(found[2]))
    for name, scale, power in (
        ("cfg_schedule", "scale", settings.get("pow", 0.0)),
        ("cfg_schedule_const", "scale_const", 0.0),
    ):
        if name in case.io:
            steps = case.config("generator")["image_seq_len"]
            yield name, _guidance(settings[scale], power).scales(steps)


def _guidance(scale: float, power: float) -> Guidance:
    return Guidance(kind="power_cosine", scale=scale, power=power)


def _annealing(case: Case) -> Outputs:
    """The share of permuted samples at the recorded training steps."""
    anneal = tuple(case.spec["sampling"]["anneal"])
    schedule = build_schedule({"schedule": dict(name="random", grid=1, anneal=anneal)})
    share = jax.jit(jax.vmap(functools.partial(random_share, schedule)))
    yield "anneal_ratio", share(jnp.asarray(case["anneal_steps"], jnp.int32))


def _conditions(model: Model) -> Outputs:
    """Rows of the shared table."""
    first = model.system.backbone.conditioner.shared_from
    yield "condition_ids", first + model.cond["label"]
    if "condition_ids_dropped" in model.case.io:
        yield "condition_ids_dropped", first + model.dropped["label"]


def _logits(model: Model, name: str) -> Outputs:
    """Teacher forcing in an order."""
    order = model.order(name)
    yield f"labels_{name}", jnp.take_along_axis(model.codes, order, axis=1)
    yield f"logits_{name}", _all_logits(model, order)


def _losses(model: Model) -> Outputs:
    """Losses and gradients of teacher forcing; single gradients are of the random orders."""
    case, places = model.case, model.generator.places
    gradients = {}
    for name in ("random", "raster"):
        if not any(re.fullmatch(rf"(loss|correct|grad_norms)_{name}", a) for a in case.io):
            continue
        (loss, metrics), gradients[name] = model.loss_and_gradient(model.cond, model.order(name))
        yield f"loss_{name}", loss
        yield f"correct_{name}", metrics["accuracy"]
    for name, found in case.names("loss_(random|raster)_dropped"):
        yield name, model.loss_and_gradient(model.dropped, model.order(found[1]))[0][0]
    for name, found in case.names("grad_norms_(random|raster)"):
        keys = case.spec["generator"]["grad_norm_keys"]
        yield name, norms(places, gradients[found[1]], keys)
    parts = case.names("grad_(?!norms_)(.+)")
    if parts and "random" not in gradients:
        _, gradients["random"] = model.loss_and_gradient(model.cond, model.order("random"))
    for name, found in parts:
        key = find_key(places, found[1], GRADIENTS)
        yield name, corner(official_tensor(places, gradients["random"], key), case[name])


def _all_logits(model: Model, order: jax.Array) -> Any:
    """[B, L + 1, V]: those of the recording's last row too, which is fed the last code.

    Ours has no such row. It is the last one of a decoder for one code more, whose cell, the first
    spare row of the tables, is predicted with a zero target embedding.
    """
    length = model.codes.shape[1]
    longer = Schedule(name="raster", grids=((1, length + 1),), sizes=(1,) * (length + 1))
    backbone = model.system.backbone
    backbone = backbone.clone(
        schedule=longer,
        spare_positions=backbone.spare_positions - 1,
        spare_steps=backbone.spare_steps - 1,
    )
    params = dict(model.params["backbone"])
    tables = dict(params["cell_positions"])
    tables["predicted"] = tables["predicted"].at[backbone.prefix_rows + length].set(0.0)
    params["cell_positions"] = tables
    codes = jnp.take_along_axis(model.codes, order, axis=1)
    order = jnp.concatenate([order, jnp.full_like(order[:, :1], length)], axis=1)

    @jax.jit
    def run(params: Any, head: Any) -> Any:
        hidden, _ = backbone.apply({"params": params}, codes, model.cond, order=order)
        return model.system.head.apply({"params": head}, hidden)

    return run(params, model.params["head"])


def _how(model: Model, run: str) -> tuple[float, Guidance]:
    """(temperature of the draws, guidance) of a run, by its name."""
    settings = model.settings
    if run == "nocfg":
        return 0.0, Guidance()
    if run not in ("pow", "const", "sampled"):
        raise ValueError(
            f"the run {run!r} is none of pow, const, nocfg and sampled: spec.json does not say how "
            "it was drawn"
        )
    scale, power = ("scale_const", 0.0) if run == "const" else ("scale", settings["pow"])
    # A scale of 0 is the official way of saying that there is no guidance.
    guidance = _guidance(settings[scale], power) if settings[scale] else Guidance()
    return settings.get("temp", 1.0) if run == "sampled" else 0.0, guidance


def _drawn(model: Model, run: str) -> Outputs:
    """The codes of a run, the logits that they were drawn from, and their images."""
    case, (temperature, guidance) = model.case, _how(model, run)
    # Of no effect on a greedy run, which then is the same program.
    noise = case.io.get("gen_sampled_gumbel")
    if noise is None and temperature > 0:
        raise ValueError(f"{case.name}: io.npz has no 'gen_sampled_gumbel', the run's noise")
    gumbel = None if noise is None else jnp.asarray(noise.transpose(1, 0, 2))
    keys, knobs = image_keys(0, 0, len(model["labels"])), Knobs(temperature=temperature)
    codes = model.sampler(model.cond, keys, knobs=knobs, guidance=guidance, noise=gumbel).codes
    yield f"gen_{run}_ids", codes
    if f"gen_{run}_image" in case.io:
        factor = _downsampling(case)
        rows, columns = model.system.schedule.grids[0]
        module, params = load_tokenizer(case, (rows * factor, columns * factor))
        image = jax.jit(functools.partial(module.apply, method="decode"))({"params": params}, codes)
        yield f"gen_{run}_image", (nchw(image) + 1) / 2
    if f"gen_{run}_step_logits" in case.io:
        steps = model.system.schedule.num_steps
        scales = guidance.scales(steps)
        guided = jnp.asarray(scales) if (scales != 1).any() else None
        logits, _ = stepwise_logits(model.system, model.params, model.cond, codes, guided)
        yield (
            f"gen_{run}_step_logits",
            logits[:, :: max(1, steps // 8)] / model.settings.get("temp", 1.0),
        )
