"""LlamaGen's golden cases: every recorded output as our code computes it."""

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
from ar_jax.build import build_system
from ar_jax.convert import llamagen
from ar_jax.convert.parity import llamagen_tokenizer
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import block_states, corner, find_key, norms, said
from ar_jax.convert.parity.stand_in import stand_in, stand_in_params
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.nn.positions import rope_2d
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys

NOT_APPLICABLE: dict[str, str] = {}
# What the names of arrays begin with -> the transformer in spec.json.
TRANSFORMERS = {"gpt": "gpt_c2i", "t2i": "gpt_t2i"}
# Of the official code.
NORM_EPSILON, ROPE_BASE, LABEL_DROPOUT = 1e-5, 10_000, 0.1
GRADIENTS = {
    "tok_emb": "tok_embeddings.weight",
    "cls_emb": "cls_embedding.embedding_table.weight",
}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    of_each = ("idx", "drop_u", "valid", "valid[0-9]*", "gen_sampled_gumbel")
    return (
        *("tok_images", "filter_in", "gpt_labels", "t2i_caption", "t2i_caption_mask"),
        *(f"{prefix}_{name}" for prefix in TRANSFORMERS for name in of_each),
        "gen_sampled_gumbel",
    )


def summarised(name: str) -> str | None:
    """The features or logits whose mean loss an array is."""
    if re.fullmatch("tok_(vq|commit|entropy)_loss", name):
        return "tok_prequant"
    found = re.fullmatch("(gpt|t2i)_loss.*", name)
    return f"{found[1]}_logits" if found else {"tok_rec_l2": "tok_recon"}.get(name)


