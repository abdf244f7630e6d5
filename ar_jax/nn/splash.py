"""Attention among all rows of a sequence whose visibility is static: by a TPU kernel, or by XLA.

The kernel is JAX's Pallas splash attention: scores stay on the chip, and blocks of the mask without
any visible pair are skipped in both passes. It wants a static mask, so it gets the steps of the
rows; what differs from sample to sample (padded captions, masked codes) goes by segments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import PartitionSpec as P

from ar_jax.nn.attention import attend, attend_cache, visibility

Array = jax.Array

LANES = 128  # of a TPU's vector registers: the kernel's blocks are multiples
# Large blocks cost fewer grid steps, small ones skip more of the mask.
BLOCKS = (256, 384, LANES)
KERNELS = ("auto", "xla", "splash")


def attend_all(
    q: Array,
    k: Array,
    v: Array,
    *,
    steps: tuple[int, ...],
    real: Array | None,
    scale: float,
    kernel: str,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    """Softmax attention where row j is visible to row i iff steps[j] <= steps[i].

    Args:
        q: queries [B, T, H, K]; ``k`` and ``v`` likewise.
        steps: of the T rows.
        real: bool, broadcastable to [B, T]: rows that are False are hidden from all that are True.
            What they see themselves differs between kernels: their results must not be used.
        scale: factor on the dot products.
        kernel: 'splash': the kernel, off TPUs in Pallas's interpreter, which is slow and for
            tests; 'auto': the kernel on TPUs, XLA elsewhere and wherever there is dropout; 'xla'.
        dropout: applied to the softmax's weights [B, H, T, T], which the kernel never has in full.

    Returns:
        [B, T, H, K] in the dtype of ``v``.

    Raises:
        ValueError: the kernel is asked for with dropout.
    """
    if dropout is not None and kernel == "splash":
        raise ValueError(
            "config.attention='splash' cannot drop attention weights: set "
            "backbone.attention_dropout to 0, or config.attention to 'auto' or 'xla'"
        )
    if real is not None:
        real = jnp.broadcast_to(real, q.shape[:2])
    if kernel == "auto":
        kernel = "splash" if jax.default_backend() == "tpu" else "xla"
    with jax.named_scope("attend"):  # for `ar_jax.compilation.phases`
        if kernel == "xla" or dropout is not None:
            return _by_xla(q, k, v, real, steps=steps, scale=scale, dropout=dropout)
        by_kernel = functools.partial(_by_kernel, steps=steps, scale=scale)
        interpreted = functools.partial(by_kernel, interpret=True)
        # Asked for by name it is also compiled for TPUs where there are none.
        return jax.lax.platform_dependent(q, k, v, real, tpu=by_kernel, default=interpreted)


def attend_newest(
    q: Array, k: Array, v: Array, *, seen: int | None, scale: float, kernel: str
) -> Array:
    """Softmax attention of a step's rows to a cache's, of which all see the same.

    Args:
        q: queries [B, Q, H, K].
        k, v: [B, G, T, K], each head of which serves H / G of queries.
        seen: the first rows of the cache, which are visible; None is all.
        scale: factor on the dot products.
        kernel: as `attend_all`'s; steps of fewer than 128 rows go by XLA whatever it says.

    Returns:
        [B, Q, H, K] in the dtype of ``v``.
    """
    if kernel == "auto":
        kernel = "splash" if jax.default_backend() == "tpu" else "xla"
    if kernel == "xla" or q.shape[1] < LANES or k.shape[1] != q.shape[2]:
        return attend_cache(q, k[:, :, :seen], v[:, :, :seen], mask=None, scale=scale)
    by_kernel = functools.partial(_newest_by_kernel, seen=seen or k.shape[2], scale=scale)
    interpreted = functools.partial(by_kernel, interpret=True)
    return jax.lax.platform_dependent(q, k, v, tpu=by_kernel, default=interpreted)


def _newest_by_kernel(
    q: Array, k: Array, v: Array, *, seen: int, scale: float, interpret: bool = False
) -> Array:
    # A part of the cache would be copied to be sliced: the kernel gets it whole.
    count = q.shape[1]

    def filled(x: Array) -> Array:  # [B, H, n, K] -> [B, H, n', K]
        return jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % LANES), (0, 0)))

    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype).swapaxes(1, 2)
    q, k, v = (filled(x) for x in (scaled, k, v))
    visible = jnp.broadcast_to(jnp.arange(k.shape[2]) < seen, (len(q), k.shape[2]))  # [B, T']

    def local(q: Array, k: Array, v: Array, visible: Array) -> Array:
        run = _newest_kernel(q.shape[1], q.shape[2], k.shape[2], interpret)
        queries = jnp.ones((len(q), q.shape[2]), jnp.int32)
        return jax.vmap(run)(q, k, v, splash.SegmentIds(queries, visible.astype(jnp.int32)))

    out = _on_every_device(local, q, k, v, visible)  # [B, H, Q', K]
    return out.swapaxes(1, 2)[:, :count].astype(v.dtype)


def _newest_kernel(heads: int, queries: int, rows: int, interpret: bool) -> Any:
    """Of one sample: (q [H, Q', K], k, v [H, T', K], segments) -> [H, Q', K], all visible."""
    mask = splash.MultiHeadMask([splash.FullMask((queries, rows))] * heads)
    sizes = splash.BlockSizes(block_q=block_size(queries), block_kv=block_size(rows))
    return splash.make_splash_mha(
        mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def _by_xla(
    q: Array,
    k: Array,
    v: Array,
    real: Array | None,
    *,
    steps: tuple[int, ...],
    scale: float,
    dropout: Callable[[Array], Array] | None = None,
) -> Array:
    mask = None
    if len(set(steps)) > 1:
        mask = jnp.asarray(visible_rows(steps))[None, None]  # [1, 1, T, T]
    if real is not None:
        # A padded row still sees itself, so that no softmax is empty.
        keys = real[:, None, None] | jnp.eye(len(steps), dtype=bool)[None, None]
        mask = keys if mask is None else mask & keys
    return attend(q, k, v, mask=mask, scale=scale, dropout=dropout)


def _by_kernel(
    q: Array,
    k: Array,
    v: Array,
    real: Array | None,
    *,
    steps: tuple[int, ...],
    scale: float,
    interpret: bool = False,
) -> Array:
    spare = -len(steps) % LANES

    def rows_inside(x: Array) -> Array:  # [B, T, H, K] -> [B, H, T', K]
        return jnp.pad(x, ((0, 0), (0, spare), (0, 0), (0, 0))).swapaxes(1, 2)

    scaled = (q.astype(jnp.float32) * scale).astype(q.dtype)
    q, k, v = (rows_inside(x) for x in (scaled, k, v))
    segments = None
    if real is not None:
        segments = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, spare)))  # [B, T']

    def local(q: Array, k: Array, v: Array, segments: Array | None) -> Array:
        run = splash_kernel(steps, q.shape[1], interpret)
        if segments is None:
            return jax.vmap(run)(q, k, v)
        return jax.vmap(run)(q, k, v, splash.SegmentIds(segments, segments))

    out = _on_every_device(local, q, k, v, segments)  # [B, H, T', K]
    return out.swapaxes(1, 2)[:, : len(steps)].astype(v.dtype)


