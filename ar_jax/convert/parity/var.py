"""VAR's golden cases: every recorded output as our code computes it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import System
from ar_jax.build import build_system
from ar_jax.convert import var
from ar_jax.convert.parity import var_tokenizer
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section, with_model
from ar_jax.convert.parity.readings import (
    block_states,
    corner,
    named_gradients,
    nchw,
    recorded_part,
    said,
)
from ar_jax.convert.parity.stepwise import teacher_forced
from ar_jax.convert.part import Part, empty_params
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.nn.resize import area_matrix, bicubic_matrix
from ar_jax.objectives.likelihood import Likelihood
from ar_jax.sampling.filters import Knobs, truncate
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.loop import decode_features, draw_steps, image_keys

NOT_APPLICABLE: dict[str, str] = {}
GUIDANCE = 1.5  # official default
TIE = 5  # of `filter.tie_*`, in the cases' README
# The READMEs' limits on the relative norm, the first that fits.
LIMITS = {
    "filter.*": 1e-6,
    "unit.*": 1e-6,
    "grad.norms": 2e-4,
    "grad.*scale_mul*": 5e-4,
    "*": 5e-5,
}
# Recorded means and other summaries -> what they sum up.
SUMS = {
    "vqtrain.vq_loss": "tok.f",
    "vqtrain.total_loss": "tok.f",
    "tf.hidden_rms": "tf.hidden",
    "grad.loss": "tf.logits_cond",
}


def inputs(case: Case) -> tuple[str, ...]:
    """See `ar_jax.convert.parity.compare.Family`."""
    return (
        *("image_u8", "label", "unit.T*.full", "filter.logits", "filter.kp", "filter.tie_logits"),
        *(f"{run}.{noise}" for run in _runs(case) for noise in ("gumbel", "gumbel_soft")),
    )


def summarised(name: str) -> str | None:
    """The array that a recorded mean, deviation or loss sums up."""
    for end in ("_mean", "_std"):
        if name.endswith((f".image{end}", f".recon{end}")):
            return name.removesuffix(end)
    if name.startswith("tf.ce_"):
        return "tf.logits_null" if "_null" in name else "tf.logits_cond"
    return SUMS.get(name)


def limits(case: Case) -> dict[str, float]:
    """The relative limits that the READMEs suggest for a correct port.

    Of a smooth run it is wider: a softmax at temperature down to 0.0135 multiplies errors by more
    than a hundred.
    """
    smooth = [run for run, settings in _runs(case).items() if settings.get("more_smooth")]
    return {f"{run}.*": 1e-3 for run in smooth} | LIMITS


def sections(case: Case) -> list[Section]:
    """See `ar_jax.convert.parity.compare.Family`."""
    tokens = functools.cache(lambda: var_tokenizer.load(case))
    model = functools.cache(lambda: load(case, tokens()))
    runs = [Section((f"{run}.*",), with_model(_sampled, model, run)) for run in _runs(case)]
    return [
        *var_tokenizer.sections(tokens),
        Section(("tf.hidden", "tf.hidden_rms"), with_model(_hidden, model)),
        Section(("tf.logits_*", "tf.ce_*"), with_model(_logits, model)),
        Section(("grad.*",), with_model(_gradients, model)),
        *runs,
        Section(("filter.out",), lambda: _filters(case)),
        Section(("filter.tie_*",), lambda: _ties(case)),
        Section(("unit.*",), lambda: _resampling(case)),
    ]


def _runs(case: Case) -> dict[str, dict[str, Any]]:
    """Name of a sampling run -> its settings."""
    return case.spec.get("config", {}).get("sampling", {})


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    tokens: var_tokenizer.Tokens
    generator: Part

    @property
    def cond(self) -> dict[str, jax.Array]:
        """The labels."""
        return {"label": jnp.asarray(self.case["label"], jnp.int32)}

    @functools.cached_property
    def teacher_forced(self) -> Any:
        """(cond, codes) -> logits; compiled once."""
        run = jax.jit(functools.partial(teacher_forced, self.system))
        return functools.partial(run, self.params)


def load(case: Case, tokens: var_tokenizer.Tokens | None = None) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ."""
    tokens = var_tokenizer.load(case) if tokens is None else tokens
    net = case.config("transformer")
    section = tokens.part.section["tokenizer"]
    options = dict(scales=section["scales"], codebook_size=section["codebook_size"]) | said(
        net,
        scales="patch_nums",
        width="embed_dim",
        depth="depth",
        heads="num_heads",
        num_classes="num_classes",
        norm_epsilon="norm_eps",
        drop_path="drop_path_rate",
        label_dropout="cond_drop_rate",
    )
    generator = var.generator(case.shapes("transformer"), options)
    built = {"dtype": "float32", **tokens.part.section, **generator.section}
    fields = built["backbone"]
    for name, ours in (("shared_aln", "modulation"), ("attn_l2_norm", "qk_norm")):
        if name in net and net[name] != (fields[ours] in ("shared", "cosine")):
            raise ValueError(f"{case.name}: {name} is {net[name]}, the tensors say {fields[ours]}")
    params = case.params("transformer", generator, empty_params(built, "generator"))
    params["tokenizer"] = tokens.params
    return Model(case, build_system(built), params, tokens, generator)


