"""Golden cases of MaskGIT's decoding: mask schedules, decode loops over toy logits, masked losses.

No network: the sampler's program is run with a backbone whose hidden states are the case's toy
logits, and a head that leaves them as they are.

The reference counts masks in compiled float32, where a whole number may come out just below itself.
Ours are exact. Such an entry of the reference is taken where ours, one unit of float32 lower, would
be it; `sched_disagreements` must list every one. Decode loops are run with what was so taken.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax import schedules
from ar_jax.api import System
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs, Section
from ar_jax.heads.categorical import CategoricalHead
from ar_jax.mask_rule import MaskRule
from ar_jax.objectives.masked_codes import HidingDraws, MaskedCodes
from ar_jax.sampling.confidence import (
    ConfidenceNoise,
    Iterations,
    draw_steps,
    least_confident,
)
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.guidance import Guidance
from ar_jax.sampling.kept import Kept

NOT_APPLICABLE: Mapping[str, str] = {}
INPUTS: tuple[str, ...] = ("tab_*", "topk_probs", "topk_masklen", "topk_noise")
INPUTS += ("?_*_input", "?_*_noise", "?_*_u", "ce_logits", "ce_targets", "ce_mask")
INPUTS += ("mask_tokens", "mask_t_u", "mask_perm_u")
EXACT = 1e-9  # slack of ours
ROUNDED = -1e-6  # and, times the number of codes, of what float32 may round to

# Official names of guidance over the iterations -> ours, and how much our scale is above theirs:
# they add theirs times (cond - null) to cond, but of 'power-cosine' to null, as we do.
GUIDANCE = {
    "constant": ("constant", 1.0),
    "linear": ("linear_below", 1.0),
    "power-cosine": ("power_cosine", 0.0),
}
# The official function's defaults.
TITOK = dict(
    guidance_scale=3.0,
    guidance_decay="constant",
    guidance_scale_pow=3.0,
    randomize_temperature=4.5,
    softmax_temperature_annealing=False,
    num_sample_steps=8,
)


def inputs(case: Case) -> Sequence[str]:
    """Where the README has no column of roles."""
    return INPUTS


def sections(case: Case) -> Iterable[Section]:
    """Schedules, the choice, decode loops, masks and losses."""
    config = case.spec["config"]
    yield Section(("sched_*",), lambda: _schedules(case))
    yield Section(("topk_mask_t*",), lambda: _choices(case))
    for name, run in config.get("google", {}).items():
        yield Section((f"g_{name}_*",), lambda name=name, run=run: _google(case, name, run))  # type: ignore[misc]
    for name, run in config.get("titok", {}).items():
        yield Section((f"t_{name}_*",), lambda name=name, run=run: _titok(case, name, run))  # type: ignore[misc]
    yield Section(("mask_*",), lambda: _masks(case))
    yield Section(("ce_*",), lambda: _losses(case))


def _schedules(case: Case) -> Outputs:
    config = case.spec["config"]
    pairs = [(length, steps) for length in config["sched_L"] for steps in config["sched_steps"]]
    width = max(config["sched_steps"])

    def rows(method: str, slack: float, kind: str = "lengths") -> np.ndarray:
        """One of `MaskRule`'s tables of all pairs, padded by -1; the slack in codes of each."""
        rule = [MaskRule(method=method, slack=_slack(slack, length)) for length, _ in pairs]
        found = [getattr(one, kind)(*pair) for one, pair in zip(rule, pairs, strict=True)]
        return np.stack([np.pad(row, (0, width - len(row)), constant_values=-1) for row in found])

    differing = []
    for index, method in enumerate(config["methods"]):
        exact, name = rows(method, EXACT), f"sched_{method}_masklen"
        yield f"sched_{method}_ideal", exact
        yield name, _as_rounded(case[name], exact, rows(method, ROUNDED))
        for row, step in np.argwhere(case[name] != exact):
            found = (case[name][row, step], exact[row, step])
            differing.append((index, *pairs[row], step, *found))
    yield "sched_disagreements", np.array(differing, np.int32).reshape(-1, 6)
    yield "sched_arccos_floor", rows("arccos", 0.0, "floors")
    yield "sched_arccos_masklen", rows("arccos", 0.0)


def _slack(slack: float, length: int) -> float:
    return slack * length if slack < 0 else slack


