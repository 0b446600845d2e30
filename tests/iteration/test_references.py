from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perseus_plugin.iteration.references import COUNTING, LARGEST_SHARE, SETTLING, block_near, is_reference

SHARES = st.floats(0.001, LARGEST_SHARE)


@settings(max_examples=20)
@given(SHARES)
def test_the_share_is_kept_in_the_long_run_and_bounded_at_first(share: float) -> None:
    taken = [is_reference(offset, share) for offset in range(10_000)]
    length = SETTLING + COUNTING
    assert sum(taken) / len(taken) <= share + 20 * 3 / len(taken), "as stated, and at most twenty early blocks more"
    assert sum(taken) >= length * (len(taken) // math.ceil(length / share))
    assert sum(taken[:200]) <= max(0.11, share + 0.02) * 200
    assert sum(taken[:100]) >= 3 * 3, "enough to tell early"


@given(SHARES, st.integers(0, 5000))
def test_every_block_is_whole_and_has_neighbours_of_its_own(share: float, offset: int) -> None:
    block = block_near(offset, share)
    assert block is not None
    inside = range(block.first, block.end)
    assert len(inside) == SETTLING + COUNTING
    assert all(is_reference(one, share) for one in inside)
    beside = [one for one in range(block.window_first, block.window_end) if one not in inside]
    assert not any(is_reference(one, share) for one in beside), "no other block is in the window"
    assert block.first - block.window_first >= 4
    assert block.window_end - block.end >= 4
    assert block_near(block.first, share) == block
    following = block_near(block.window_end + 1000, share)
    assert following is not None
    assert following.number > block.number
    assert following.window_first >= block.window_end


def test_nothing_that_comes_round_regularly_always_falls_on_references() -> None:
    references = [offset for offset in range(60_000) if is_reference(offset, 0.02)]
    for period in (2, 3, 4, 5, 10, 50, 100, 150):
        taken = [offset % period for offset in references]
        most = max(taken.count(phase) for phase in set(taken))
        assert most / len(taken) < 1 / period + 0.05, f"period {period}"


def test_none_where_none_are_wanted() -> None:
    assert not any(is_reference(offset, 0.0) for offset in range(1000))
    assert not is_reference(-1, 0.02)
    assert block_near(3, 0.0) is None


@pytest.mark.parametrize("share", [0.02, 0.1])
def test_blocks_are_numbered_without_gaps(share: float) -> None:
    numbers = [block.number for offset in range(3000) if (block := block_near(offset, share)) is not None]
    assert numbers == sorted(numbers)
    assert set(numbers) == set(range(max(numbers) + 1))
