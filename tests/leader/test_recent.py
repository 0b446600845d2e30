from __future__ import annotations

from perseus_plugin.exchange.messages import IterationDurations, RankDurations, durations_key
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.leader.recent import RecentIterations
from tests.factories import placement, profile, stream_of


def told(exchange: LocalExchange, first: int) -> None:
    """Both ranks tell of four iterations."""
    for rank in range(2):
        count = sum(isinstance(op, Compute) for op in stream_of(2, 4)(rank))
        seen = tuple(
            IterationDurations(
                number=number,
                schedule="A",
                clocks_mhz=(0,),
                durations_s=(0.01,) * count,
                starts_s=(0.0,) * count,
                time_s=0.2,
            )
            for number in range(first, first + 4)
        )
        exchange.publish(durations_key(rank), RankDurations(placement=placement(rank), iterations=seen).model_dump())


def test_of_a_schedule_without_a_plan_nothing_is_kept() -> None:
    exchange = LocalExchange()
    recent = RecentIterations(exchange, 2)
    streams = [stream_of(2, 4)(stage) for stage in range(2)]

    def iterations() -> int:
        samples = recent.samples("A", streams, profile())
        return 0 if samples is None else len(samples.durations_s)

    told(exchange, 0)
    assert iterations() == 4
    told(exchange, 4)
    assert iterations() == 8
    recent.forget("A")
    told(exchange, 8)
    assert iterations() == 4
