"""xAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.backbones.noisy_decoder import rotations
from ar_jax.build import build_system
from ar_jax.convert import xar
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import nchw, norms, said
from ar_jax.convert.parity.stand_in import stand_in, stand_in_params
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.nn.flow import Flow, TimeEmbedding, time_index
from ar_jax.nn.splash import visible_rows
from ar_jax.objectives.flow_matching import FlowDraws, FlowMatching
from ar_jax.sampling.flow import FlowNoise, FlowSampler
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import to_cells

NOT_APPLICABLE: dict[str, str] = {}
ADDED = 1e-5  # to ten times what was measured: "plus 1e-5 relative"
LABEL_DROPOUT, CFG = 0.1, 1.0  # of the official code where a case says nothing


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return (
        *("latent", "labels", "train_t", "train_class_drop_uniform", "train_noise"),
        *("sample_init_noise", "sample_step_noise"),
    )


def summarised(name: str) -> str | None:
    """The velocities whose mean error the loss is."""
    return "train_velocity" if name in ("train_loss", "train_grad_total_norm") else None


def sections(case: Case) -> Iterator[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    model = functools.cache(functools.partial(load, case))
    yield Section(("cells", "uncells"), with_model(_cells, model))
    yield Section(("attn_mask_allowed", "rope_*"), with_model(_tables, model))
    yield Section(("time_index_steps*",), with_model(_time_indices, model))
    yield Section(("time_embed_of_*",), with_model(_time_embeddings, model))
    features = ("train_condition", "train_encoder_features", "train_velocity")
    yield Section(features, with_model(_features, model))
    yield Section(("train_*", "grad:*"), with_model(_training, model))
    samples = ("sample_cfg_per_cell", "sample_cell_tokens", "sample_latent")
    yield Section(samples, with_model(_samples, model))
    yield Section(("sample_*",), with_model(_calls, model))


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights, and a stand-in for an autoencoder."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    generator: Part

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

    @property
    def cond(self) -> dict[str, jax.Array]:
        """The labels."""
        return {"label": jnp.asarray(self["labels"], jnp.int32)}

    @property
    def null(self) -> dict[str, jax.Array]:
        """The null class."""
        return self.system.backbone.conditioner.null(self.cond)

    @functools.cached_property
    def codes(self) -> jax.Array:
        """The recorded latent as codes [B, L, C], as images have them."""
        latent = jnp.asarray(self["latent"].transpose(0, 2, 3, 1))
        return self.ask("tokenizer", "patchify", latent)

    @property
    def order(self) -> np.ndarray:
        """The cells of the grid as the schedule goes through them."""
        cells = self.system.schedule.cells
        return np.arange(self.system.schedule.length) if cells is None else np.asarray(cells)

    @property
    def guidance(self) -> Guidance:
        """Of the case's sampler."""
        return Guidance(scale=self.case.spec["config"].get("cfg", CFG), kind="linear")

    @functools.cached_property
    def sampler(self) -> FlowSampler:
        """Ours."""
        return FlowSampler.create(self.system, self.params)

    def by_cell(self, rows: Any) -> np.ndarray:
        """[B, L, ...] in the schedule's order as (image, cell, ...)."""
        rows = np.asarray(rows)
        return rows.reshape(len(rows), self.system.schedule.num_steps, -1, *rows.shape[2:])

    def ask(self, part: str, method: str | None, *args: Any) -> Any:
        """What a method of the tokenizer, backbone or head gives, compiled."""
        module = getattr(self.system, part)
        apply = functools.partial(module.apply, method=method)
        return jax.jit(apply)({"params": self.params[part]}, *args)


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    net = case.config("xar")
    options = said(
        net,
        width="encoder_embed_dim",
        depth="encoder_depth",
        heads="encoder_num_heads",
        decoder_depth="decoder_depth",
        decoder_heads="decoder_num_heads",
        attention_dropout="attn_dropout",
        dropout="proj_dropout",
        label_dropout="label_drop_prob",
    )
    if "mlp_ratio" in net:
        options["mlp_hidden"] = int(net["encoder_embed_dim"] * net["mlp_ratio"] * 2 / 3)
    if net.get("decoder_embed_dim", options["width"]) != options["width"]:
        raise ValueError(f"{case.name}: the two halves of xAR have one width, not two")
    options["sampling_steps"] = case.spec["config"].get("num_steps", 50)
    generator = xar.generator(case.shapes("xar"), options)
    side = generator.section["schedule"]["grid"]
    width = generator.section["backbone"]["code_width"]
    tokenizer = stand_in((side, side), name="kl", code_width=width)
    built = {"dtype": "float32", **tokenizer, **generator.section}
    params = case.params("xar", generator, empty_params(built, "generator"))
    params["tokenizer"] = stand_in_params(built)
    return Model(case, build_system(built), params, generator)