def _on_every_device(
    local: Callable[..., Array], q: Array, k: Array, v: Array, segments: Array | None
) -> Array:
    """Calls ``local`` with each device's samples and heads: XLA cannot cut up a custom kernel."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return local(q, k, v, segments)
    batch, heads = nn.logical_to_mesh_axes(("batch", "heads")) or (None, None)
    batch = batch if q.shape[0] % _parts(mesh, batch) == 0 else None
    heads = heads if q.shape[1] % _parts(mesh, heads) == 0 else None
    rows = P(batch, heads)
    return jax.shard_map(
        local,
        in_specs=(rows, rows, rows, None if segments is None else P(batch)),
        out_specs=rows,
        check_vma=False,  # a custom kernel does not say how its results vary
    )(q, k, v, segments)


def _parts(mesh: jax.sharding.AbstractMesh, axes: str | tuple[str, ...] | None) -> int:
    """Devices along one or several axes of a mesh."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def splash_kernel(steps: tuple[int, ...], heads: int, interpret: bool = False) -> Any:
    """The kernel of one sample: (q, k, v, segments=None), [H, T', K] each, -> [H, T', K].

    T' is the number of rows up to the next multiple of 128; the added rows see each other only.
    """
    mask = padded_mask(steps)
    block = block_size(len(mask))
    # Keys and values with their rows along the lanes, which both products can use: a head's 64
    # numbers fill half of a register's lanes, in memory too. Queries the kernel would transpose.
    rows_last = splash.QKVLayout.SEQ_MINOR
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
        k_layout=rows_last,
        v_layout=rows_last,
    )
    heads_mask = splash.MultiHeadMask([splash.NumpyMask(mask)] * heads)
    return splash.make_splash_mha(
        heads_mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )


def visible_rows(steps: tuple[int, ...]) -> np.ndarray:
    """Bool [T, T]: whether row i (first axis) sees row j."""
    order = np.asarray(steps)
    return visibility(order, order)


def padded_mask(steps: tuple[int, ...]) -> np.ndarray:
    """`visible_rows` with rows added up to a multiple of 128, which see each other only."""
    spare = -len(steps) % LANES
    mask = np.pad(visible_rows(steps), ((0, spare), (0, spare)))
    mask[len(steps) :, len(steps) :] = True
    return mask


def block_size(rows: int) -> int:
    """Rows of the kernel's blocks for a multiple of 128 of them."""
    return next(block for block in BLOCKS if rows % block == 0)
