"""LlamaGen's golden cases: every recorded output as our code computes it."""

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
from ar_jax.build import build_system, build_tokenizer
from ar_jax.convert import llamagen
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.readings import block_states, nchw, norms
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import Places, official_tensor
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.nn.positions import rope_2d
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import CachedSampler, image_keys

INPUTS = (
    *("tok_images", "gpt_idx", "gpt_labels", "gpt_drop_u", "gen_sampled_gumbel", "filter_in"),
    *("t2i_idx", "t2i_caption", "t2i_caption_mask", "t2i_valid*", "t2i_drop_u"),
)
NOT_APPLICABLE: dict[str, str] = {}
Outputs = Iterator[tuple[str, Any]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer of a case as our system, with its weights and the case's tokenizer."""

    case: Case
    name: str  # in spec.json
    system: System
    params: dict[str, Any]  # {'backbone', 'head', 'tokenizer'}
    part: Part

    @property
    def net(self) -> dict[str, Any]:
        """The official arguments."""
        return self.case.spec["config"][self.name]

    @functools.cached_property
    def teacher_forced(self) -> Any:
        """(cond, codes) -> logits; compiled once."""
        run = jax.jit(functools.partial(teacher_forced, self.system))
        return functools.partial(run, self.params)

    @functools.cached_property
    def sampler(self) -> CachedSampler:
        """Compiled once for all that differs in traced settings."""
        return CachedSampler.create(self.system, self.params)

    def gradient(self, cond: Cond, codes: jax.Array) -> Any:
        """Of our likelihood objective."""
        objective = Likelihood(system=self.system, label_dropout=0.0)
        trained = {name: self.params[name] for name in ("backbone", "head")}
        batch = {"codes": codes, **cond}

        def loss(params: Any) -> jax.Array:
            return objective.loss(params, {}, self.params, batch, jax.random.key(0), False)[0]

        return jax.jit(jax.grad(loss))(trained)

    def norms(self, gradient: Any) -> np.ndarray:
        """Of a gradient, in the order of the spec."""
        return norms(self.part.places, gradient, self.case.spec[self.name]["grad_norm_keys"])


def outputs(case: Case) -> Outputs:
    """(name, array) of every output of the case."""
    if "tok_images" in case.io:
        yield from _tokenizer(case)
    if "gpt_idx" in case.io:
        model = load(case, "gpt_c2i")
        yield from _classes(model)
        yield from _generated(model)
    if "filter_in" in case.io:
        yield "filter_out", _filtered(case)
    if "t2i_idx" in case.io:
        yield from _captions(load(case, "gpt_t2i"))


def load_tokenizer(case: Case, image_size: Any) -> tuple[Part, Places]:
    """The tokenizer's part for images of a size; raises ValueError where spec and shapes differ."""
    tok = case.spec["config"]["tokenizer"]
    if tok["encoder_ch_mult"] != tok["decoder_ch_mult"]:
        raise ValueError(
            f"{case.name}: encoder_ch_mult {tok['encoder_ch_mult']} and decoder_ch_mult "
            f"{tok['decoder_ch_mult']} differ; our autoencoders are symmetric"
        )
    part = llamagen.tokenizer(
        case.shapes("tokenizer"),
        dict(
            image_size=image_size,
            codebook_size=tok["codebook_size"],
            l2_norm=tok["codebook_l2_norm"],
            entropy=tok["entropy_loss_ratio"] > 0,
            latent=tok["z_channels"],
            code_width=tok["codebook_embed_dim"],
            channels=tok["ch"],
            multipliers=tok["encoder_ch_mult"],
            encoder_blocks=tok["num_res_blocks"],
            decoder_blocks=tok["num_res_blocks"] + 1,
        ),
    )
    return part, part.places


def load(case: Case, name: str) -> Model:
    """The transformer ``name`` of the case; raises ValueError where spec and shapes differ."""
    net = case.spec["config"][name]
    grid = round(net["block_size"] ** 0.5)
    levels = len(case.spec["config"]["tokenizer"]["encoder_ch_mult"])
    tokenizer, _ = load_tokenizer(case, grid * 2 ** (levels - 1))
    options = dict(
        grid=grid,
        width=net["dim"],
        depth=net["n_layer"],
        heads=net["n_head"],
        codebook_size=net["vocab_size"],
        label_dropout=net["class_dropout_prob"],
        norm_epsilon=net.get("norm_eps", 1e-5),
        rope_base=net.get("rope_base", 10_000),
    )
    if net.get("n_kv_head"):
        options["kv_heads"] = net["n_kv_head"]
    if net["model_type"] == "c2i":
        options["num_classes"] = net["num_classes"]
    else:
        options["caption_length"] = net["cls_token_num"]
        options["caption_features"] = net["caption_dim"]
    part = llamagen.generator(case.shapes(name), options)
    section = tokenizer.section["tokenizer"]
    if section["codebook_size"] == net["vocab_size"]:
        config = {"dtype": "float32", **tokenizer.section, **part.section}
        codes = case.params("tokenizer", tokenizer, empty_params(config, "tokenizer"))
    else:  # a transformer with a vocabulary of its own: nothing is decoded, any weights do
        section = section | {"codebook_size": net["vocab_size"]}
        config = {"dtype": "float32", "tokenizer": section, **part.section}
        shapes = empty_params(config, "tokenizer")
        codes = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    params = case.params(name, part, empty_params(config, "generator"))
    return Model(case, name, build_system(config), params | {"tokenizer": codes}, part)


def _tokenizer(case: Case) -> Outputs:
    height, width = case["tok_images"].shape[-2:]
    part, places = load_tokenizer(case, height if height == width else (height, width))
    config = {"dtype": "float32", **part.section}
    tokenizer: Any = build_tokenizer(config)
    params = case.params("tokenizer", part, empty_params(config, "tokenizer"))
    images = jnp.asarray(np.moveaxis(case["tok_images"], 1, -1))
    settings = case.spec["config"]["tokenizer"]
    beta, ratio = settings["commit_loss_beta"], settings["entropy_loss_ratio"]

    def passes(module: Any, images: jax.Array) -> tuple:
        autoencoder = module.autoencoder
        reconstruction, quantized = module(images)
        decoded = autoencoder.decode(module.quantizer.lookup(quantized.codes))
        features = autoencoder.encoder(images), autoencoder.encode(images)
        return *features, quantized, reconstruction, decoded

    def total(params: Any) -> tuple:
        applied: Any = tokenizer.apply({"params": params}, images, method=passes)
        quantized, reconstruction = applied[2], applied[3]
        loss = (
            jnp.square(reconstruction - images).mean()
            + quantized.codebook_loss.mean()
            + beta * quantized.commitment_loss.mean()
            + ratio * quantized.entropy_loss
        )
        return loss, applied

    run = jax.jit(jax.grad(total, has_aux=True))
    gradient, (encoded, features, quantized, reconstruction, decoded) = run(params)
    yield "tok_encoder_out", nchw(encoded)
    yield "tok_prequant", nchw(features)
    yield "tok_ids", quantized.codes
    yield "tok_quant", nchw(quantized.features)
    yield "tok_recon", nchw(reconstruction)
    yield "tok_decode_code", nchw(decoded)
    yield "tok_vq_loss", quantized.codebook_loss.mean()
    yield "tok_commit_loss", beta * quantized.commitment_loss.mean()
    yield "tok_entropy_loss", ratio * quantized.entropy_loss
    # The official usage counts the zeros that its ring buffer starts with as code 0.
    used = {0, *np.asarray(quantized.codes).flat} if settings["codebook_show_usage"] else ()
    yield "tok_usage", np.float32(len(used) / settings["codebook_size"])
    yield "tok_rec_l2", jnp.square(reconstruction - images).mean()
    yield "tok_grad_norms", norms(places, gradient, case.spec["tokenizer"]["grad_norm_keys"])
    first = official_tensor(places, gradient, "quant_conv.weight")
    yield "tok_grad_quant_conv_w", first[:, :, 0, 0]
    codebook = official_tensor(places, gradient, "quantize.embedding.weight")
    yield "tok_grad_codebook_head", codebook[: len(case["tok_grad_codebook_head"])]


def _classes(model: Model) -> Outputs:
    case, net = model.case, model.net
    codes = jnp.asarray(case["gpt_idx"], jnp.int32)
    cond = {"label": jnp.asarray(case["gpt_labels"], jnp.int32)}
    head_width = net["dim"] // net["n_head"]
    cells = model.system.schedule.coords[:, 1:]
    table = rope_2d(cells, head_width, model.system.backbone.rope_base)
    condition = np.zeros((net["cls_token_num"], *table.shape[1:]), np.float32)
    yield "rope_table", np.concatenate([condition, table])
    logits = model.teacher_forced(cond, codes)
    yield "gpt_logits", logits
    yield "gpt_loss", CategoricalHead.loss(logits, codes).mean()
    yield from _dropped(model, cond, codes, "gpt")
    states = block_states(model.system, model.params, cond, codes, 1)
    yield "gpt_hidden_after_layer0", states[1]
    gradient = model.gradient(cond, codes)
    yield "gpt_grad_norms", model.norms(gradient)
    official = functools.partial(official_tensor, model.part.places, gradient)
    yield "gpt_grad_layer0_attention_norm", official("layers.0.attention_norm.weight")
    rows = official("tok_embeddings.weight")
    yield "gpt_grad_tok_emb_head", rows[: len(case["gpt_grad_tok_emb_head"])]


def _dropped(model: Model, cond: Cond, codes: jax.Array, prefix: str) -> Outputs:
    """The conditions that the recorded draws drop; some logits, and the loss."""
    draws = model.case[f"{prefix}_drop_u"]
    drop = jnp.asarray(draws < model.net["class_dropout_prob"])
    dropped = model.system.backbone.conditioner.null(cond, drop)
    logits = model.teacher_forced(dropped, codes)
    for name in model.case.io:
        if found := re.fullmatch(rf"{prefix}_logits_drop_row(\d+)_pos(\d+)", name):
            yield name, logits[int(found[1]), int(found[2])]
    yield f"{prefix}_loss_drop", CategoricalHead.loss(logits, codes).mean()


def _guidance(scale: float, interval: int = -1) -> Guidance:
    """Official guidance is off up to a scale of 1; its interval counts from the second code."""
    return Guidance(scale=max(scale, 1.0), stop=interval + 2 if interval > -1 else -1)


def _generated(model: Model) -> Outputs:
    case, settings = model.case, model.case.spec["sampling"]
    cond = {"label": jnp.asarray(case["gpt_labels"], jnp.int32)}
    scale, noise = settings["cfg_scale"], None
    keys = image_keys(0, 0, len(case["gpt_labels"]))
    for run in ("cfg", "nocfg", "interval", "sampled"):
        if f"gen_{run}_ids" not in case.io:
            continue
        guidance, knobs = _guidance(scale), Knobs(temperature=0.0)
        if "gen_sampled_gumbel" in case.io:  # of no effect on a greedy run
            noise = jnp.asarray(case["gen_sampled_gumbel"]).transpose(1, 0, 2)
        if run == "nocfg":
            guidance = Guidance()
        if run == "interval":
            guidance = _guidance(scale, settings["cfg_interval"])
        if run == "sampled":
            knobs = Knobs(**settings["sampled"])
        drawn = model.sampler(cond, keys, knobs=knobs, guidance=guidance, noise=noise)
        yield f"gen_{run}_ids", drawn.codes
        if run != "cfg":
            continue
        if "gen_cfg_image" in case.io:
            decode = functools.partial(
                model.system.tokenizer.apply,
                method=lambda m, codes: m.autoencoder.decode(m.quantizer.lookup(codes)),
            )
            image = jax.jit(decode)({"params": model.params["tokenizer"]}, drawn.codes)
            yield "gen_cfg_image", nchw(image)
        logits = _step_logits(model, cond, drawn.codes, guidance)
        yield "gen_cfg_step_logits", logits[:, :: settings["step_logits_stride"]]


def _step_logits(model: Model, cond: Cond, codes: jax.Array, guidance: Guidance) -> jax.Array:
    scales = jnp.asarray(guidance.scales(model.system.schedule.num_steps))
    return stepwise_logits(model.system, model.params, cond, codes, scales)[0]


def _filtered(case: Case) -> jax.Array:
    settings = dict(case.spec["sampling"]["sampled"], temperature=1.0)
    return truncate(jnp.asarray(case["filter_in"]), Knobs(**settings).as_arrays())


def _captions(model: Model) -> Outputs:
    case, settings = model.case, model.case.spec["sampling"]
    cond = {
        "caption": jnp.asarray(case["t2i_caption"]),
        "caption_mask": jnp.asarray(case["t2i_caption_mask"]) > 0,
        "dropped": jnp.zeros(len(case["t2i_caption"]), bool),
    }
    codes = jnp.asarray(case["t2i_idx"], jnp.int32)
    yield "t2i_attn_mask_packed", _attention_mask(model, cond)
    logits = model.teacher_forced(cond, codes)
    yield "t2i_logits", logits
    yield "t2i_loss", CategoricalHead.loss(logits, codes).mean()
    yield "t2i_grad_norms", model.norms(model.gradient(cond, codes))
    objective = Likelihood(system=model.system)
    for name in case.io:
        if re.fullmatch(r"t2i_loss_valid\d*", name):
            valid = jnp.asarray(case[name.replace("loss_", "")], jnp.float32)
            batch = cond | {"codes": codes, "mask": valid}
            key = jax.random.key(0)
            yield name, objective.loss(model.params, {}, model.params, batch, key, False)[0]
    yield from _dropped(model, cond, codes, "t2i")
    guidance, keys = _guidance(settings["t2i_cfg_scale"]), image_keys(0, 0, len(codes))
    greedy = Knobs(temperature=0.0)
    drawn = model.sampler(cond, keys, knobs=greedy, guidance=guidance)
    yield "t2i_gen_ids", drawn.codes
    steps = _step_logits(model, cond, drawn.codes, guidance)
    yield "t2i_gen_step_logits", steps[:, :: settings["t2i_step_logits_stride"]]
    unmasked = cond | {"caption_mask": jnp.ones_like(cond["caption_mask"])}
    drawn = model.sampler(unmasked, keys, knobs=greedy, guidance=guidance)
    yield "t2i_gen_nomask_ids", drawn.codes


def _attention_mask(model: Model, cond: Cond) -> np.ndarray:
    """Our visibility of caption and codes, packed; the last code, never an input, sees all."""
    backbone = model.system.backbone
    ours = np.asarray(backbone._mask(None, 0, backbone.rows, cond["caption_mask"]))
    ours = np.broadcast_to(ours, (len(cond["dropped"]), 1, backbone.rows, backbone.rows))[:, 0]
    whole = np.pad(ours, ((0, 0), (0, 1), (0, 1)))
    whole[:, -1, :-1] = True
    whole[:, -1, : backbone.prefix_rows] = cond["caption_mask"]
    whole[:, -1, -1] = True
    return np.packbits(whole, axis=-1)