def _hidden(model: Model) -> Outputs:
    hidden = np.stack(block_states(model.system, model.params, model.cond, model.tokens.codes))
    part = model.case.select("tf.hidden", hidden)
    yield "tf.hidden", corner(part, model.case.io.get("tf.hidden", part))
    yield "tf.hidden_rms", np.sqrt(np.square(hidden, dtype=np.float64).mean((1, 2, 3)))


def _logits(model: Model) -> Outputs:
    codes, conditioner = model.tokens.codes, model.system.backbone.conditioner
    for cond, name in ((model.cond, "cond"), (conditioner.null(model.cond), "null")):
        logits = model.teacher_forced(cond, codes)
        yield f"tf.logits_{name}", logits
        nll = CategoricalHead.loss(logits, codes)
        scales = [nll[:, part].mean() for part in model.tokens.ranges]
        yield f"tf.ce_scale_{name}", np.array(scales)
        yield f"tf.ce_mean_{name}", nll.mean()
        for smoothed, found in model.case.names(rf"tf\.ce_mean_{name}_ls([\d.e-]+)"):
            smoothing = float(found[1])
            loss = CategoricalHead.loss(logits, codes, label_smoothing=smoothing)
            yield smoothed, loss.mean()


def _gradients(model: Model) -> Outputs:
    objective = Likelihood(system=model.system, label_dropout=0.0)
    trained = {name: model.params[name] for name in ("backbone", "head")}
    batch = {"codes": model.tokens.codes, **model.cond}

    def loss(params: Any) -> jax.Array:
        return objective.loss(params, {}, model.params, batch, jax.random.key(0), False)[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    yield "grad.loss", value
    yield from named_gradients(model.case, "grad", model.generator.places, gradient, ".")


def _sampled(model: Model, run: str) -> Outputs:
    """The sampler itself, with what its head says at every step."""
    case, settings, schedule = model.case, _runs(model.case)[run], model.system.schedule
    smooth = settings.get("more_smooth", False)
    shape = (len(case["label"]), schedule.length, model.system.tokenizer.codebook_size)
    name = f"{run}.gumbel_soft" if smooth else f"{run}.gumbel"
    if name not in case.io and (smooth or settings.get("top_k", 0) != 1):
        raise ValueError(f"{case.name}: io.npz has no {name!r}, the run's noise")
    noise = case.io.get(name, np.zeros(shape, np.float32))  # of no effect with top_k 1
    knobs = Knobs(
        top_k=settings.get("top_k", 0), top_p=settings.get("top_p", 0.0), smooth=smooth
    ).as_arrays()
    strength = Guidance(kind="linear_excess", scale=settings.get("cfg", GUIDANCE))
    scales = strength.scales(schedule.num_steps)
    guided = bool((scales != 1).any())
    codes, f_hat, logits = _draw(model, knobs, jnp.asarray(scales), jnp.asarray(noise), guided)
    yield f"{run}.logits", logits
    for k, part in enumerate(model.tokens.ranges if not smooth else ()):
        yield f"{run}.idx_{k}", codes[:, part]
    yield f"{run}.fhat", nchw(f_hat)
    decoded = decode_features(model.system, model.params["tokenizer"], f_hat)
    image = (nchw(decoded) + 1) / 2
    yield f"{run}.image", recorded_part(case, f"{run}.image", image)
    yield f"{run}.image_mean", image.mean((2, 3), dtype=np.float64)
    yield f"{run}.image_std", image.std((2, 3), dtype=np.float64)


def _draw(model: Model, knobs: Knobs, scales: jax.Array, noise: jax.Array, guided: bool) -> tuple:
    backbone, unstacked = model.system.backbone.for_sampling(model.params["backbone"])
    system = dataclasses.replace(model.system, backbone=backbone)
    params = model.params | {"backbone": unstacked}
    return _draw_unrolled(system, params, model.cond, knobs, scales, noise, guided=guided)


@functools.partial(jax.jit, static_argnames=("system", "guided"))
def _draw_unrolled(
    system: System,
    params: Any,
    cond: Any,
    knobs: Knobs,
    scales: jax.Array,
    noise: jax.Array,
    *,
    guided: bool,
) -> tuple:
    """One program for all runs of a case: (codes [B, L], f_hat, guided logits [B, L, V])."""
    batch, seen = len(noise), list[jax.Array]()

    def record(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        out = call(*args, **kwargs)
        if isinstance(context.module, CategoricalHead) and context.method_name == "__call__":
            seen.append(out)
        return out

    with nn.intercept_methods(record):
        keys = image_keys(0, 0, batch)
        codes, f_hat = draw_steps(system, params, cond, keys, knobs, scales, noise, guided=guided)
    if guided:
        mixed = zip(seen, scales, strict=True)
        seen = [system.head.guide(both[:batch], both[batch:], s) for both, s in mixed]
    return codes, f_hat, jnp.concatenate(seen, axis=1)


def _filters(case: Case) -> Outputs:
    logits = jnp.asarray(case["filter.logits"])
    pairs = [Knobs(top_k=int(k), top_p=float(p)).as_arrays() for k, p in case["filter.kp"]]
    filtered = jax.jit(truncate)
    yield "filter.out", np.stack([filtered(logits, knobs) for knobs in pairs])


def _ties(case: Case) -> Outputs:
    """Filtered to the k largest, of which the k-th is met several times; k is not recorded."""
    logits, k = case["filter.tie_logits"], TIE
    if "filter.tie_out" in case.io:  # at most as many as survive, and all of them alike
        recorded = np.isfinite(case["filter.tie_out"])
        least = np.where(recorded, logits, np.inf).min(-1, keepdims=True)
        k = int((logits > least).sum(-1).max()) + 1
    out = jax.jit(truncate)(jnp.asarray(logits), Knobs(top_k=k).as_arrays())
    yield "filter.tie_out", out
    yield "filter.tie_kept", np.isfinite(out).sum(-1)


def _resampling(case: Case) -> Outputs:
    for name, found in case.names(r"unit\.T(\d+)\.(area|bicubic)_(\d+)"):
        side, small = int(found[1]), int(found[3])
        shrink, enlarge = area_matrix(side, small), bicubic_matrix(small, side)
        reduced = shrink @ case[f"unit.T{side}.full"] @ shrink.T
        yield name, reduced if found[2] == "area" else enlarge @ reduced @ enlarge.T
