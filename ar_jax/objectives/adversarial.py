"""Adversarial training: a discriminator's losses and those of what it judges.

Real and fake images are judged in calls of their own, so that batch statistics do not mix them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ar_jax.api import Array, Params, Stats
from ar_jax.objectives.ranges import check_decay, check_weight

# (logits of real images, of fake ones) -> scalar.
DISCRIMINATOR_LOSSES: dict[str, Callable[[Array, Array], Array]] = {
    "hinge": lambda real, fake: (jax.nn.relu(1 - real).mean() + jax.nn.relu(1 + fake).mean()) / 2,
    "vanilla": lambda real, fake: (
        (jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()) / 2
    ),
    "non_saturating": lambda real, fake: (
        jax.nn.softplus(-real).mean() + jax.nn.softplus(fake).mean()
    ),
    "swapped": lambda real, fake: (_swapped(1.0, real).mean() + _swapped(0.0, fake).mean()) / 2,
}
# Logits of fake images -> scalar. 'vanilla' is the minimax game's own, which saturates.
GENERATOR_LOSSES: dict[str, Callable[[Array], Array]] = {
    "hinge": lambda fake: -fake.mean(),
    "vanilla": lambda fake: -jax.nn.softplus(fake).mean(),
    "non_saturating": lambda fake: jax.nn.softplus(-fake).mean(),
    "swapped": lambda fake: _swapped(1.0, fake).mean(),
}
# Of every autoencoder in ar_jax/tokenizers: what the adaptive weight goes by.
LAST_LAYER = "autoencoder/decoder/conv_out/kernel"
# Keeps the adaptive weight finite where no gradient comes from the discriminator.
ADAPTIVE_EPSILON = 1e-4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adversary:
    """See `ar_jax.api.Adversary`.

    Attributes:
        discriminator: a Linen module of `ar_jax.nn.discriminators`.
        image_shape: (H, W, C).
        weight: of the generator's adversarial loss, from ``warmup_steps`` after its start on.
        start: completed steps from which on the discriminator trains and is heard; before, neither
            it nor its optimiser changes.
        warmup_steps: in which the weight grows linearly; 0: it is there at once, as officially.
        loss: the discriminator's, one of `DISCRIMINATOR_LOSSES`.
        generator_loss: one of `GENERATOR_LOSSES`.
        adaptive: the weight is multiplied by `balance` of the gradients (arXiv:2012.09841).
        max_adaptive: largest factor that `balance` gives.
        lecam: weight of the discriminator's regulariser (arXiv:2104.03310).
        lecam_decay: of the running means of the logits that it holds on to.
    """

    discriminator: Any
    image_shape: tuple[int, int, int]
    weight: float
    start: int = 0
    warmup_steps: int = 0
    loss: str = "hinge"
    generator_loss: str = "hinge"
    adaptive: bool = False
    max_adaptive: float = 1e4
    lecam: float = 0.0
    lecam_decay: float = 0.999

    def __post_init__(self) -> None:
        for field in ("weight", "start", "warmup_steps", "lecam"):
            check_weight(f"adversarial.{field}", getattr(self, field))
        check_decay("adversarial.lecam_decay", self.lecam_decay)
        if problem := self.discriminator.problem(self.image_shape):
            raise ValueError(f"objective.adversarial.discriminator.{problem}")
        if not self.max_adaptive > 0:
            raise ValueError(
                f"objective.adversarial.max_adaptive is {self.max_adaptive}; it must be > 0"
            )

    def init(self, key: Array) -> tuple[Params, Stats]:
        """See `ar_jax.api.Adversary`; the statistics are the norms' and the logits' means."""
        images = jnp.zeros((1, *self.image_shape), jnp.float32)
        variables = self.discriminator.init(key, images)
        means = {"real": jnp.zeros((), jnp.float32), "fake": jnp.zeros((), jnp.float32)}
        return variables["params"], {"norms": variables.get("batch_stats", {}), "logits": means}

    def weight_at(self, step: Array | int) -> Array:
        """Weight of the generator's loss in a step, float32, without the adaptive factor."""
        done = jnp.asarray(step, jnp.float32) - self.start
        ramp = jnp.clip((done + 1) / max(self.warmup_steps, 1), 0.0, 1.0)
        return self.weight * jnp.where(done >= 0, ramp, 0.0)

    def deceive(self, params: Params, stats: Stats, fake: Array) -> tuple[Array, Stats]:
        """(generator's loss, unweighted; statistics after this call) of images [B, H, W, C]."""
        logits, norms = self._logits(params, stats["norms"], fake)
        return GENERATOR_LOSSES[self.generator_loss](logits), stats | {"norms": norms}

    def judge(
        self, params: Params, stats: Stats, real: Array, fake: Array
    ) -> tuple[Array, tuple[Stats, dict[str, Array]]]:
        """(discriminator's loss, (statistics after it, metrics)) of images [B, H, W, C]."""
        on_real, norms = self._logits(params, stats["norms"], real)
        on_fake, norms = self._logits(params, norms, fake)
        loss = DISCRIMINATOR_LOSSES[self.loss](on_real, on_fake)
        means = {"real": on_real.mean(), "fake": on_fake.mean()}
        metrics = {
            "discriminator/real_logit": means["real"],
            "discriminator/fake_logit": means["fake"],
            "discriminator/accuracy": ((on_real > 0).mean() + (on_fake < 0).mean()) / 2,
        }
        if self.lecam:
            penalty = lecam(means, stats["logits"])
            loss = loss + self.lecam * penalty
            metrics["discriminator/lecam"] = penalty
        decay = self.lecam_decay
        logits = {
            name: decay * old + (1 - decay) * jax.lax.stop_gradient(means[name])
            for name, old in stats["logits"].items()
        }
        return loss, ({"norms": norms, "logits": logits}, metrics)

    def balance(self, plain: Array, adverse: Array) -> Array:
        """Factor of the weight, from two gradients of the generator's last layer, float32.

        |gradient of its other losses| / |gradient of the adversarial one|, at most
        ``max_adaptive``: where the discriminator has nothing to say it would grow without end.
        """
        lengths = [jnp.linalg.norm(g.astype(jnp.float32).ravel()) for g in (plain, adverse)]
        return jnp.clip(lengths[0] / (lengths[1] + ADAPTIVE_EPSILON), 0.0, self.max_adaptive)

    def _logits(self, params: Params, norms: Stats, images: Array) -> tuple[Array, Stats]:
        variables = {"params": params, "batch_stats": norms}
        logits, mutated = self.discriminator.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return logits, mutated.get("batch_stats", norms)


def _swapped(target: float, logits: Array) -> Array:
    """What LlamaGen calls non-saturating: cross entropy with logits and targets interchanged.

    Linear in the logits, and of a target of 0 independent of them: only for runs like its own.
    """
    return jax.nn.softplus(target) - target * logits


def lecam(means: dict[str, Array], running: dict[str, Array]) -> Array:
    """LeCam's regulariser: how far mean logits lie beyond the other kind's running mean, squared.

    Args:
        means: 'real' and 'fake', of the logits of this step.
        running: the same, running means of the steps before.
    """
    above = jax.nn.relu(means["real"] - running["fake"])
    below = jax.nn.relu(running["real"] - means["fake"])
    return jnp.square(above) + jnp.square(below)
