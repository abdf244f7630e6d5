"""The likelihood of continuous codes along the order of a sampler, and its section of a report."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ar_jax.api import Params, System
from ar_jax.evaluation.coding import coded_batches
from ar_jax.evaluation.measure import Evaluation
from ar_jax.evaluation.report import metric
from ar_jax.sampling.loop import draw_order, image_keys
from ar_jax.sampling.set_likelihood import log_prob

COUNT = 500  # test images; each costs as many passes as the sampler has iterations


def order_likelihood_section(
    system: System, params: Params, evaluation: Evaluation
) -> dict[str, Any]:
    """Measured on test images, one order and one draw of their latents each."""
    nats, count = measure_nats(system, params, evaluation)
    numbers = int(np.prod(system.tokenizer.codes_shape))
    how = (
        f"latents drawn from their posteriors, {count:,} test images with their classes, one "
        f"random order of {system.schedule.num_steps} iterations each, no guidance"
    )
    return {
        "title": "Likelihood along the sampler's order",
        "about": "How dense the latents of test images are under what the sampler draws in a given "
        "order. On average over orders that is an upper bound of their negative log-likelihood. It "
        "is a density, of latents as this tokenizer scales them: compare runs of one tokenizer.",
        "metrics": {
            "nats_per_image": metric(nats, f"negative log-density; {how}"),
            "nats_per_number": metric(
                nats / numbers, f"the same divided by the {numbers} numbers of an image"
            ),
        },
        "tables": {},
        "pictures": {},
    }


def measure_nats(system: System, params: Params, evaluation: Evaluation) -> tuple[float, int]:
    """(mean negative log-density of an image in nats, images)."""
    tokenizer, total, count = system.tokenizer, 0.0, 0

    @jax.jit
    def score(params: Params, encoding: jax.Array, label: jax.Array, keys: jax.Array) -> jax.Array:
        order = draw_order(keys, system.schedule.length)
        noise = jax.vmap(lambda key: jax.random.normal(
            jax.random.fold_in(key, 1), tokenizer.codes_shape
        ))(keys)  # fmt: skip
        variables = {"params": params["tokenizer"]}
        codes = tokenizer.apply(variables, encoding, noise, method="codes_of")
        return -log_prob(system, params, {"label": label}, codes, order)

    for batch in coded_batches(
        tokenizer,
        params["tokenizer"],
        evaluation.data["test"],
        batch_size=evaluation.batch_size,
        limit=COUNT,
        title=evaluation.title("likelihood of test images"),
    ):
        keys = image_keys(evaluation.seed, count, len(batch["label"]))
        nats = score(params, jnp.asarray(batch["codes"]), jnp.asarray(batch["label"]), keys)
        real = np.asarray(batch["mask"]) > 0
        total += float(np.asarray(nats)[real].sum(dtype=np.float64))
        count += int(real.sum())
    return total / count, count
