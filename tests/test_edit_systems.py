"""Editing with every generator of configs/fashion_mnist: none of them has to refuse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.build import build_objective, create_sampler
from ar_jax.objectives.likelihood import init_tokenizer
from ar_jax.sampling.edit import Edited, code_mask, edit
from ar_jax.sampling.filters import Knobs
from ar_jax.sampling.loop import image_keys
from tests.config_files import FILES, Case

GENERATORS = [
    Case(file, "smoke")
    for file in FILES
    if file.startswith("configs/fashion_mnist/") and not Path(file).stem.startswith("tokenizer_")
]
# Its sampler looks at what is kept, so that nothing traces it: test_sampling_edit.py edits with it.
GENERATORS.remove(Case("configs/fashion_mnist/maskgit.py", "smoke"))
# By default test_sampling_edit.py stands for the others, which it has of their kind.
SHOWN = ("xar", "flowar", "fractal", "infinity", "token_shuffle")
BATCH = 2


@pytest.fixture
def concrete_knobs(monkeypatch) -> None:
    """Knobs stay numbers while a sampler is traced, which looks at their values."""
    as_arrays = Knobs.as_arrays

    def numbers(self: Knobs) -> Knobs:
        with jax.ensure_compile_time_eval():
            made: Knobs = jax.tree.map(np.asarray, as_arrays(self))
        return made

    monkeypatch.setattr(Knobs, "as_arrays", numbers)


def marks(case: Case) -> Any:
    return () if Path(case.file).stem in SHOWN else pytest.mark.slow


@pytest.mark.parametrize(
    "case", [pytest.param(case, id=str(case), marks=marks(case)) for case in GENERATORS]
)
def test_every_generator_edits(case, concrete_knobs):
    """Traced with the default sampling. The samplers' tests show that kept codes stay."""
    objective: Any = build_objective(case.config)
    system = objective.system
    shape = (BATCH, *system.tokenizer.image_shape)
    mask = np.zeros(shape[1:3], bool)
    mask[len(mask) // 2 :] = True

    def run(key: jax.Array, images: jax.Array) -> Edited:
        params = objective.init(key) | {"tokenizer": init_tokenizer(system, key)}
        cond = {"label": jnp.zeros((BATCH,), jnp.int32)}
        return edit(create_sampler(system, params), images, mask, cond, image_keys(0, 0, BATCH))

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    made = jax.eval_shape(run, jax.random.key(0), images)
    codes = (BATCH, *system.tokenizer.codes_shape)
    assert made.samples.codes.shape == made.given.shape == codes
    assert made.samples.images.shape == shape and made.keep.shape == codes[:2]
    assert 0.2 < code_mask(system.schedule, mask[None]).mean() < 0.8
