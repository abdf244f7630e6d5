"""Infinity's golden cases: what the transformer computes of recorded text, inputs and draws."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Cond, Params, System
from ar_jax.build import build_system
from ar_jax.convert import infinity
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import norms, said
from ar_jax.convert.part import Part, empty_params
from ar_jax.heads.bitwise import BitwiseHead
from ar_jax.objectives.likelihood import scale_weights
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.loop import decode_features, draw_steps

TEACHER = "bsc_main"  # whose inputs and bits the teacher-forced arrays are of


def sections(case: Case, tokens: Any) -> list[Section]:
    """See `ar_jax.convert.parity.compare.Family`; ``tokens`` makes `infinity.Tokens`."""
    model = functools.cache(lambda: load(case, tokens()))
    forward = ("text_*", "block0_*", "logits", "bit_loss_per_token")
    return [
        Section(("rope_cos_sin",), with_model(_rotations, model)),
        Section(forward, with_model(_forward, model)),
        Section(("train_*",), with_model(_gradients, model)),
        *(
            Section((f"{run['tag']}_*",), with_model(_sampled, model, run))
            for run in case.spec.get("config", {}).get("samplers", ())
        ),
    ]


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    part: Part

    @functools.cached_property
    def cond(self) -> Cond:
        """The recorded text, a caption a sample."""
        lengths = self.case["text_lengths"]
        packed = np.split(self.case["text_features"], np.cumsum(lengths)[:-1])
        caption = np.zeros((len(lengths), lengths.max(), packed[0].shape[-1]), np.float32)
        for row, rows in zip(caption, packed, strict=True):
            row[: len(rows)] = rows
        return {
            "caption": jnp.asarray(caption),
            "caption_mask": jnp.arange(lengths.max())[None] < jnp.asarray(lengths)[:, None],
            "dropped": jnp.zeros(len(lengths), bool),
        }

    @property
    def dropped(self) -> Cond:
        """The text, that of some samples dropped by the recorded draws."""
        rate = self.case.config("transformer")["cond_drop_rate"]
        drop = jnp.asarray(self.case["cond_drop_uniform"] < rate)
        return self.system.backbone.conditioner.null(self.cond, drop)

    @property
    def unrolled(self) -> tuple[System, Params]:
        """As samplers run it."""
        backbone, unstacked = self.system.backbone.for_sampling(self.params["backbone"])
        unrolled = dataclasses.replace(self.system, backbone=backbone)
        return unrolled, self.params | {"backbone": unstacked}

    @property
    def bits(self) -> jax.Array:
        """int8 [B, L, bits], what the teacher wants."""
        return jnp.asarray(self.case[f"{TEACHER}_target_bits"], jnp.int8)


def load(case: Case, tokens: Any) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    net = case.config("transformer")
    grids = tuple(tuple(grid[-2:]) for grid in case.spec["config"]["scale_schedule"])
    patch = 2 if net.get("apply_spatial_patchify") else 1
    fields = tokens.section["tokenizer"] | {"scales": grids, "patch": patch}
    part = infinity.generator(
        case.shapes("transformer"),
        {"scales": grids, "reference_grid": grids[-1]}
        | said(
            net,
            width="embed_dim",
            depth="depth",
            heads="num_heads",
            caption_features="text_channels",
            label_dropout="cond_drop_rate",
        ),
    )
    config = {"dtype": "float32", "tokenizer": fields, **part.section}
    params = case.params("transformer", part, empty_params(config, "generator"))
    return Model(case, build_system(config), params | {"tokenizer": tokens.params}, part)


def _rotations(model: Model) -> Outputs:
    yield "rope_cos_sin", np.moveaxis(model.system.backbone.rotations(), -1, 0)


def _forward(model: Model) -> Outputs:
    system, params = model.unrolled

    @jax.jit
    def run(params: Params, context: jax.Array, cond: Cond, bits: jax.Array) -> tuple:
        (hidden, _), kept = system.backbone.apply(
            {"params": params["backbone"]},
            context,
            cond,
            capture_intermediates=True,
            mutable=["intermediates"],
        )
        logits = system.head.apply({"params": params["head"]}, hidden)
        return logits, system.head.loss(logits, bits), kept["intermediates"]

    context = jnp.asarray(model.case[f"{TEACHER}_input"])
    logits, loss, kept = run(params, context, model.dropped, model.bits)
    real = np.asarray(model.cond["caption_mask"])
    (pooled, (text, _)), block = kept["reader"]["__call__"][0], kept["stack"]["blocks_0"]
    yield "text_normed", np.asarray(kept["reader"]["norm"]["__call__"][0])[real]
    yield "text_pooled", pooled[:, 0]
    yield "text_kv", np.asarray(text)[real]
    yield "block0_cross_attention", block["cross_attention"]["__call__"][0]
    yield "block0_output", block["__call__"][0][0]
    yield "logits", logits.reshape(*logits.shape[:2], -1)
    yield "bit_loss_per_token", loss


def _gradients(model: Model) -> Outputs:
    system, context, bits, cond = model.system, f"{TEACHER}_input", model.bits, model.dropped

    @jax.jit
    def run(trained: Params, context: jax.Array) -> Any:
        def loss(trained: Params) -> jax.Array:
            hidden, _ = system.backbone.apply({"params": trained["backbone"]}, context, cond)
            logits = system.head.apply({"params": trained["head"]}, hidden)
            return (system.head.loss(logits, bits) * scale_weights(system.schedule)).mean()

        return jax.value_and_grad(loss)(trained)

    trained = {name: model.params[name] for name in ("backbone", "head")}
    value, gradient = run(trained, jnp.asarray(model.case[context]))
    yield "train_loss", value
    places = model.part.places
    recorded = model.case.spec.get("train_grad_names", [*places])
    yield "train_grad_norms", norms(places, gradient, recorded)
    yield "train_grad_total_norm", np.linalg.norm(norms(places, gradient, [*places]))


def _sampled(model: Model, run: dict[str, Any]) -> Outputs:
    """The sampler itself, drawing the more probable value of every bit as was recorded."""
    schedule, tag = model.system.schedule, run["tag"]
    knobs = Knobs(
        step_temperatures=tuple(run["tau_list"]),
        top_k=run.get("top_k", 0),
        top_p=run.get("top_p", 0.0),
    ).as_arrays()
    scales = np.float32(run["cfg_list"])
    drawn = _draw(
        *model.unrolled,
        model.cond,
        knobs,
        jnp.asarray(scales),
        guided=bool((scales != 1).any()),
        layers=tuple(run["cfg_insertion_layer"]),
    )
    codes, f_hat, logits = drawn
    for k, (start, size) in enumerate(zip(schedule.starts, schedule.sizes, strict=True)):
        name = f"{tag}_bits_scale{k}"
        yield name, _cells(model, name, k, codes[:, start : start + size])
        yield f"{tag}_logits_scale{k}", logits[k]
    images = decode_features(model.system, model.params["tokenizer"], f_hat)
    pixels = np.asarray((images + 1) / 2) * np.float32(255)
    yield f"{tag}_image_uint8_bgr", pixels.astype(np.uint8)[..., ::-1]


def _cells(model: Model, name: str, scale: int, codes: jax.Array) -> jax.Array:
    """The bits [B, n, bits] of a scale, or those of its cells where these were recorded."""
    quantizer, recorded = model.system.tokenizer.quantizer, model.case.io.get(name, codes)
    if recorded.shape[-1] == codes.shape[-1]:
        return codes
    return quantizer.unfolded(codes, scale).reshape(recorded.shape)


@functools.partial(jax.jit, static_argnames=("system", "guided", "layers"))
def _draw(
    system: System,
    params: Params,
    cond: Cond,
    knobs: Knobs,
    scales: jax.Array,
    *,
    guided: bool,
    layers: tuple[int, ...],
) -> tuple:
    """(codes [B, L, bits], f_hat, the logits of every step, guided and over its temperature)."""
    batch, seen = len(cond["dropped"]), list[jax.Array]()

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, BitwiseHead) and context.method_name == "__call__":
            seen.append(out)
        return out

    inputs = (system, params, cond, None, knobs, scales, None)
    with nn.intercept_methods(record):
        codes, f_hat = draw_steps(*inputs, guided=guided, layers=layers)
    for step, logits in enumerate(seen):
        if guided and 0 in layers:
            logits = system.head.guide(logits[:batch], logits[batch:], scales[step])
        seen[step] = logits / knobs.at(step).temperature
    return codes, f_hat, seen
