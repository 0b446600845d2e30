from __future__ import annotations

from collections.abc import Sequence

import pytest

from perseus_plugin.exchange.messages import CatchUpPart, IterationDurations, PlanPart, RankDurations, durations_key
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.iteration.timetable import WARM_UP as WARMING_UP
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Sweep
from perseus_plugin.leader.recent import FEWEST, RecentIterations
from perseus_plugin.profiling.durations import KEPT, DurationsLog, joined
from tests.factories import CLOCKS_MHZ, placement, profile, record, time_s

TOP_MHZ = CLOCKS_MHZ[0]
STREAMS = one_f_one_b(2, 2)
KINDS = [["forward", "forward", "backward", "backward"], ["forward", "backward", "forward", "backward"]]
PART = PlanPart(
    version=1,
    schedule="1F1B",
    clocks_mhz=(810, 1110),
    times_s=(0.012, 0.025),
    catch_up=CatchUpPart(
        latest_starts_s=(0.0, 0.1),
        usual_delays_s=(0.0, 0.0),
        kinds=("forward", "backward"),
        options={
            "forward": ((1410, 0.010, 300.0), (810, 0.012, 200.0)),
            "backward": ((1410, 0.020, 300.0), (1110, 0.025, 200.0)),
        },
        size_weight=2.0,
    ),
)


def logged(*directives: Directive, **changes: object) -> Sequence[IterationDurations]:
    log = DurationsLog(TOP_MHZ)
    for number, directive in enumerate(directives):
        seen = record(number, begin_s=100.0 * number)
        for name, value in changes.items():
            setattr(seen, name, value)
        log.add(directive, seen, PART if isinstance(directive, Follow) else None)
    return log.message(placement()).iterations


@pytest.mark.parametrize(
    ("directive", "clocks"),
    [
        (Sweep(0, TOP_MHZ, kept=True), (0,)),
        (Sweep(0, 810, kept=True), (810,)),
        (FullClock("planning"), (0,)),
        (Follow(1), (810, 1110)),
    ],
)
def test_an_iteration_is_kept_with_what_it_ran_at(directive: Directive, clocks: tuple[int, ...]) -> None:
    (one,) = logged(directive)
    assert one.clocks_mhz == clocks
    assert one.durations_s == pytest.approx((0.010, 0.020))
    assert one.starts_s == pytest.approx((0.001, 0.011))


def test_what_caught_up_is_kept_with_the_clock_that_it_caught_up_at() -> None:
    (one,) = logged(Follow(1), raised=[(1, 1410)])
    assert one.clocks_mhz == (810, 1410)
    (one,) = logged(Follow(1), raised=[(0, 1410), (1, 1410)])
    assert one.clocks_mhz == (0,), "all of it ran at full clocks"


def test_a_part_tells_what_instructions_took_as_they_ran() -> None:
    assert PART.as_run([]) == (PART.clocks_mhz, PART.times_s)
    assert PART.as_run([(1, 1410)]) == ((810, 1410), (0.012, 0.020))
    assert PART.model_copy(update={"catch_up": None}).as_run([]) == (PART.clocks_mhz, PART.times_s)


@pytest.mark.parametrize(
    "directive",
    [WARMING_UP, Sweep(0, 810, kept=False), Follow(1, straggler=True)],
)
def test_what_says_nothing_of_usual_iterations_is_not_kept(directive: Directive) -> None:
    assert logged(directive) == ()


def test_a_disturbed_or_torn_iteration_is_not_kept() -> None:
    assert logged(FullClock("planning"), undisturbed=False) == ()
    assert logged(FullClock("planning"), ends_s=[1.0]) == ()


def test_the_newest_are_kept_and_full_clocks_first() -> None:
    full, slow = FullClock("planning"), Sweep(0, 810, kept=True)
    numbers = [one.number for one in logged(*[full] * 5, *[slow] * 20)]
    assert numbers == [0, 1, 2, 3, 4, *range(25 - (KEPT - 5), 25)]
    assert [one.number for one in logged(*[slow] * 20, *[full] * 20)] == list(range(28, 40))
    long_ago = [one.number for one in logged(*[full] * 3, *[slow] * 400)]
    assert long_ago == list(range(403 - KEPT, 403))


