"""Collectives between slices in a compiled program's text.

The program of several slices is that of one, with the partitions of one: its collectives name
chips of a slice. What crosses slices is handed to the hosts by a send, and comes back by a recv,
whose attributes say what the hosts' runtime does in between.
"""

from __future__ import annotations

import re

KINDS = {"one-to-one": "collective-permute"}  # others are called as inside a slice
Transfer = tuple[str, int]  # kind as of other collectives, slices that take part


def read_transfer(line: str) -> Transfer | None:
    """What the send or recv in ``line`` is a part of; None if it is not between slices.

    The slices of a target '{1,2}x{0:3}' are 1 and 2 (and of each the chips 0 to 3 take part); their
    number is 0 where it is written in another way.
    """
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', line)
    if not kind:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}x', line)
    slices = sum(_span(part) for part in target.group(1).split(",")) if target else 0
    name = kind.group(1).lower().replace("_", "-")
    return KINDS.get(name, name), slices


def read_rendezvous(line: str) -> str | None:
    """What a send and the recv of the same transfer have in common."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', line)
    return found.group(1) if found else None


def _span(part: str) -> int:
    """Numbers in '3' or '0:3', whose end is one of them."""
    first, _, last = part.partition(":")
    return int(last or first) - int(first) + 1
