"""The best checkpoint is kept beside the newest, found again, and not lost to a failed save."""

from __future__ import annotations

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from ar_jax.io.best_checkpoint import Best, best_step, choose_best
from ar_jax.io.checkpoint import list_steps, load_params
from ar_jax.io.run_checkpoints import Checkpoints
from ar_jax.train.fields import TrainFields

TRAIN = {"best_metric": "eval/psnr", "best_mode": "max"}


def parts(step: int) -> dict[str, dict[str, jnp.ndarray]]:
    return {"params": {"kernel": jnp.full(4, float(step))}}


def test_the_best_outlives_the_newest(tmp_path):
    best = Best("eval/psnr", "max")
    store = Checkpoints(tmp_path, keep=1, best=best)
    kept = []
    for step, psnr in ((1, 20.0), (2, math.nan), (3, 25.0), (4, 24.0), (5, None), (6, 25.0)):
        scores = None if psnr is None else {"eval/psnr": psnr, "eval/loss": 1.0}
        if scores:
            assert store.would_be_best(scores) == (step in (1, 3))
        store.save(step, parts(step), scores=scores)
        store.wait()
        kept.append(list_steps(tmp_path))
    # An earlier best stays until a better one is on disk; of equal ones the first is the best.
    assert kept == [[1], [1, 2], [1, 3], [3, 4], [3, 5], [3, 6]]
    assert best_step(tmp_path, TRAIN) == 3
    np.testing.assert_array_equal(load_params(tmp_path, "params", 3)["kernel"], 3.0)
    store.close()

    again = Checkpoints(tmp_path, keep=1, best=best)  # a restart knows what was best
    assert not again.would_be_best({"eval/psnr": 24.5})
    with pytest.raises(ValueError, match=r"'eval/psnr' is none of .*: eval/loss$"):
        again.would_be_best({"eval/loss": 1.0})

    def fail(*args, **kwargs):
        raise OSError("no space left")

    again._checkpointer.save_checkpointables_async = fail
    again.save(7, parts(7), scores={"eval/psnr": 30.0})
    assert again.failed_saves == 1
    assert again.would_be_best({"eval/psnr": 26.0})  # 30 dB are not on disk
    again.save(8, parts(8))
    again.wait()
    assert list_steps(tmp_path) == [3, 8]
    again.close()


def test_what_is_refused(tmp_path):
    with pytest.raises(ValueError, match="best_metric='', so none"):
        best_step(tmp_path, {"best_metric": ""})
    with pytest.raises(ValueError, match=r"has a finite eval/psnr yet"):
        best_step(tmp_path, TRAIN)
    fields: Any = dict(steps=1, batch_size=1, log_every=1, preview_every=0, checkpoint_every=1)
    with pytest.raises(ValueError, match="config.train.eval_every=0 makes none"):
        TrainFields(**fields, eval_every=0, best_metric="eval/loss")
    with pytest.raises(ValueError, match=r"best_mode='most' is none of 'min', 'max'"):
        TrainFields(**fields, eval_every=1, best_mode="most")
    TrainFields(**fields, eval_every=0)
    assert choose_best("", "max") is None
