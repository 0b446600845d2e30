"""Which iterations under a plan run at full clocks, to compare the plan with. Pure; all ranks reckon alike.

References come in blocks: one iteration in which the clock settles, then some that count. Blocks are dense at first,
so that a plan that does not hold is found out early, and then as far apart as their share of all iterations asks for.
Where a block stands between its neighbours is jittered, so that nothing else that comes round regularly (a loader's
stall, a logger) always falls on references, or never.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

SETTLING = 1
"""Iterations of a block that do not count."""
COUNTING = 2
"""Iterations of a block that count."""
BESIDE = 8
"""Iterations under the plan before and after a block that it is compared with, as many as there are."""

_LENGTH = SETTLING + COUNTING
_ROOM = 4  # iterations under the plan at either end of a stretch that has a block
_FIRST = 16  # iterations of the first stretch
_GROWTH = 1.5

LARGEST_SHARE = 0.2
"""More would leave too few iterations under the plan beside each block."""


@dataclass(frozen=True, slots=True)
class Block:
    """A block of references and what it is compared with; counted from the first iteration under the plans.

    Attributes:
        number: counts up from 0.
        first, end: the references, the settling one included.
        window_first, window_end: with the iterations under the plan beside them.
    """

    number: int
    first: int
    end: int
    window_first: int
    window_end: int


@lru_cache(maxsize=64)  # each iteration is asked for a few times, on the training thread too
def block_near(offset: int, share: float) -> Block | None:
    """The block in whose stretch of iterations this one lies.

    Args:
        offset: iterations since the first one under the plans.
        share: of iterations that are references, in the long run; 0: none.
    """
    if offset < 0 or share <= 0:
        return None
    longest = math.ceil(_LENGTH / min(share, LARGEST_SHARE))
    number, begin, length = 0, 0, min(_FIRST, longest)
    while offset >= begin + length and length < longest:
        begin, number = begin + length, number + 1
        length = min(longest, round(_FIRST * _GROWTH**number))
    further = (offset - begin) // length
    begin, number = begin + further * length, number + further
    first = begin + _ROOM + _jitter(number) % (length - _LENGTH - 2 * _ROOM + 1)
    end = first + _LENGTH
    return Block(number, first, end, max(begin, first - BESIDE), min(begin + length, end + BESIDE))


def is_reference(offset: int, share: float) -> bool:
    """Whether this iteration runs at full clocks; see `block_near`."""
    block = block_near(offset, share)
    return block is not None and block.first <= offset < block.end


def _jitter(number: int) -> int:
    """The same on every rank, and as good as random."""
    mixed = (number + 1) * 0x9E3779B1 & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 16) * 0x85EBCA6B & 0xFFFFFFFF
    mixed = (mixed ^ mixed >> 13) * 0xC2B2AE35 & 0xFFFFFFFF
    return mixed ^ mixed >> 16