def _cells(model: Model) -> Outputs:
    ordered = model.codes[:, model.order]
    yield "cells", model.by_cell(ordered)
    places = jnp.broadcast_to(jnp.asarray(model.order), ordered.shape[:2])
    back = to_cells(ordered, places)
    yield "uncells", nchw(model.ask("tokenizer", "unpatchify", back))


def _tables(model: Model) -> Outputs:
    schedule, backbone = model.system.schedule, model.system.backbone
    cells = tuple(range(schedule.num_steps))
    yield "attn_mask_allowed", visible_rows(cells).astype(np.uint8)
    table = rotations(schedule, backbone.width // backbone.heads, backbone.rope_base)
    yield "rope_cos", np.repeat(table[..., 0], 2, axis=1)
    yield "rope_sin", np.repeat(table[..., 1], 2, axis=1)


def _time_indices(model: Model) -> Outputs:
    for name, found in model.case.names(r"time_index_steps(\d+)"):
        yield name, _indices(model.system.head.clone(sampling_steps=int(found[1])).flow)


def _indices(flow: Flow) -> np.ndarray:
    """What the network is told at each of its evaluations."""
    return np.asarray(time_index(flow.times[:-1].astype(np.float32)))


def _time_embeddings(model: Model) -> Outputs:
    backbone = model.system.backbone
    embed = TimeEmbedding(width=backbone.width, init_std=backbone.init_std, dtype=jnp.float32)
    for name, found in model.case.names(r"time_embed_of_([\d_]+)"):
        index = jnp.asarray([int(number) for number in found[1].split("_")], jnp.int32)
        yield name, jax.jit(embed.apply)({"params": model.params["backbone"]["time"]}, index)


def _drawn(model: Model) -> tuple[dict[str, jax.Array], FlowDraws]:
    """(labels of which some are dropped, draws) of the training pass."""
    config, batch = model.case.config("xar"), len(model.codes)
    dropped = model["train_class_drop_uniform"] < config.get("label_drop_prob", LABEL_DROPOUT)
    cond = model.system.backbone.conditioner.null(model.cond, jnp.asarray(dropped))
    noise = model["train_noise"].reshape(model.codes.shape)
    times = model["train_t"].reshape(-1, batch).T
    return cond, FlowDraws(times=jnp.asarray(times), noise=jnp.asarray(noise))


def _features(model: Model) -> Outputs:
    cond, draws = _drawn(model)
    schedule = model.system.schedule
    conditions = model.ask("backbone", "conditions", cond, draws.times)  # [B, S, D]
    yield "train_condition", np.concatenate(np.asarray(conditions).swapaxes(0, 1))
    codes, t = model.codes[:, model.order], draws.times[:, schedule.step_id, None]
    noisy = (1 - t) * codes + t * draws.noise
    encoded, _ = model.ask("backbone", "encode", noisy, cond, draws.times)
    yield "train_encoder_features", encoded
    velocity = jax.jit(FlowMatching(system=model.system).velocity)
    yield "train_velocity", velocity(model.params, codes, cond, draws)


def _training(model: Model) -> Outputs:
    cond, draws = _drawn(model)
    objective = FlowMatching(system=model.system)
    trained = {name: model.params[name] for name in ("backbone", "head")}

    def loss(params: Any) -> jax.Array:
        return objective.loss_of(params, model.codes, cond, draws)

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    places = model.generator.places
    yield "train_loss", value
    for name, found in model.case.names("grad:(.+)"):
        yield name, model.case.select(name, official_tensor(places, gradient, found[1]))
    yield "train_grad_total_norm", np.float32(np.linalg.norm(norms(places, gradient, [*places])))
    if "train_grad_norms" in model.case.io:
        length_of = norms(places, gradient, model.case.spec["train_grad_names"])
        yield "train_grad_norms", length_of.astype(np.float32)


def _noise(model: Model) -> FlowNoise:
    """Recorded (cell, image, ...) and (cell, step, image, ...); the last step draws none."""
    batch, length, width = model.codes.shape
    start = model["sample_init_noise"].swapaxes(0, 1).reshape(batch, length, width)
    steps = np.moveaxis(model["sample_step_noise"], 0, 2)  # [N - 1, B, cell, n, C]
    steps = steps.reshape(len(steps), batch, length, width)
    steps = np.concatenate([steps, np.zeros_like(start)[None]])
    return FlowNoise(start=jnp.asarray(start), steps=jnp.asarray(steps))


def _samples(model: Model) -> Outputs:
    schedule = model.system.schedule
    yield "sample_cfg_per_cell", model.guidance.scales(schedule.num_steps, schedule.known)
    drawn = model.sampler(model.cond, guidance=model.guidance, noise=_noise(model))
    yield "sample_cell_tokens", model.by_cell(drawn.codes[:, model.order])
    yield "sample_latent", nchw(model.ask("tokenizer", "unpatchify", drawn.codes))


def _calls(model: Model) -> Outputs:
    """The sampler's own way, call by call, with what the network is fed and gives.

    Officially the first call of a cell is fed the finished cell before it along with the noisy one;
    ours feeds it just before, in a call of its own, which here counts as a part of that one.
    """
    system, params = model.sampler.system, model.sampler.params
    schedule, backbone, head, flow = system.schedule, system.backbone, system.head, system.head.flow
    noise, batch = _noise(model), len(model.codes)
    scales = model.guidance.scales(schedule.num_steps, schedule.known)
    cond = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), model.cond, model.null)

    @functools.partial(jax.jit, static_argnames="step")
    def call(params: Any, x: jax.Array, t: jax.Array, cache: Any, step: int) -> Any:
        fed = jnp.concatenate([x, x])
        hidden, cache = backbone.apply(
            {"params": params["backbone"]}, fed, cond, t, step=step, cache=cache
        )
        return head.apply({"params": params["head"]}, hidden, fed, t), cache

    cache, before = backbone.init_cache(2 * batch), None
    indices, contexts, lengths = (
        np.zeros((schedule.num_steps, flow.steps), np.int64) for _ in "tcl"
    )
    for cell, (start, size) in enumerate(zip(schedule.starts, schedule.sizes, strict=True)):
        rows, velocities = slice(start, start + size), []
        x = noise.start[:, rows]
        for n, t in enumerate(flow.times[:-1].astype(np.float32)):
            fed = [(x, t, cell)]
            if n == 0 and before is not None:
                fed.insert(0, (before, np.float32(0), cell - 1))
            for codes, time, step in fed:
                velocity, cache = call(params, codes, jnp.reshape(time, (1, 1)), cache, step)
            indices[cell, n], contexts[cell, n] = (int(time_index(fed[i][1])) for i in (-1, 0))
            lengths[cell, n] = sum(codes.shape[1] for codes, _, _ in fed)
            velocities.append(velocity)
            guided = head.guide(velocity[:batch], velocity[batch:], scales[cell])
            x = flow.step(jnp.int32(n), x, guided, noise.steps[n, :, rows], 1.0)
        before = x
        yield f"sample_cell{cell}_velocity", np.stack(velocities)
    yield "sample_time_index", indices
    yield "sample_context_time_index", contexts
    yield "sample_query_length", lengths
