"""The table of path patterns: what it gives for the parameters of the models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from ar_jax.parallel.mesh import make_mesh
from ar_jax.parallel.rules import Rule, check_coverage, partition, shardings

MESH: dict[str, Any] = {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        # A scanned stack has a leading axis, an unrolled one does not.
        (
            "backbone/stack/blocks/attention/query/kernel",
            (4, 64, 4, 16),
            P(None, "fsdp", "tensor", None),
        ),
        ("backbone/stack/blocks_0/attention/key/kernel", (64, 4, 16), P("fsdp", "tensor", None)),
        ("backbone/stack/blocks_0/attention/value/kernel", (64, 4, 16), P("fsdp", "tensor", None)),
        (
            "backbone/stack/blocks/attention/out/kernel",
            (4, 4, 16, 64),
            P(None, "tensor", None, "fsdp"),
        ),
        ("backbone/stack/blocks/mlp/up/kernel", (4, 64, 256), P(None, "fsdp", "tensor")),
        ("backbone/stack/blocks/mlp/gate/kernel", (64, 256), P("fsdp", "tensor")),
        ("backbone/stack/blocks/mlp/down/kernel", (4, 256, 64), P(None, "tensor", "fsdp")),
        ("backbone/stack/blocks/modulation/kernel", (4, 64, 6, 64), P(None, "fsdp", None, None)),
        ("backbone/final_modulation/kernel", (64, 2, 64), P("fsdp", None, None)),
        ("backbone/shared_modulation/kernel", (64, 6, 64), P("fsdp", None, None)),
        ("backbone/condition/class_embed/embedding", (11, 64), P()),
        ("backbone/token_embed/embedding", (256, 64), P("tensor", "fsdp")),
        ("backbone/token_embed/kernel", (32, 64), P(None, "fsdp")),
        ("backbone/position", (49, 64), P(None, "fsdp")),
        ("head/kernel", (64, 256), P("fsdp", "tensor")),
        ("head/output/kernel", (64, 256), P("fsdp", "tensor")),
        ("encoder/conv_in/kernel", (3, 3, 1, 32), P(None, None, None, "fsdp")),
        ("decoder/middle_attention/out/kernel", (1, 1, 32, 32), P(None, None, None, "fsdp")),
        ("quantizer/codebook", (256, 8), P()),
        ("backbone/stack/blocks/mlp/up/bias", (4, 256), P()),
        ("step", (), P()),
    ],
)
def test_spec(name, shape, spec):
    assert partition(name, shape, make_mesh(**MESH)) == spec


def test_axes_of_size_one_are_not_named():
    mesh = make_mesh(data=8)
    assert partition("mlp/up/kernel", (4, 6), mesh) == P(None, None)


def test_moments_and_ema_lie_as_their_parameters():
    params = {"backbone": {"mlp": {"up": {"kernel": jnp.zeros((8, 16)), "bias": jnp.zeros(16)}}}}
    mesh = make_mesh(**MESH)
    own = shardings(params, mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())
    moments = shardings(tx.init(params), mesh)[1]
    assert moments.mu == own and moments.nu == own
    assert moments.count.spec == P()
    assert shardings({"ema": params}, mesh)["ema"] == own
    placed = jax.device_put(params, own)["backbone"]["mlp"]["up"]["kernel"]
    assert {shard.data.shape for shard in placed.addressable_shards} == {(4, 8)}


def test_indivisible_dimension_is_an_error_that_says_what_would_do():
    mesh = make_mesh(data=1, fsdp=1, tensor=8)
    with pytest.raises(
        ValueError,
        match=r"attention/query/kernel \(64, 6, 16\): dimension 1 \(heads\) is 6, which "
        r"config.mesh.tensor=8 does not divide; use one of \[1, 2, 3, 6\]",
    ):
        partition("attention/query/kernel", (64, 6, 16), mesh)


def test_indivisible_dimension_is_replicated_where_the_rule_says_so(caplog):
    mesh = make_mesh(data=1, fsdp=2, tensor=4)
    with caplog.at_level("INFO", logger="ar_jax"):
        assert partition("head/kernel", (64, 250), mesh) == P("fsdp", None)
    assert "dimension 1 (vocab) is 250, no multiple of tensor=4: replicated" in caplog.text


def test_rank_below_the_rule_is_an_error():
    with pytest.raises(ValueError, match=r"mlp/up/kernel of shape \(8,\)"):
        partition("mlp/up/kernel", (8,), make_mesh(**MESH))


def test_check_coverage_names_what_no_rule_matches():
    big, small = np.zeros((256, 256), np.float32), np.zeros((4, 4), np.float32)
    check_coverage({"mlp": {"up": {"kernel": big}}, "odd": small, "bias": big[0]})
    with pytest.raises(ValueError, match=r"rules.py .*: experts/weights \(256, 256\)$"):
        check_coverage({"experts": {"weights": big}, "odd": small})
    check_coverage({"experts": {"weights": big}}, rules=[Rule(pattern="weights", axes=())])
    with pytest.raises(ValueError, match="odd"):
        check_coverage({"odd": small}, min_bytes=1)
