"""The chips that libtpu compiles for."""

from __future__ import annotations

import dataclasses
import os


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One chip.

    Attributes:
        accelerator: prefix of the names that TPU_ACCELERATOR_TYPE takes.
        clock: cycles a second.
        peak: bfloat16 FLOPs a second.
        capacity: bytes of HBM.
        bandwidth: bytes a second between HBM and the chip.
        mxu: rows and columns of a matrix unit.
        interconnect: bytes a second out of a chip over all its links to others of its slice.
        links: of a chip, two to each dimension of the torus.
        network: bytes a second out of a chip to other slices (its share of its host's).
    """

    accelerator: str
    clock: float
    peak: float
    capacity: int
    bandwidth: float
    mxu: int
    interconnect: float
    links: int
    network: float


# Published peaks and sizes; the clocks follow from the peaks and the number of MXUs (our reading).
# Interconnect and network are those of docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}: 1,600, 4,800
# and 3,200 Gbit/s a chip (400, 1,200 and 800 GB/s where both directions are counted);
# 6.4 and 25.6 Tbit/s a pod of 256 chips of v5e and v6e, 50 Gbit/s a chip of v5p.
CHIPS = {
    "v5e": Chip(
        accelerator="v5litepod",
        clock=1.5e9,
        peak=197e12,
        capacity=16 * 2**30,
        bandwidth=819e9,
        mxu=128,
        interconnect=200e9,
        links=4,
        network=25e9 / 8,
    ),
    "v5p": Chip(
        accelerator="v5p",
        clock=1.75e9,
        peak=459e12,
        capacity=95 * 2**30,
        bandwidth=2765e9,
        mxu=128,
        interconnect=600e9,
        links=6,
        network=50e9 / 8,
    ),
    "v6e": Chip(
        accelerator="v6e",
        clock=1.75e9,
        peak=918e12,
        capacity=32 * 2**30,
        bandwidth=1640e9,
        mxu=256,
        interconnect=400e9,
        links=4,
        network=100e9 / 8,
    ),
}


def find_chip(topology: str) -> Chip:
    """The chip of a topology like 'v5e:4x4'.

    Raises:
        ValueError: names the topology and the kinds there are.
    """
    kind, colon, shape = topology.partition(":")
    if kind not in CHIPS or not colon or not all(n.isdigit() for n in shape.split("x")):
        raise ValueError(
            f"--topology={topology!r} is not KIND:AxB with a kind of {', '.join(CHIPS)}, such as "
            "'v5e:4x4' or 'v5p:4x4x4'"
        )
    return CHIPS[kind]


def dimensions(topology: str) -> tuple[int, ...]:
    """(4, 4) of 'v5e:4x4'."""
    return tuple(int(size) for size in topology.partition(":")[2].split("x"))


def prepare_environment(topology: str) -> None:
    """Lets libtpu compile without a TPU; before the first call of jax.

    Raises:
        ValueError: see `find_chip`.
    """
    chip = find_chip(topology)
    os.environ.update(
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=f"{chip.accelerator}-16",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
        JAX_PLATFORMS="cpu",
        # libtpu's lock keeps two processes off one chip. Here there is none: let them compile.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )
