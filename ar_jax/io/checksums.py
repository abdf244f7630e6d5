"""Checksums of arrays where they lie on the devices: of their bits, in exact integer arithmetic.

A sum modulo 2^32 does not depend on how an array is split, nor over how many devices and hosts:
what one mesh saved, another can compare. Every entry is mixed with its place before it is added.
The mixing is one to one, so that a change of any single entry shows; any other change, entries that
changed places included, goes unseen once in 2^32 times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

Array = jax.Array
Checksums = dict[str, list[Any]]  # 'part/a/b' -> [dtype, sum]

GOLDEN = 0x9E3779B9  # 2^32 divided by the golden ratio: far from every simple multiple
SHOWN = 4  # leaves that a message names


def tree_checksums(tree: Any) -> Checksums:
    """'a/b/c' -> [its dtype, its checksum] for every array in ``tree``; all processes call it.

    Compiles one program for all leaves of a mesh, and one for each shape of those that lie on one
    device or, as numpy's, on none: these visit the default device one by one. Other leaves, and
    numpy's of 8 bytes an entry, which no device takes as they are, have none.
    """
    leaves = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(leaf, jax.Array)
        or (isinstance(leaf, np.ndarray) and leaf.dtype.itemsize <= 4)
    }
    together: dict[frozenset[jax.Device], list[str]] = {}
    for name, leaf in leaves.items():
        devices = leaf.sharding.device_set if isinstance(leaf, jax.Array) else ()
        together.setdefault(frozenset(devices), []).append(name)
    totals: dict[str, int] = {}
    for names in together.values():
        arrays: list[Any] = [leaves[name] for name in names]
        whole = _whole(arrays)
        if whole:
            sums: Any = _program(whole)(arrays)
        else:
            with jax.set_mesh(None):  # that around the call is not where these lie
                sums = [jax.device_get(_checksum(leaf)) for leaf in arrays]
        found = jax.device_get(sums)
        totals |= {name: int(total) for name, total in zip(names, found, strict=True)}
    return {name: [str(leaf.dtype), totals[name]] for name, leaf in leaves.items()}


def find_change(saved: Mapping[str, Any], loaded: Checksums) -> str | None:
    """Names the leaves whose bits are not those that were saved; None: there are none.

    Leaves without a saved checksum, and those that were loaded as another type, say nothing.
    """
    changed = [
        name
        for name, found in loaded.items()
        if (entry := saved.get(name, found)) != found and entry[0] == found[0]
    ]
    if not changed:
        return None
    more = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    return f"{', '.join(changed[:SHOWN])}{more}: not the values that were saved (checksums differ)"


def _whole(leaves: Sequence[Array]) -> NamedSharding | None:
    """Where every process can read a result: on all devices of the mesh, if there is one."""
    shardings = [leaf.sharding for leaf in leaves if isinstance(leaf, jax.Array)]
    places = [sharding for sharding in shardings if isinstance(sharding, NamedSharding)]
    return NamedSharding(places[0].mesh, PartitionSpec()) if places else None


@functools.cache
def _program(whole: NamedSharding) -> Callable[[Sequence[Array]], Array]:
    """The jitted ``leaves`` -> uint32 [leaves]; kept, so that a run compiles it once."""
    return jax.jit(
        lambda leaves: jnp.stack([_checksum(leaf) for leaf in leaves]), out_shardings=whole
    )


@jax.jit  # traced once for all leaves of one shape
def _checksum(values: Array) -> Array:
    """The checksum of one array, uint32."""
    bits = _bits(values)
    # From the indices of each dimension: to flatten an array that is split would move it.
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis in range(bits.ndim):
        step = np.uint32(math.prod(bits.shape[axis + 1 :]) * GOLDEN % 2**32)
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * step
    return jnp.sum(_mix(bits + place), dtype=jnp.uint32)


def _bits(values: Array) -> Array:
    """uint32 of the shape of ``values``; types of 8 bytes get a last dimension of 2."""
    if values.dtype == jnp.bool_:
        return values.astype(jnp.uint32)
    size = values.dtype.itemsize
    narrow = {1: jnp.uint8, 2: jnp.uint16}.get(size, jnp.uint32)
    return jax.lax.bitcast_convert_type(values, narrow).astype(jnp.uint32)


def _mix(bits: Array) -> Array:
    """A permutation of uint32 in which every bit depends on all (the finish of MurmurHash3)."""
    bits ^= bits >> 16
    bits *= np.uint32(0x85EBCA6B)
    bits ^= bits >> 13
    bits *= np.uint32(0xC2B2AE35)
    return bits ^ (bits >> 16)
