"""VAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.convert import var
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.readings import block_states, nchw, norms, strided
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.nn.resize import area_matrix, bicubic_matrix
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.objectives.tokenizer import TokenizerObjective
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import decode_features, draw_steps, image_keys

INPUTS = (
    *("image_u8", "label", "*.gumbel", "*.gumbel_soft", "unit.*.full"),
    *("filter.logits", "filter.kp", "filter.tie_logits"),
)
NOT_APPLICABLE: dict[str, str] = {}
# A softmax at temperature down to 0.0135 multiplies errors by more than a hundred.
LIMITS = {"smooth.*": 1e-3}
Outputs = Iterator[tuple[str, Any]]


def summarised(name: str) -> str | None:
    """The array that a recorded mean or deviation sums up."""
    found = re.fullmatch(r"(.*\.(?:image|recon))_(?:mean|std)", name)
    return found and found[1]


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    tokenizer: Part
    generator: Part

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

    @property
    def scales(self) -> range:
        """Of the schedule."""
        return range(self.system.schedule.num_steps)

    @property
    def cond(self) -> dict[str, jax.Array]:
        """The labels."""
        return {"label": jnp.asarray(self["label"], jnp.int32)}

    @property
    def images(self) -> jax.Array:
        """float32 [B, H, W, C] in [-1, 1]."""
        return jnp.asarray(self["image_u8"].transpose(0, 2, 3, 1)) / jnp.float32(127.5) - 1

    @functools.cached_property
    def codes(self) -> jax.Array:
        """int32 [B, L], of the image, as recorded."""
        parts = [self[f"tok.idx_{k}"] for k in self.scales]
        return jnp.asarray(np.concatenate(parts, axis=1), jnp.int32)

    @functools.cached_property
    def teacher_forced(self) -> Any:
        """(cond, codes) -> logits; compiled once."""
        return functools.partial(
            jax.jit(functools.partial(teacher_forced, self.system)), self.params
        )

    def ask(self, method: Any, *args: Any) -> Any:
        """What a function of our tokenizer module gives, compiled."""
        apply = functools.partial(self.system.tokenizer.apply, method=method)
        return jax.jit(apply)({"params": self.params["tokenizer"]}, *args)


def load(case: Case) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    config = case.spec["config"]
    tok, net = config["tokenizer"], config["transformer"]
    shared = dict(scales=net["patch_nums"], codebook_size=tok["vocab_size"])
    tokenizer = var.tokenizer(
        case.shapes("tokenizer"),
        shared
        | dict(
            scales=tok["v_patch_nums"],
            image_size=config["image_size"],
            phis=tok["share_quant_resi"],
            phi_ratio=abs(tok["quant_resi"]),
            l2_norm=tok["using_znorm"],
            channels=tok["ch"],
            multipliers=tok["ch_mult"],
            encoder_blocks=tok["num_res_blocks"],
            decoder_blocks=tok["num_res_blocks"] + 1,
            image_channels=tok["in_channels"],
            latent=tok["z_channels"],
            code_width=tok["z_channels"],
            projection=tok["quant_conv_ks"],
        ),
    )
    generator = var.generator(
        case.shapes("transformer"),
        shared
        | dict(
            width=net["embed_dim"],
            depth=net["depth"],
            heads=net["num_heads"],
            num_classes=net["num_classes"],
            norm_epsilon=net["norm_eps"],
            drop_path=net["drop_path_rate"],
            label_dropout=net["cond_drop_rate"],
        ),
    )
    built = {"dtype": "float32", **tokenizer.section, **generator.section}
    fields = built["backbone"]
    for name, ours in (("shared_aln", "modulation"), ("attn_l2_norm", "qk_norm")):
        if net[name] != (fields[ours] in ("shared", "cosine")):
            raise ValueError(f"{case.name}: {name} is {net[name]}, the tensors say {fields[ours]}")
    params = case.params("transformer", generator, empty_params(built, "generator"))
    params["tokenizer"] = case.params("tokenizer", tokenizer, empty_params(built, "tokenizer"))
    return Model(case, build_system(built), params, tokenizer, generator)


def outputs(case: Case) -> Outputs:
    """(name, array) of every output of the case."""
    model = load(case)
    yield from _tokenizer(model)
    yield from _tokenizer_gradients(model)
    yield from _hidden(model)
    yield from _logits(model)
    yield from _gradients(model)
    for run, settings in case.spec["config"]["sampling"].items():
        yield from _sampled(model, run, settings)
    if "filter.kp" in case.io:
        yield from _filters(case)
    yield from _resampling(case)


def _tokenizer(model: Model) -> Outputs:
    scales = model.system.schedule

    def passes(module: Any, images: jax.Array) -> tuple:
        features = module.autoencoder.encode(images)
        return module.autoencoder.encoder(images), features, module(images)

    encoded, features, (reconstruction, quantized) = model.ask(passes, model.images)
    yield "tok.enc", nchw(encoded)
    yield "tok.f", nchw(features)
    for k in model.scales:
        first = scales.starts[k]
        yield f"tok.idx_{k}", quantized.codes[:, first : first + scales.sizes[k]]

    def decodes(module: Any, codes: jax.Array) -> tuple:
        sums = [module.quantizer.lookup(codes, steps + 1) for steps in model.scales]
        images = module.decode(codes), module.decode_features(sums[0])
        return jnp.stack(sums), module.contexts(codes), *images

    sums, contexts, image, coarse = model.ask(decodes, model.codes)
    yield "tok.fhat", nchw(sums)
    yield "tok.var_input", contexts
    image = nchw(image)
    yield "tok.recon", strided(image, model.case.io.get("tok.recon"))
    yield "tok.recon_mean", image.mean((2, 3), dtype=np.float64)
    yield "tok.recon_std", image.std((2, 3), dtype=np.float64)
    yield "tok.recon_scale0", strided(nchw(coarse), model.case.io.get("tok.recon_scale0"))
    recorded = model.case.io.get("vqtrain.recon_unclamped")
    yield "vqtrain.recon_unclamped", strided(nchw(reconstruction), recorded)


def _tokenizer_gradients(model: Model) -> Outputs:
    beta = model.case.spec["config"]["tokenizer"]["beta"]
    objective = TokenizerObjective(tokenizer=model.system.tokenizer, commitment=beta)
    params, places = model.params["tokenizer"], model.tokenizer.places

    def quantizer_loss(params: Any, features: jax.Array) -> tuple:
        quantized = model.system.tokenizer.apply(
            {"params": params}, features, method=lambda m, f: m.quantizer.quantize(f)
        )
        total = (quantized.codebook_loss + beta * quantized.commitment_loss).mean()
        return total, quantized.features

    run = jax.jit(jax.value_and_grad(quantizer_loss, argnums=(0, 1), has_aux=True))
    features = jnp.asarray(np.moveaxis(model["tok.f"], 1, -1))
    (loss, f_hat), (dparams, dfeatures) = run(params, features)
    yield "vqtrain.fhat_st", nchw(f_hat)
    yield "vqtrain.vq_loss", loss
    yield "vqtrain.dvq_df", nchw(dfeatures)
    key = "quantize.embedding.weight"
    yield "vqtrain.dvq_dcodebook", official_tensor(places, dparams, key)
    phis = [key for key in model.case.shapes("tokenizer") if "quant_resi" in key]
    yield "vqtrain.dvq_dphi_norms", norms(places, dparams, phis)
    if phis:
        first = official_tensor(places, dparams, phis[0])
        yield "vqtrain.dvq_dphi0_w", model.case.select("vqtrain.dvq_dphi0_w", first)

    batch = {"image": jnp.asarray(model["image_u8"].transpose(0, 2, 3, 1))}
    stats = objective.init_stats(params)

    def loss_of(params: Any) -> tuple:
        return objective.loss(params, stats, {}, batch, jax.random.key(0), True)

    (loss, _), gradient = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    yield "vqtrain.total_loss", loss
    yield from _official(model.case, "vqtrain.grad", places, gradient, names="vqtrain.grad_names")


def _official(
    case: Case, prefix: str, places: Any, gradient: Any, names: str | None = None
) -> Outputs:
    """Names, norms and parts of a gradient, in the official layout."""
    joint = "_" if names else "."
    recorded = [str(name) for name in case.io.get(names or f"{prefix}.names", ())]
    ours = [name for name in recorded if name in places]
    ours += [name for name in places if name not in recorded]
    yield f"{prefix}{joint}names", np.array(ours)
    length = norms(places, gradient, ours)
    yield f"{prefix}{joint}norms", length
    yield f"{prefix}.total_norm", np.linalg.norm(length)
    for name in case.io:
        if (key := name.removeprefix(f"{prefix}.")) in places and key != name:
            yield name, case.select(name, official_tensor(places, gradient, key))


def _hidden(model: Model) -> Outputs:
    states = block_states(model.system, model.params, model.cond, model.codes)
    hidden = np.stack(states)
    recorded = model.case.io.get("tf.hidden", hidden)
    yield "tf.hidden", hidden[..., : recorded.shape[-1]]
    yield "tf.hidden_rms", np.sqrt(np.square(hidden, dtype=np.float64).mean((1, 2, 3)))


def _logits(model: Model) -> Outputs:
    schedule, codes = model.system.schedule, model.codes
    null = model.system.backbone.conditioner.null(model.cond)
    for cond, name in ((model.cond, "cond"), (null, "null")):
        logits = model.teacher_forced(cond, codes)
        yield f"tf.logits_{name}", logits
        nll = CategoricalHead.loss(logits, codes)
        ends = zip(schedule.starts, schedule.sizes, strict=True)
        scales = [nll[:, start : start + size].mean() for start, size in ends]
        yield f"tf.ce_scale_{name}", np.array(scales)
        yield f"tf.ce_mean_{name}", nll.mean()
        prefix = f"tf.ce_mean_{name}_ls"
        for smoothed in fnmatch.filter(model.case.io, f"{prefix}*"):
            smoothing = float(smoothed.removeprefix(prefix))
            loss = CategoricalHead.loss(logits, codes, label_smoothing=smoothing)
            yield smoothed, loss.mean()


def _gradients(model: Model) -> Outputs:
    objective = Likelihood(system=model.system, label_dropout=0.0)
    trained = {name: model.params[name] for name in ("backbone", "head")}
    batch = {"codes": model.codes, **model.cond}

    def loss(params: Any) -> jax.Array:
        return objective.loss(params, {}, model.params, batch, jax.random.key(0), False)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    yield "grad.loss", value
    yield from _official(model.case, "grad", model.generator.places, gradient)


def _sampled(model: Model, run: str, settings: Mapping[str, Any]) -> Outputs:
    """The sampler itself, with what its head says at every step."""
    smooth, schedule = settings["more_smooth"], model.system.schedule
    shape = (len(model["label"]), schedule.length, model.system.tokenizer.codebook_size)
    noise = model.case.io.get(f"{run}.gumbel_soft" if smooth else f"{run}.gumbel")
    noise = np.zeros(shape, np.float32) if noise is None else noise  # of no effect with top_k 1
    knobs = Knobs(top_k=settings["top_k"], top_p=settings["top_p"], smooth=smooth)
    scales = Guidance(kind="linear_excess", scale=settings["cfg"]).scales(schedule.num_steps)
    codes, f_hat, logits = _draw(
        model, knobs.as_arrays(), jnp.asarray(scales), jnp.asarray(noise), bool((scales != 1).any())
    )
    yield f"{run}.logits", logits
    for k in model.scales if not smooth else ():
        first = schedule.starts[k]
        yield f"{run}.idx_{k}", codes[:, first : first + schedule.sizes[k]]
    yield f"{run}.fhat", nchw(f_hat)
    decoded = decode_features(model.system, model.params["tokenizer"], f_hat)
    image = (nchw(decoded) + 1) / 2
    yield f"{run}.image", strided(image, model.case.io.get(f"{run}.image"))
    yield f"{run}.image_mean", image.mean((2, 3), dtype=np.float64)


def _draw(model: Model, knobs: Knobs, scales: jax.Array, noise: jax.Array, guided: bool) -> tuple:
    backbone, unstacked = model.system.backbone.for_sampling(model.params["backbone"])
    system = dataclasses.replace(model.system, backbone=backbone)
    params, batch = model.params | {"backbone": unstacked}, len(noise)
    keys = image_keys(0, 0, batch)

    @functools.partial(jax.jit, static_argnames="guided")
    def run(params: Any, knobs: Knobs, scales: jax.Array, noise: jax.Array, guided: bool) -> tuple:
        seen: list[jax.Array] = []

        def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            if isinstance(context.module, CategoricalHead) and context.method_name == "__call__":
                seen.append(out)
            return out

        with nn.intercept_methods(record):
            codes, f_hat = draw_steps(
                system, params, model.cond, keys, knobs, scales, noise, guided=guided
            )
        if guided:
            mixed = zip(seen, scales, strict=True)
            seen = [system.head.guide(both[:batch], both[batch:], s) for both, s in mixed]
        return codes, f_hat, jnp.concatenate(seen, axis=1)

    return run(params, knobs, scales, noise, guided=guided)


def _filters(case: Case) -> Outputs:
    filtered = jax.jit(truncate)
    logits = jnp.asarray(case["filter.logits"])
    pairs = [Knobs(top_k=int(k), top_p=float(p)).as_arrays() for k, p in case["filter.kp"]]
    yield "filter.out", np.stack([filtered(logits, knobs) for knobs in pairs])
    recorded = np.isfinite(case["filter.tie_out"])
    # Filtered to the k largest, of which the k-th is met several times: at most that many survive.
    tied = jnp.asarray(case["filter.tie_logits"])
    least = np.where(recorded, case["filter.tie_logits"], np.inf).min(-1, keepdims=True)
    above = int((case["filter.tie_logits"] > least).sum(-1).max())
    out = filtered(tied, Knobs(top_k=above + 1).as_arrays())
    yield "filter.tie_out", out
    kept = np.isfinite(out).sum(-1)
    yield "filter.tie_kept", kept


def _resampling(case: Case) -> Outputs:
    for name in fnmatch.filter(case.io, "unit.T*.area_*"):
        found = re.fullmatch(r"unit\.T(\d+)\.area_(\d+)", name)
        assert found is not None
        side, small = int(found[1]), int(found[2])
        shrink, enlarge = area_matrix(side, small), bicubic_matrix(small, side)
        reduced = shrink @ case[f"unit.T{side}.full"] @ shrink.T
        yield name, reduced
        yield f"unit.T{side}.bicubic_{small}", enlarge @ reduced @ enlarge.T
