"""What the golden cases of RandAR, ARPG and PAR have in common: one transformer, no tokenizer."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Cond, System
from ar_jax.build import build_schedule, build_system
from ar_jax.convert.parity.case import Case
from ar_jax.convert.parity.compare import Outputs
from ar_jax.convert.parity.readings import corner, find_key, loss_and_gradient, norms, said
from ar_jax.convert.parity.stand_in import stand_in, stand_in_params
from ar_jax.convert.parity.stepwise import stepwise_logits, teacher_forced
from ar_jax.convert.part import Part, empty_params
from ar_jax.convert.places import official_tensor
from ar_jax.sampling.guidance import Guidance
from ar_jax.schedules import Schedule

# Of the official code.
NORM_EPSILON, ROPE_BASE, LABEL_DROPOUT = 1e-5, 10_000, 0.1


@dataclasses.dataclass(frozen=True)
class Model:
    """A case and our system with its weights, and a stand-in for a tokenizer."""

    case: Case
    system: System
    params: dict[str, Any]  # {'tokenizer', 'backbone', 'head'}
    part: Part
    codes: jax.Array  # int32 [B, L], cell after cell

    def __getitem__(self, name: str) -> np.ndarray:
        return self.case[name]

    @property
    def settings(self) -> dict[str, Any]:
        """Of sampling."""
        return self.case.spec.get("sampling", {})

    @property
    def cond(self) -> Cond:
        """The labels."""
        return {"label": jnp.asarray(self["labels"], jnp.int32)}

    @property
    def dropped(self) -> Cond:
        """The labels, those null that the recorded draws drop."""
        net = self.case.spec["config"]
        drop = jnp.asarray(self["drop_u"] < net.get("class_dropout_prob", LABEL_DROPOUT))
        return self.system.backbone.conditioner.null(self.cond, drop)

    def order(self, name: str = "order") -> jax.Array:
        """int32 [B, L], a recorded order of each sample or of all."""
        return jnp.broadcast_to(jnp.asarray(self[name], jnp.int32), self.codes.shape)

    @functools.cached_property
    def loss_and_gradient(self) -> Any:
        """(cond, order) -> ((loss, metrics), gradient) of our objective; compiled once."""
        return loss_and_gradient(self.system, self.params, self.codes)

    def logits(self, order: jax.Array | None, codes: jax.Array | None = None) -> jax.Array:
        """Teacher forcing [B, L, V], in the order; ``codes`` are in it, by default the case's."""
        if codes is None:
            assert order is not None
            codes = jnp.take_along_axis(self.codes, order, axis=1)
        run = jax.jit(functools.partial(teacher_forced, self.system))
        return run(self.params, self.cond, codes, order)

    def with_schedule(self, section: dict[str, Any]) -> System:
        """The system with another schedule, which has no parameters."""
        schedule = build_schedule({"schedule": section})
        backbone = self.system.backbone.clone(schedule=schedule)
        return dataclasses.replace(self.system, schedule=schedule, backbone=backbone)

    def drawn_from(
        self, system: System, codes: jax.Array, order: jax.Array | None, guidance: Guidance
    ) -> jax.Array:
        """The cached logits [B, L, V] that codes [B, L] were drawn from, both in the order."""
        scales = guidance.scales(system.schedule.num_steps, system.schedule.known)
        guided = jnp.asarray(scales) if (scales != 1).any() else None
        return stepwise_logits(system, self.params, self.cond, codes, guided, order)[0]


def load(case: Case, family: Any, codes: np.ndarray, **more: Any) -> Model:
    """Our system with the case's weights; raises ValueError where its config and shapes differ.

    Args:
        family: the module that converts it.
        codes: the case's, int [B, L], cell after cell.
        more: further options of the converter.
    """
    net = case.spec["config"]
    side = math.isqrt(net["block_size"])
    if side**2 != net["block_size"]:
        raise ValueError(f"{case.name}: block_size is {net['block_size']}, which is no square")
    options = said(
        net,
        width="dim",
        depth="n_layer",
        heads="n_head",
        codebook_size="vocab_size",
        num_classes="num_classes",
        label_dropout="class_dropout_prob",
    )
    options |= dict(
        grid=side,
        norm_epsilon=net.get("norm_eps", NORM_EPSILON),
        rope_base=net.get("rope_base", ROPE_BASE),
    )
    part = family.generator(case.shapes("transformer"), options | more)
    size = part.section["head"]["vocab_size"]
    tokenizer = stand_in((side, side), name="vq", codebook_size=size)
    config = {"dtype": "float32", **tokenizer, **part.section}
    params = case.params("transformer", part, empty_params(config, "generator"))
    params["tokenizer"] = stand_in_params(config)
    return Model(case, build_system(config), params, part, jnp.asarray(codes, jnp.int32))


def losses(model: Model, order: jax.Array | None, others: dict[str, str]) -> Outputs:
    """The loss, its gradients and that with the recorded draws' labels dropped.

    ``others``: what names of recorded gradients mean that are no official keys.
    """
    case, places = model.case, model.part.places
    (loss, _), gradient = model.loss_and_gradient(model.cond, order)
    yield "loss", loss
    if "grad_norms" in case.io:
        keys = case.spec["transformer"]["grad_norm_keys"]
        yield "grad_norms", norms(places, gradient, keys)
    if "loss_dropped" in case.io:
        yield "loss_dropped", model.loss_and_gradient(model.dropped, order)[0][0]
    for name, found in case.names("grad_(?!norms$)(.+)"):
        if found[1] not in others or others[found[1]] in places:
            key = find_key(places, found[1], others)
            yield name, corner(official_tensor(places, gradient, key), case[name])


def group_sizes(schedule: Schedule) -> np.ndarray:
    """Codes of every step, int32 [S]."""
    return np.asarray(schedule.sizes, np.int32)
