"""What a job has drawn lately."""

from __future__ import annotations

from perseus_plugin.exchange.messages import RankStats, Totals
from perseus_plugin.reporting.live.account import EVERY
from perseus_plugin.reporting.live.power import Drawn, PowerMeter, at_full_clocks, under_plan
from tests.factories import placement


def told(rank: int, iterations: int, time_s: float, energy_j: float | None, unread: int = 0) -> RankStats:
    totals = Totals(iterations=iterations, time_s=time_s, energy_j=energy_j, unread=unread)
    return RankStats(placement=placement(rank, 2, 2), totals={EVERY: totals})


def test_each_figure_is_of_what_came_since_the_one_before() -> None:
    meter = PowerMeter(2)
    assert meter.read([told(0, 10, 5.0, 1000.0), told(1, 10, 5.0, 500.0)]) == Drawn(300.0, 5.0, 10)
    assert meter.read([told(0, 14, 7.0, 1800.0), told(1, 12, 6.0, 600.0)]) == Drawn(500.0, 2.0, 4)


def test_it_waits_until_every_rank_has_told_of_more() -> None:
    meter = PowerMeter(2)
    assert meter.read([]) is None
    assert meter.read([told(0, 10, 5.0, 1000.0)]) is None, "rank 1 was not heard of"
    assert meter.read([told(0, 10, 5.0, 1000.0), told(1, 10, 5.0, 500.0)]) is not None
    assert meter.read([told(0, 12, 6.0, 1100.0), told(1, 10, 5.0, 500.0)]) is None, "nothing new of rank 1"
    assert meter.read([told(0, 14, 7.0, 1200.0), told(1, 12, 6.0, 700.0)]) == Drawn(300.0, 2.0, 4)


def test_iterations_without_an_energy_count_as_the_others() -> None:
    meter = PowerMeter(2)
    assert meter.read([told(0, 10, 5.0, 800.0, unread=2), told(1, 10, 5.0, 500.0)]) == Drawn(300.0, 5.0, 10)
    assert meter.read([told(0, 12, 6.0, 800.0, unread=4), told(1, 12, 6.0, 600.0)]) is None, "none was read"


def test_without_a_counter_there_is_no_figure() -> None:
    assert PowerMeter(2).read([told(0, 10, 5.0, None), told(1, 10, 5.0, 500.0)]) is None


def test_at_full_clocks_every_rank_has_to_have_told() -> None:
    def at_full(rank: int, energy_j: float | None) -> RankStats:
        totals = {"full_clock": Totals(iterations=8, time_s=4.0, energy_j=energy_j)}
        return told(rank, 9, 9.0, 1.0).model_copy(update={"totals": totals})

    assert at_full_clocks([at_full(0, 800.0), at_full(1, 400.0)], 2) == Drawn(300.0, 4.0, 8)
    for stats in ([at_full(0, 800.0)], [at_full(0, 800.0), at_full(1, None)], [told(0, 9, 9.0, 1.0)] * 2):
        assert at_full_clocks(stats, 2) is None


def test_under_plans_only_what_all_ranks_tell_of_the_same_ones_counts() -> None:
    def under(rank: int, since: int | None, energy_j: float | None = 600.0) -> RankStats:
        totals = {
            "plan": Totals(iterations=3, time_s=2.0, energy_j=energy_j),
            "every": Totals(iterations=9, time_s=9.0),
        }
        return told(rank, 9, 9.0, 1.0).model_copy(update={"totals": totals, "plan_since": since})

    assert under_plan([under(0, 40), under(1, 40)], 2, 40) == Drawn(600.0, 2.0, 3)
    for stats in (
        [under(0, 40)],
        [under(0, 40), under(1, 30)],
        [under(0, 40), under(1, None)],
        [under(0, 40), under(1, 40, None)],
    ):
        assert under_plan(stats, 2, 40) is None