def _as_rounded(recorded: np.ndarray, exact: np.ndarray, lower: np.ndarray) -> np.ndarray:
    """``exact``, or ``lower`` where that was recorded."""
    return np.where(recorded == lower, lower, exact)


def _choices(case: Case) -> Outputs:
    noise = jnp.asarray(case["topk_noise"])
    sure = jnp.log(jnp.asarray(case["topk_probs"]))
    lengths = jnp.asarray(case["topk_masklen"][:, 0])
    for name, found in case.names(r"topk_mask_t(.+)"):
        yield name, least_confident(sure, noise, jnp.float32(float(found[1])), lengths)


@dataclasses.dataclass(frozen=True)
class ToyBackbone:
    """The README's toy logits; its parameters are the case's tables.

    Attributes:
        vocab_size: V.
        num_classes: the label that is no class.
        class_token: whether the label stands before the codes, or has a table of its own.
    """

    vocab_size: int
    num_classes: int
    class_token: bool

    @property
    def conditioner(self) -> ToyBackbone:
        """Itself: whose `null` makes labels none."""
        return self

    def null(self, cond: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The condition without a class."""
        return {"label": jnp.full_like(cond["label"], self.num_classes)}

    def apply(self, variables: Any, codes: Any, cond: Any, known: Any) -> jax.Array:
        """Logits float32 [B, L, V]."""
        tables, rows = variables["params"], jnp.where(known, codes, -1) + 1
        first = 0 if self.class_token else 1
        if self.class_token:
            rows = jnp.concatenate([self.vocab_size + cond["label"][:, None] + 1, rows], axis=1)
        logits = tables["pos"][None, first : first + rows.shape[1]]
        logits = logits + tables["left"][jnp.roll(rows, 1, axis=1)]
        logits = logits + tables["right"][jnp.roll(rows, -1, axis=1)]
        if self.class_token:
            return logits[:, 1:]
        return logits + tables["cls"][cond["label"]][:, None]


def _draw(
    case: Case,
    backbone: ToyBackbone,
    lengths: np.ndarray,  # [B, S]
    noise: tuple[np.ndarray, np.ndarray],
    knobs: Knobs,
    scales: np.ndarray,
    start: int = 0,
    kept: Kept | None = None,
) -> Iterations:
    config, size = case.spec["config"], backbone.vocab_size
    system = System(
        tokenizer=None,
        schedule=schedules.masked(grid=(1, config["L"]), iterations=1),
        backbone=backbone,
        head=CategoricalHead(vocab_size=size, bias=False, init_std=0.0),
    )
    tables = {part: jnp.asarray(case[f"tab_{part}"]) for part in ("pos", "left", "right", "cls")}
    return draw_steps(
        system,
        {"backbone": tables, "head": {"kernel": jnp.eye(size)}},
        {"label": jnp.asarray(config["labels"], jnp.int32)},
        None,
        knobs.as_arrays(),
        jnp.asarray(scales, jnp.float32),
        jnp.asarray(lengths.T, jnp.int32),
        ConfidenceNoise(*map(jnp.asarray, noise)),
        kept,
        guided=bool(np.any(scales != 1)),
        start=start,
    )


def _google(case: Case, name: str, run: Mapping[str, Any]) -> Outputs:
    """MaskGIT's own loop; its sequences begin with the class, and a hidden code is -1."""
    config, start = case.spec["config"], run["start"]
    given = case[f"g_{name}_input"]
    hidden = (given[:, 1:] < 0).sum(1)
    iterations = run["iters"]
    tables = [
        MaskRule(method=run["method"], slack=slack).lengths(hidden, iterations, start)
        for slack in (EXACT, ROUNDED * config["L"])
    ]
    lengths = _as_rounded(case[f"g_{name}_masklen"], *tables)
    yield f"g_{name}_masklen", lengths
    choice = case[f"g_{name}_choice_noise"][:, :, 1:]
    drawing = f"g_{name}_cat_noise" in case.io  # a greedy run draws nothing
    shape = (*choice.shape, config["V"])
    codes = case[f"g_{name}_cat_noise"][:, :, 1:] if drawing else np.zeros(shape, np.float32)
    steps = _draw(
        case,
        ToyBackbone(config["V"], config["ncls"], class_token=True),
        lengths,
        (codes, choice),
        Knobs(temperature=float(drawing), choice_temperature=run["temp"]),
        np.ones(iterations),
        start,
        Kept(codes=jnp.asarray(given[:, 1:]), keep=jnp.asarray(given[:, 1:] >= 0)),
    )

    def with_class(codes: Any) -> np.ndarray:  # [B, S, L] -> [B, S, L + 1]
        first = np.broadcast_to(given[:, None, :1], (*codes.shape[:2], 1))
        return np.concatenate([first, codes], axis=2)

    yield f"g_{name}_step_inputs", with_class(jnp.where(steps.known, steps.fed, -1))
    before = np.repeat(given[:, None], start, axis=1)
    yield f"g_{name}_final_seqs", np.concatenate([before, with_class(steps.drawn)], axis=1)


def _titok(case: Case, name: str, run: Mapping[str, Any]) -> Outputs:
    """1d-tokenizer's loop; a hidden code is V.

    Raises:
        ValueError: the official code has no such decay of guidance.
    """
    config, said = case.spec["config"], {**TITOK, **run}
    decay = said["guidance_decay"]
    if decay not in GUIDANCE:
        raise ValueError(
            f"{case.name}: guidance_decay of {name!r} is {decay!r}; the official code has "
            f"{', '.join(GUIDANCE)}"
        )
    kind, above = GUIDANCE[decay]
    strength = said["guidance_scale"] + above
    guidance = Guidance(scale=strength, kind=kind, power=said["guidance_scale_pow"])
    iterations = said["num_sample_steps"]
    scales = guidance.scales(iterations)
    # A step whose official scale is 0 has no unconditional call.
    yield f"t_{name}_uncond_calls", np.count_nonzero(scales != above)
    annealed = 0.5 + 0.8 * (1 - np.arange(1, iterations + 1) / iterations)
    steps = _draw(
        case,
        ToyBackbone(config["V"], config["ncls"], class_token=False),
        MaskRule(method="arccos").lengths(np.full(config["batch"], config["L"]), iterations),
        (_gumbel(case[f"t_{name}_logit_u"]), _gumbel(case[f"t_{name}_conf_u"])),
        Knobs(
            step_temperatures=tuple(annealed) if said["softmax_temperature_annealing"] else (),
            choice_temperature=said["randomize_temperature"],
            confidence="logit",
        ),
        scales,
    )
    yield f"t_{name}_final", steps.drawn[:, -1]
    yield f"t_{name}_step_inputs", jnp.where(steps.known, steps.fed, config["V"])


def _gumbel(uniform: np.ndarray) -> np.ndarray:
    """The noise that the official code makes of uniform draws."""
    inner = -np.log(np.maximum(uniform, np.float32(1e-20)))
    return -np.log(np.maximum(inner, np.float32(1e-20)))


def _objective(case: Case, **fields: Any) -> MaskedCodes:
    head = CategoricalHead(vocab_size=case.spec["config"]["V"], bias=False, init_std=0.0)
    schedule = schedules.masked(grid=(1, case.spec["config"]["L"]), iterations=1)
    system = System(tokenizer=None, schedule=schedule, backbone=None, head=head)
    return MaskedCodes(system=system, **fields)


def _masks(case: Case) -> Outputs:
    draws = HidingDraws(*(jnp.asarray(case[name]) for name in ("mask_t_u", "mask_perm_u")))
    hidden = jax.jit(_objective(case, method="arccos").hide)(draws)
    yield "mask_mask", hidden
    yield "mask_masked", jnp.where(hidden, case.spec["config"]["V"], case["mask_tokens"])


def _losses(case: Case) -> Outputs:
    config, smoothing = case.spec["config"], case.spec["config"]["smoothing"]
    targets, hidden = jnp.asarray(case["ce_targets"]), jnp.asarray(case["ce_mask"]) > 0
    conventions: dict[str, Any] = {
        "google": dict(per_image=True),
        "titok": dict(per_image=False, seen_weight=config["unmasked_w"]),
    }
    for name, fields in conventions.items():
        objective = _objective(case, label_smoothing=smoothing, **fields)

        def score(logits: jax.Array) -> Any:
            return objective.score(logits, targets, hidden)  # noqa: B023

        scored = jax.jit(jax.value_and_grad(score, has_aux=True))
        (loss, aux), gradient = scored(jnp.asarray(case["ce_logits"]))
        yield f"ce_{name}", loss
        yield f"ce_{name}_correct", aux.metrics["accuracy"]
        yield f"ce_{name}_grad", gradient[:, ::4]
