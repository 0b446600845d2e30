"""Which GPUs `CUDA_VISIBLE_DEVICES` leaves, and which one the beginning of a UUID means. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence

VARIABLE = "CUDA_VISIBLE_DEVICES"
_NUMBER = re.compile(r"[+-]?[0-9]+")  # what follows it is not looked at: "1gpu" is 1
ORDER_VARIABLE = "CUDA_DEVICE_ORDER"
"""CUDA counts the fastest GPU first unless this is PCI_BUS_ID; NVML always counts by PCI bus."""


def visible_positions(value: str | None, uuids: Sequence[str]) -> list[int]:
    """Positions of the GPUs that CUDA would show, in its order.

    As CUDA and torch do it: entries are indices, or beginnings of a UUID that mean one GPU, whichever the first one is;
    what follows an entry that means none is not looked at; the same GPU twice shows none at all. MIG partitions mean no
    whole GPU.

    Args:
        value: of the variable; None: not set, so all are visible.
        uuids: of all GPUs, by index; empty for one that does not tell.
    """
    if value is None:
        return list(range(len(uuids)))
    entries = [entry.strip() for entry in value.split(",")]
    position_of = _by_uuid if entries[0].startswith("GPU-") else _by_index
    found: list[int] = []
    for entry in entries:
        position = position_of(entry, uuids)
        if position is None:
            break
        found.append(position)
    return found if len(set(found)) == len(found) else []


def has_indices(value: str | None) -> bool:
    """Whether the variable names GPUs by index, whose order is CUDA's own."""
    return value is not None and _NUMBER.match(value.strip()) is not None


def matches(beginning: str, uuids: Sequence[str]) -> list[int]:
    """Positions of the GPUs whose UUID begins so, with or without `GPU-`; one that is equal is the only match."""
    wanted = beginning.removeprefix("GPU-").lower()
    if not wanted:
        return []
    shortened = [uuid.removeprefix("GPU-").lower() for uuid in uuids]
    if wanted in shortened:
        return [shortened.index(wanted)]
    return [position for position, uuid in enumerate(shortened) if uuid.startswith(wanted)]


def _by_index(entry: str, uuids: Sequence[str]) -> int | None:
    number = _NUMBER.match(entry)
    if number is None:
        return None
    position = int(number.group())
    return position if 0 <= position < len(uuids) else None


def _by_uuid(entry: str, uuids: Sequence[str]) -> int | None:
    found = matches(entry, uuids) if entry.startswith("GPU-") else []
    return found[0] if len(found) == 1 else None
