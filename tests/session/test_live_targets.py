"""A whole job, ranks, planner and socket included, whose target changes while it trains."""

from __future__ import annotations

from pathlib import Path

from tests.live_targets import change_at_random


def test_whatever_is_said_when_none_is_lost_and_all_ranks_go_over_at_one_iteration(tmp_path: Path) -> None:
    changes = 12
    changed = change_at_random(tmp_path / "job", changes, forward_s=(0.015, 0.021), backward_s=(0.030, 0.042))
    assert len(changed.said) == changes
    numbers = [number for number, _ in changed.said]
    assert numbers == sorted(set(numbers))
    assert {changed.outcomes[number]["state"] for number in numbers} <= {"in force", "behind", "superseded"}
    assert changed.outcomes[numbers[-1]]["state"] == "in force", "the newest wins"
    first, second = changed.by_rank
    assert first.keys() == second.keys()
    apart = [(number, first[number], second[number]) for number in first if first[number] != second[number]]
    # On a busy machine a rank may hear of an order when its iteration has begun; then it says so.
    assert not apart or changed.summary["overhead"]["late_switches"], apart
    assert len(set(first.values())) > 4, "it did change"
    told = {event["number"] for event in changed.events}
    assert told == set(numbers), "each is in the log of events"
    assert sum(changed.summary["targets"].values()) > changes
