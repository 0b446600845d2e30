from __future__ import annotations

import math
from typing import Any

import pytest

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import RankWindow, RankWindows, Seen, windows_key
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.reporting.live.comparison import Comparison

SINCE = 50
GRAPH_S = {"A": 1.0, "B": 2.0}


class Job:
    """Four ranks: two stages of two replicas."""

    def __init__(self, leader: int = 0, **watch: Any) -> None:
        self.exchange = LocalExchange()
        self.now_s = 100.0
        self.comparison = Comparison(
            parse_config({"watch": watch}).watch,
            self.exchange,
            4,
            lambda schedule: GRAPH_S.get(schedule, math.nan),
            monotonic=lambda: self.now_s,
            leader=leader,
        )
        self.comparison.begin(SINCE)

    def tell(
        self,
        ranks: tuple[int, ...] = (0, 1, 2, 3),
        blocks: int = 6,
        *,
        slower: float = 0.0,
        first: int = 0,
        since: int = SINCE,
        sizes: dict[int, float] | None = None,
        **more: Any,
    ) -> None:
        """Ranks publish windows of 2 references and 8 iterations under the plan, `slower` by so much."""
        for rank in ranks:
            windows = []
            for block in range(first, first + blocks):
                rows = []
                for number in range(10):
                    reference = number in (4, 5)
                    size = (sizes or {}).get(number, 1.0)
                    wiggle = 1 + 0.002 * ((7 * block + 3 * number) % 5 - 2)
                    row = {
                        "iteration": 100 * block + number,
                        "reference": reference,
                        "schedule": "A",
                        "time_s": size * wiggle * (1 if reference else 1 + slower),
                        "spent_s": size * 0.5,
                        "usual_s": 0.5,
                        "energy_j": size * (100.0 if reference else 90.0),
                    }
                    rows.append(Seen(**{**row, **more}))
                windows.append(RankWindow(since=since, block=block, seen=tuple(rows)))
            message = RankWindows(replica=rank // 2, windows=tuple(windows))
            self.exchange.publish(windows_key(rank), message.model_dump())

    def collect(self) -> bool:
        self.now_s += 1.0
        return self.comparison.collect()


def test_the_times_are_those_of_the_rank_that_leads() -> None:
    compared = []
    for leader, slow in ((0, 0), (0, 2), (2, 0), (2, 2)):
        job = Job(leader)
        job.tell((slow,), slower=0.03)
        job.tell(tuple(rank for rank in range(4) if rank != slow))
        assert job.collect()
        assert job.comparison.compared.time is not None
        compared.append(round(job.comparison.compared.time.share, 2))
    assert compared == [0.03, 0.0, 0.0, 0.03]


def test_all_ranks_energies_and_rank_0s_times_are_compared() -> None:
    job = Job()
    assert not job.collect()
    job.tell(slower=0.03)
    assert job.collect()
    compared = job.comparison.compared
    assert compared.time is not None
    assert compared.energy is not None
    assert compared.time.share == pytest.approx(0.03, abs=0.002)
    assert compared.energy.share == pytest.approx(-0.1, abs=1e-6)
    assert compared.time.blocks == 6
    assert not job.collect(), "nothing new"


def test_a_rank_that_is_late_is_waited_for_and_then_done_without() -> None:
    job = Job()
    job.tell((0, 1, 2))
    assert not job.collect()
    job.now_s += 58.0
    assert not job.collect()
    job.now_s += 2.0
    assert job.collect()
    assert job.comparison.compared.time is not None
    assert job.comparison.compared.energy is None, "one GPU's energy is missing"


def test_at_the_end_nobody_is_waited_for() -> None:
    job = Job()
    job.tell((0, 1))
    assert job.comparison.collect(at_once=True)
    assert job.comparison.compared.time is not None


def test_the_store_is_not_asked_all_the_time() -> None:
    job = Job()
    job.tell(())
    job.collect()
    job.tell()
    assert not job.comparison.collect()
    assert job.collect()


def test_an_energy_that_is_not_known_does_not_enter() -> None:
    job = Job()
    job.tell()
    job.tell((3,), energy_j=None)
    assert job.collect()
    assert job.comparison.compared.energy is None
    assert job.comparison.compared.time is not None


def test_other_plans_windows_are_not_looked_at() -> None:
    job = Job()
    job.tell(since=10)
    assert not job.collect()
    job.tell()
    assert job.collect()
    job.comparison.begin(SINCE)
    assert job.comparison.compared.time is not None, "another set on the same measurements"
    job.comparison.begin(500)
    assert job.comparison.compared.time is None
    assert not job.collect()


def test_larger_steps_are_not_put_on_the_plan() -> None:
    """References had larger batches each time: what the plan is not to blame for in either direction."""
    job = Job()
    job.tell(sizes={4: 1.6, 5: 1.3, 2: 1.3, 8: 1.6})
    assert job.collect()
    compared = job.comparison.compared
    assert compared.time is not None
    assert compared.energy is not None
    assert compared.time.share == pytest.approx(0.0, abs=0.005)
    assert compared.energy.share == pytest.approx(-0.1, abs=0.005)


def test_the_replica_with_most_work_sets_the_time() -> None:
    job = Job()
    sizes = {4: 1.6, 2: 1.3, 8: 1.6}
    job.tell((0, 1), sizes=sizes, spent_s=0.5)
    job.tell((2, 3), sizes=sizes)
    assert job.collect()
    assert job.comparison.compared.time is not None
    assert job.comparison.compared.time.share == pytest.approx(0.0, abs=0.005)


def test_where_sizes_are_not_known_schedules_still_are() -> None:
    job = Job()
    job.tell(usual_s=0.0, spent_s=0.0)
    assert job.collect()
    assert job.comparison.compared.time is not None
    assert job.comparison.compared.time.share == pytest.approx(0.0, abs=0.005)


@pytest.mark.parametrize(
    ("slower", "allowed", "watch", "dropped"),
    [
        (0.1, 0.0, {}, True),
        (0.02, 0.0, {}, True),
        (0.009, 0.0, {}, False),
        (-0.05, 0.0, {}, False),
        (0.1, 0.1, {}, False),
        (0.13, 0.1, {}, True),
        (0.1, 0.0, {"tolerance": 0.12}, False),
        (0.1, 0.0, {"patience": 1000}, False),
    ],
)
def test_a_plan_is_too_slow_only_beyond_target_and_tolerance(
    slower: float, allowed: float, watch: dict[str, Any], dropped: bool
) -> None:
    job = Job(**watch)
    job.tell(slower=slower)
    job.collect()
    excess = job.comparison.too_slow(allowed)
    assert (excess is not None) is dropped
    if excess is not None:
        assert excess == pytest.approx((1 + slower) / (1 + allowed) - 1, abs=0.005)
        assert "longer than at full clocks on the same work" in job.comparison.said


def test_few_blocks_decide_nothing() -> None:
    job = Job()
    job.tell(slower=0.5, blocks=2)
    job.collect()
    assert job.comparison.compared.time is None
    assert job.comparison.too_slow(0.0) is None


def test_without_references_nothing_is_collected() -> None:
    job = Job(reference_share=0)
    job.tell()
    assert not job.collect()
    assert not job.comparison.collect(at_once=True)


def test_a_plan_that_did_well_for_long_is_found_out_soon() -> None:
    job = Job()
    for first in range(0, 400, 40):
        job.tell(slower=0.0, first=first, blocks=40)
        job.collect()
    assert job.comparison.too_slow(0.0) is None
    for first in range(400, 448, 6):
        job.tell(slower=0.05, first=first)
        job.collect()
    assert job.comparison.compared.time is not None
    assert job.comparison.compared.time.share < 0.01
    slower = job.comparison.too_slow(0.0)
    assert slower == pytest.approx(0.05, abs=0.002)
    assert "take 5.0 %" in job.comparison.said
