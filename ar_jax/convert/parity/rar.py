"""RAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import dataclasses
import functools
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
from ar_jax.convert.parity.readings import nchw, norms
from ar_jax.convert.parity.stepwise import stepwise_logits
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.orders import random_share
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys
from ar_jax.schedules import Schedule

INPUTS = (
    *("tok_images", "ids", "labels", "orders", "drop_u", "gen_sampled_gumbel"),
    "anneal_steps",
)
NOT_APPLICABLE: dict[str, str] = {}
LABEL_DROPOUT = 0.1  # of the recorded draws
# The releases' guidance: scale and power.
RELEASES = {"b": (16.0, 2.75), "l": (15.5, 2.5), "xl": (6.9, 1.5), "xxl": (8.0, 1.2)}
Outputs = Iterator[tuple[str, Any]]


def summarised(name: str) -> str | None:
    """The logits whose mean loss or accuracy an array is."""
    found = re.fullmatch(r"(?:loss|correct)_(random|raster).*", name)
    return found and f"logits_{found[1]}"


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    generator: Part

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

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

    @property
    def orders(self) -> jax.Array:
        """int32 [B, L]."""
        return jnp.asarray(self["orders"], jnp.int32)

    @functools.cached_property
    def loss_and_gradient(self) -> Any:
        """(cond, order) -> ((loss, metrics), gradient) of our objective; compiled once."""
        objective = Likelihood(system=self.system, label_dropout=0.0)
        trained = {name: self.params[name] for name in ("backbone", "head")}

        @jax.jit
        def run(trained: Any, cond: Cond, order: jax.Array) -> Any:
            batch = {"codes": self.codes, "order": order, **cond}

            def loss(params: Any) -> Any:
                key = jax.random.key(0)
                value, aux = objective.loss(params, {}, self.params, batch, key, False)
                return value, aux.metrics

            return jax.value_and_grad(loss, has_aux=True)(trained)

        return functools.partial(run, trained)


def outputs(case: Case) -> Outputs:
    """(name, array) of every output of the case."""
    yield from _tokenizer(case)
    model = load(case)
    yield from _schedules(model)
    yield from _conditions(model)
    yield from _orders(model)
    yield from _generated(model)


def tokenizer_part(case: Case, image_size: Any) -> Part:
    """The tokenizer's part for images of a size; raises ValueError where spec and shapes differ."""
    tok = case.spec["config"]["tokenizer"]
    return rar.tokenizer(
        case.shapes("tokenizer"),
        dict(
            image_size=image_size,
            image_channels=tok["num_channels"],
            code_width=tok["embedding_dim"],
            channels=tok["hidden_channels"],
            multipliers=tok["channel_mult"],
            blocks=tok["num_res_blocks"],
            codebook_size=tok["num_embeddings"],
        ),
    )


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where spec and shapes differ."""
    net, tok = case.spec["config"]["generator"], case.spec["config"]["tokenizer"]
    factor = 2 ** (len(tok["channel_mult"]) - 1)
    grid = tuple(side // factor for side in case["gen_pow_image"].shape[2:])
    if grid[0] * grid[1] != net["image_seq_len"]:
        raise ValueError(
            f"{case.name}: image_seq_len is {net['image_seq_len']}, but gen_pow_image "
            f"{case['gen_pow_image'].shape} decodes {grid[0]} x {grid[1]} codes"
        )
    options = dict(
        grid=grid,
        width=net["hidden_size"],
        depth=net["num_hidden_layers"],
        heads=net["num_attention_heads"],
        mlp_hidden=net["intermediate_size"],
        num_classes=net["condition_num_classes"],
        codebook_size=net["codebook_size"],
        anneal=case.spec["sampling"]["anneal"],
    )
    generator = rar.generator(case.shapes("generator"), options)
    tokenizer = tokenizer_part(case, (grid[0] * factor, grid[1] * factor))
    config = {"dtype": "float32", **tokenizer.section, **generator.section}
    params = case.params("generator", generator, empty_params(config, "generator"))
    params["tokenizer"] = case.params("tokenizer", tokenizer, empty_params(config, "tokenizer"))
    return Model(case, build_system(config), params, generator)


def _tokenizer(case: Case) -> Outputs:
    images = jnp.asarray(case["tok_images"].transpose(0, 2, 3, 1) * 2 - 1)
    part = tokenizer_part(case, tuple(images.shape[1:3]))
    config = {"dtype": "float32", **part.section}
    module = build_tokenizer(config)
    params = case.params("tokenizer", part, empty_params(config, "tokenizer"))

    def passes(module: Any, images: jax.Array) -> tuple:
        features = module.autoencoder.encode(images)
        quantized = module.quantizer.quantize(features)
        raw = module.autoencoder.decode(module.quantizer.lookup(quantized.codes))
        return features, quantized, raw, module.decode(quantized.codes)

    run = jax.jit(functools.partial(module.apply, method=passes))
    features, quantized, raw, image = run({"params": params}, images)
    yield "tok_latent", nchw(features)
    yield "tok_ids", quantized.codes
    cost = case.spec["config"]["tokenizer"]["commitment_cost"]
    yield "tok_vq_loss", (quantized.commitment_loss + cost * quantized.codebook_loss).mean()
    yield "tok_recon_raw", (nchw(raw) + 1) / 2
    yield "tok_recon", (nchw(image) + 1) / 2


def _schedules(model: Model) -> Outputs:
    settings = model.case.spec["sampling"]
    for name in model.case.io:
        if release := re.fullmatch(r"cfg_schedule_rar_(b|l|xl|xxl)_(\d+)", name):
            scale, power = RELEASES[release[1]]
            yield name, _guidance(scale, power).scales(int(release[2]))
    steps = model.system.schedule.num_steps
    yield "cfg_schedule", _guidance(settings["scale"], settings["pow"]).scales(steps)
    yield "cfg_schedule_const", _guidance(settings["scale_const"], 0.0).scales(steps)
    grid = model.system.schedule.grids[0]
    anneal = tuple(settings["anneal"])
    schedule = build_schedule({"schedule": dict(name="random", grid=grid, anneal=anneal)})
    share = jax.jit(jax.vmap(functools.partial(random_share, schedule)))
    yield "anneal_ratio", share(jnp.asarray(model["anneal_steps"], jnp.int32))


def _guidance(scale: float, power: float) -> Guidance:
    return Guidance(kind="power_cosine", scale=scale, power=power)


def _conditions(model: Model) -> Outputs:
    """Rows of the shared table."""
    first = model.system.backbone.conditioner.shared_from
    yield "condition_ids", first + model.cond["label"]
    yield "condition_ids_dropped", first + model.dropped["label"]


def _orders(model: Model) -> Outputs:
    """Teacher forcing in random and in raster order."""
    raster = jnp.broadcast_to(jnp.arange(model.codes.shape[1])[None], model.codes.shape)
    yield "logits_random", _all_logits(model, model.orders)
    yield "logits_raster", _all_logits(model, raster)
    yield "labels_random", jnp.take_along_axis(model.codes, model.orders, axis=1)
    (loss, metrics), gradient = model.loss_and_gradient(model.cond, model.orders)
    yield "loss_random", loss
    yield "correct_random", metrics["accuracy"]
    yield "loss_raster", model.loss_and_gradient(model.cond, raster)[0][0]
    yield "loss_random_dropped", model.loss_and_gradient(model.dropped, model.orders)[0][0]
    places = model.generator.places
    keys = model.case.spec["generator"]["grad_norm_keys"]
    yield "grad_norms_random", norms(places, gradient, keys)
    for name, key in (("pos_embed", "pos_embed"), ("target_pos", "target_aware_pos_embed")):
        recorded = model[f"grad_{name}_slice"].shape
        table = official_tensor(places, gradient, key)[0]
        yield f"grad_{name}_slice", table[: recorded[0], : recorded[1]]


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


def _generated(model: Model) -> Outputs:
    settings, steps = model.case.spec["sampling"], model.system.schedule.num_steps
    sampler = CachedSampler.create(model.system, model.params)
    keys = image_keys(0, 0, len(model.codes))
    noise = jnp.asarray(model["gen_sampled_gumbel"].transpose(1, 0, 2))
    rising = _guidance(settings["scale"], settings["pow"])

    def draw(temperature: float, guidance: Guidance) -> Any:
        knobs = Knobs(temperature=temperature)
        return sampler(model.cond, keys, knobs=knobs, guidance=guidance, noise=noise)

    samples = draw(0.0, rising)
    yield "gen_pow_ids", samples.codes
    yield "gen_pow_image", (nchw(samples.images) + 1) / 2
    yield "gen_const_ids", draw(0.0, _guidance(settings["scale_const"], 0.0)).codes
    yield "gen_nocfg_ids", draw(0.0, Guidance()).codes
    yield "gen_sampled_ids", draw(settings["temp"], rising).codes
    scales = rising.scales(steps)
    logits, _ = stepwise_logits(model.system, model.params, model.cond, samples.codes, scales)
    stride = max(1, steps // 8)
    yield "gen_pow_step_logits", logits[:, ::stride] / settings["temp"]