def told(rank: int, numbers: Sequence[int], clock: int = 0, factor: float = 1.0, **more: object) -> RankDurations:
    where = placement(rank, 4)
    durations = tuple(factor * time_s(kind, clock or TOP_MHZ, where.stage) for kind in KINDS[where.stage])
    fields: dict[str, object] = {
        "schedule": "1F1B",
        "clocks_mhz": (clock,),
        "durations_s": durations,
        "starts_s": (0.0, 0.1, 0.2, 0.3),
        "time_s": 0.5,
        **more,
    }
    return RankDurations(
        placement=where,
        iterations=tuple(IterationDurations(number=number, **fields) for number in numbers),  # type: ignore[arg-type]
    )


def test_iterations_are_joined_by_number_and_brought_to_full_clocks() -> None:
    ranks = [told(0, [7, 8], 810), told(1, [8, 9], 1110), told(2, [8], factor=1.5), told(3, [8])]
    found = joined(ranks, "1F1B", STREAMS, profile())
    assert list(found) == [8]
    first, second = found[8].durations_s[0]
    for stage in range(2):
        assert first[stage] == pytest.approx([time_s(kind, TOP_MHZ, stage) for kind in KINDS[stage]])
    assert second[0] == pytest.approx([1.5 * time_s(kind, TOP_MHZ) for kind in KINDS[0]])
    assert found[8].as_run_s[0][0][0] == pytest.approx([time_s(kind, 810) for kind in KINDS[0]])
    assert found[8].starts_s[0] == (((0.0, 0.1, 0.2, 0.3),) * 2,) * 2


def test_clocks_of_single_instructions_count_too() -> None:
    mixed = (810, 0, 1110, 1410)
    durations = tuple(time_s(kind, clock or TOP_MHZ) for kind, clock in zip(KINDS[0], mixed, strict=True))
    ranks = [told(0, [1], 1, clocks_mhz=mixed, durations_s=durations), told(1, [1])]
    found = joined(ranks, "1F1B", STREAMS, profile())
    assert found[1].durations_s[0][0][0] == pytest.approx([time_s(kind, TOP_MHZ) for kind in KINDS[0]])


def test_what_cannot_be_joined_is_left_out() -> None:
    usual = [told(rank, [1, 2]) for rank in range(3)]
    assert [len(one.durations_s[0]) for one in joined(usual, "1F1B", STREAMS, profile()).values()] == [1, 1]
    assert joined([told(0, [1]), told(1, [1], 333)], "1F1B", STREAMS, profile()) == {}, "a clock not in the profile"
    assert joined(usual, "another", STREAMS, profile()) == {}
    assert joined([told(0, [1]), told(1, [1], durations_s=(0.1,))], "1F1B", STREAMS, profile()) == {}
    assert joined([], "1F1B", STREAMS, profile()) == {}


def test_rank_0_collects_until_there_are_enough_and_keeps_the_newest() -> None:
    exchange = LocalExchange()
    recent = RecentIterations(exchange, 4)
    assert recent.samples("1F1B", STREAMS, profile()) is None

    def publish(numbers: Sequence[int]) -> None:
        for rank in range(4):
            exchange.publish(durations_key(rank), told(rank, numbers).model_dump())

    publish(range(FEWEST - 1))
    assert recent.samples("1F1B", STREAMS, profile()) is None
    publish(range(10, 13))
    samples = recent.samples("1F1B", STREAMS, profile())
    assert samples is not None
    assert len(samples.durations_s) == len(samples.starts_s) == FEWEST - 1 + 3
    publish(range(100, 140))
    samples = recent.samples("1F1B", STREAMS, profile())
    assert samples is not None
    assert len(samples.durations_s) == 24
    recent.forget()
    publish(range(2))
    assert recent.samples("1F1B", STREAMS, profile()) is None