def sections(case: Case) -> list[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    found = [*llamagen_tokenizer.sections(case)]
    for prefix, name in TRANSFORMERS.items():
        model = functools.cache(functools.partial(load, case, name, prefix))
        found += _transformer_sections(case, prefix, model)
    return [*found, Section(("filter_out",), lambda: [("filter_out", _filtered(case))])]


def _transformer_sections(case: Case, prefix: str, model: Any) -> Iterator[Section]:
    tables = [f"{prefix}_rope_table"]
    if prefix == "gpt" or "gpt_c2i" not in case.spec.get("config", {}):
        tables.append("rope_table")
    parts = {
        tuple(tables): _rope,
        (f"{prefix}_logits_drop*", f"{prefix}_loss_drop"): _dropped,
        (f"{prefix}_loss_valid*",): _valid,
        (f"{prefix}_logits", f"{prefix}_loss"): _logits,
        (f"{prefix}_hidden_after_layer*",): _hidden,
        (f"{prefix}_grad_*",): _gradients,
        (f"{prefix}_attn_mask_packed",): _attention_mask,
    }
    for outputs, compute in parts.items():
        yield Section(outputs, with_model(compute, model))
    start = "t2i_gen" if prefix == "t2i" else "gen"
    runs = case.names(rf"({start}(?:_\w+?)?)_(?:ids|step_logits|image)")
    for run in dict.fromkeys(found[1] for _, found in runs):
        outputs = tuple(f"{run}_{what}" for what in ("ids", "step_logits", "image"))
        yield Section(outputs, with_model(_drawn, model, run))


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer of a case as our system, with its weights and a stand-in for a tokenizer."""

    case: Case
    name: str  # in spec.json
    prefix: str  # of its arrays
    system: System
    params: dict[str, Any]  # {'backbone', 'head', 'tokenizer'}
    part: Part

    def recorded(self, name: str) -> np.ndarray:
        """PREFIX_NAME of io.npz."""
        return self.case[f"{self.prefix}_{name}"]

    @property
    def net(self) -> dict[str, Any]:
        """The official arguments."""
        return self.case.config(self.name)

    @property
    def settings(self) -> dict[str, Any]:
        """Of sampling."""
        return self.case.spec.get("sampling", {})

    @property
    def codes(self) -> jax.Array:
        """int32 [B, L]."""
        return jnp.asarray(self.recorded("idx"), jnp.int32)

    @property
    def cond(self) -> Cond:
        """The recorded labels or captions."""
        if self.prefix == "gpt":
            return {"label": jnp.asarray(self.recorded("labels"), jnp.int32)}
        caption = jnp.asarray(self.recorded("caption"))
        mask = jnp.asarray(self.recorded("caption_mask")) > 0
        return {
            "caption": caption,
            "caption_mask": mask,
            "dropped": jnp.zeros(len(caption), bool),
        }

    @functools.cached_property
    def teacher_forced(self) -> Any:
        """(cond, codes) -> logits; compiled once."""
        run = jax.jit(functools.partial(teacher_forced, self.system))
        return functools.partial(run, self.params)

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        """Compiled once for all that differs in traced settings."""
        return CachedSampler.create(self.system, self.params)


def load(case: Case, name: str, prefix: str) -> Model:
    """The transformer ``name`` of the case; raises ValueError where spec and shapes differ."""
    net = case.config(name)
    grid = math.isqrt(net["block_size"])
    options = said(
        net,
        width="dim",
        depth="n_layer",
        heads="n_head",
        kv_heads="n_kv_head",
        codebook_size="vocab_size",
        label_dropout="class_dropout_prob",
    )
    if prefix == "gpt":
        options |= said(net, num_classes="num_classes")
    else:
        options |= said(net, caption_length="cls_token_num", caption_features="caption_dim")
    options |= dict(
        grid=grid,
        norm_epsilon=net.get("norm_eps", NORM_EPSILON),
        rope_base=net.get("rope_base", ROPE_BASE),
    )
    part = llamagen.generator(case.shapes(name), options)
    size = part.section["head"]["vocab_size"]
    tokenizer = stand_in((grid, grid), name="vq", codebook_size=size)
    config = {"dtype": "float32", **tokenizer, **part.section}
    params = case.params(name, part, empty_params(config, "generator"))
    params["tokenizer"] = stand_in_params(config)
    return Model(case, name, prefix, build_system(config), params, part)


def _rope(model: Model) -> Outputs:
    """Angles of the grid's cells behind rows of zeros for the condition."""
    backbone = model.system.backbone
    cells = model.system.schedule.coords[:, 1:]
    table = rope_2d(cells, backbone.width // backbone.heads, backbone.rope_base)
    condition = np.zeros((backbone.prefix_rows, *table.shape[1:]), np.float32)
    for name in ("rope_table", f"{model.prefix}_rope_table"):
        yield name, np.concatenate([condition, table])


def _logits(model: Model) -> Outputs:
    logits = model.teacher_forced(model.cond, model.codes)
    yield f"{model.prefix}_logits", logits
    yield f"{model.prefix}_loss", CategoricalHead.loss(logits, model.codes).mean()


def _dropped(model: Model) -> Outputs:
    """With the conditions null that the recorded draws drop: some logits, and the loss."""
    cond, prefix = model.cond, model.prefix
    if probability := model.net.get("class_dropout_prob", LABEL_DROPOUT):
        drop = jnp.asarray(model.recorded("drop_u") < probability)
        cond = model.system.backbone.conditioner.null(cond, drop)
    logits = model.teacher_forced(cond, model.codes)
    for name, found in model.case.names(rf"{prefix}_logits_drop_row(\d+)_pos(\d+)"):
        yield name, logits[int(found[1]), int(found[2])]
    yield f"{prefix}_loss_drop", CategoricalHead.loss(logits, model.codes).mean()


def _valid(model: Model) -> Outputs:
    """The loss of some of the samples."""
    objective = Likelihood(system=model.system, label_dropout=0.0)
    for name, found in model.case.names(rf"{model.prefix}_loss_(valid\d*)"):
        valid = jnp.asarray(model.recorded(found[1]), jnp.float32)
        batch = model.cond | {"codes": model.codes, "mask": valid}
        key = jax.random.key(0)
        yield name, objective.loss(model.params, {}, model.params, batch, key, False)[0]


def _hidden(model: Model) -> Outputs:
    names = model.case.names(rf"{model.prefix}_hidden_after_layer(\d+)")
    last = max(int(found[1]) for _, found in names)
    states = block_states(model.system, model.params, model.cond, model.codes, last + 1)
    for name, found in names:
        yield name, states[int(found[1]) + 1]


def _gradients(model: Model) -> Outputs:
    """Of our likelihood objective."""
    objective = Likelihood(system=model.system, label_dropout=0.0)
    trained = {name: model.params[name] for name in ("backbone", "head")}
    batch = {"codes": model.codes, **model.cond}

    def loss(params: Any) -> jax.Array:
        return objective.loss(params, {}, model.params, batch, jax.random.key(0), False)[0]

    gradient, places = jax.jit(jax.grad(loss))(trained), model.part.places
    for name, found in model.case.names(rf"{model.prefix}_grad_(?!norms$)(.+)"):
        key = find_key(places, found[1], GRADIENTS)
        yield name, corner(official_tensor(places, gradient, key), model.case[name])
    if f"{model.prefix}_grad_norms" in model.case.io:
        keys = model.case.spec[model.name]["grad_norm_keys"]
        yield f"{model.prefix}_grad_norms", norms(places, gradient, keys)


def _attention_mask(model: Model) -> Outputs:
    """Our visibility of caption and codes, packed; the last code, never an input, sees all."""
    backbone, mask = model.system.backbone, model.cond["caption_mask"]
    mask = mask[:, : backbone.prefix_rows]
    ours = np.asarray(backbone._mask(None, 0, backbone.rows, mask, cached=True))
    ours = np.broadcast_to(ours, (len(mask), 1, backbone.rows, backbone.rows))[:, 0]
    whole = np.pad(ours, ((0, 0), (0, 1), (0, 1)))
    whole[:, -1, :-1] = True
    whole[:, -1, : backbone.prefix_rows] = mask
    whole[:, -1, -1] = True
    yield f"{model.prefix}_attn_mask_packed", np.packbits(whole, axis=-1)


def _guidance(scale: float, interval: int = -1) -> Guidance:
    """Official guidance is off up to a scale of 1; its interval counts from the second code."""
    return Guidance(scale=max(scale, 1.0), stop=interval + 2 if interval > -1 else -1)


def _how(model: Model, run: str) -> tuple[Cond, Knobs, Guidance]:
    """(condition, knobs, guidance) of a run, by its name."""
    settings, cond = model.settings, model.cond
    kind = re.sub("^(t2i_)?gen_?", "", run)
    scale = "t2i_cfg_scale" if model.prefix == "t2i" else "cfg_scale"
    if kind == "nocfg":
        return cond, Knobs(temperature=0.0), Guidance()
    if kind == "interval":
        guidance = _guidance(settings[scale], settings["cfg_interval"])
        return cond, Knobs(temperature=0.0), guidance
    if kind == "sampled":
        return cond, Knobs(**settings["sampled"]), _guidance(settings[scale])
    if kind == "nomask":
        cond = cond | {"caption_mask": jnp.ones_like(cond["caption_mask"])}
    elif kind not in ("", "cfg"):
        raise ValueError(
            f"the run {run!r} is none of cfg, nocfg, interval, sampled and nomask: spec.json does "
            "not say how it was drawn"
        )
    return cond, Knobs(temperature=0.0), _guidance(settings[scale])


def _drawn(model: Model, run: str) -> Outputs:
    """The codes of a run, the logits that they were drawn from, and their images."""
    case, (cond, knobs, guidance) = model.case, _how(model, run)
    start = "t2i_gen" if model.prefix == "t2i" else "gen"
    # Of no effect on a greedy run, which then is the same program.
    noise = case.io.get(f"{start}_sampled_gumbel")
    if noise is None and knobs.temperature > 0:
        raise ValueError(f"{case.name}: io.npz has no '{start}_sampled_gumbel', the run's noise")
    gumbel = None if noise is None else jnp.asarray(noise.transpose(1, 0, 2))
    keys = image_keys(0, 0, len(jax.tree.leaves(cond)[0]))
    codes = model.sampler(cond, keys, knobs=knobs, guidance=guidance, noise=gumbel).codes
    yield f"{run}_ids", codes
    if f"{run}_image" in case.io:
        grid = model.system.schedule.grids[0][0]
        yield f"{run}_image", llamagen_tokenizer.decoded(case, codes, grid)
    if f"{run}_step_logits" in case.io:
        scales = guidance.scales(model.system.schedule.num_steps)
        guided = jnp.asarray(scales) if (scales != 1).any() else None
        logits, _ = stepwise_logits(model.system, model.params, cond, codes, guided)
        stride = "t2i_step_logits_stride" if model.prefix == "t2i" else "step_logits_stride"
        yield f"{run}_step_logits", logits[:, :: model.settings[stride]]


def _filtered(case: Case) -> jax.Array:
    settings = case.spec.get("sampling", {}).get("sampled", {}) | {"temperature": 1.0}
    return jax.jit(truncate)(jnp.asarray(case["filter_in"]), Knobs(**settings).as_arrays())
