from __future__ import annotations

import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.config import parse_config
from perseus_plugin.control import wire
from perseus_plugin.control.selection import Selection
from perseus_plugin.exchange.client import ExchangeError, UnansweredError
from perseus_plugin.exchange.messages import (
    BATCHES,
    NEWS,
    TROUBLE,
    WORKS,
    AnnouncedWork,
    BatchNews,
    BatchPart,
    CatchUpPart,
    News,
    PlanPart,
    PlanParts,
    RankDurations,
    RankEstimate,
    RankStats,
    RankWindows,
    Recheck,
    Trouble,
    Waited,
    WaitPart,
    batch_key,
    durations_key,
    estimate_key,
    part_key,
    receive,
    recheck_key,
    stats_key,
    windows_key,
)
from perseus_plugin.exchange.packing import packed
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.references import is_reference
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Round, Sweep, Timetable
from perseus_plugin.leader.leader import Leader
from perseus_plugin.reporting.live.account import begin_tag, end_tag
from perseus_plugin.reporting.live.relay import FigureRelay
from perseus_plugin.session.lifetime import Lifetime
from perseus_plugin.session.link import FinishedIteration, Link
from perseus_plugin.session.worker import (
    LEAST_SILENCE_S,
    RECENT_ITERATIONS,
    SILENT_ITERATIONS,
    SessionWorker,
    Timing,
)
from tests.factories import job_of, placement, record
from tests.waiting import came_true

TABLE = Timetable(Round(1, (1410, 810, 1410)), settle_steps=1, steps_per_clock=2)
PATIENCE = 3


class FakeHelper:
    """A helper whose events the test makes up; as the real one's they may come while others are taken.

    Attributes:
        meanwhile: what happens just after events were taken.
    """

    def __init__(self) -> None:
        self.events: deque[wire.Event] = deque()
        self.meanwhile: Callable[[], None] = lambda: None
        self.polling: list[float | None] = []
        self.silences_s: list[float] = []
        self.retired = False

    def drain(self) -> list[wire.Event]:
        taken = [self.events.popleft() for _ in range(len(self.events))]
        self.meanwhile()
        return taken

    def retire(self) -> None:
        self.retired = True

    def poll_energy(self, interval_s: float | None) -> None:
        self.polling.append(interval_s)

    def free_after(self, silence_s: float) -> None:
        self.silences_s.append(silence_s)


FAST = Timing(0.01, 0.01, 0.01, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)


class FakePlanner:
    """A planner that never answers."""

    def __init__(self) -> None:
        self.closed = False
        self.requests: list[Any] = []

    busy = False

    def submit(self, request: Any) -> None:
        self.requests.append(request)

    def poll(self) -> None:
        return None

    def close(self) -> None:
        self.closed = True


class Rank:
    """A worker with its thread, and what surrounds it."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        table: Timetable,
        with_helper: bool,
        exchange: LocalExchange,
        world_size: int,
        has_profile: bool,
        reference_share: float = 0.0,
        busy: bool = False,
        enforce: bool = True,
        timing: Timing = FAST,
        target_file: Path | None = None,
    ) -> None:
        self.rank = rank
        self.exchange = exchange
        self.link = Link(table)
        self.helper = FakeHelper()
        self.planner = FakePlanner()
        self.number = 0
        self.obeys, self.read_mhz = True, 1410
        block: dict[str, Any] = {
            "enforce": enforce,
            "watch": {"patience": PATIENCE, "reference_share": reference_share},
            "profiling": {"max_relative_error": 1.0},
            "target_file": None if target_file is None else str(target_file),
        }
        selection = Selection(
            "nvml", "nvml:GPU-0", "test GPU", (1410, 810), poll_interval_s=0.005, busy=busy, power_limit_w=300.0
        )
        job = job_of(
            parse_config(block),
            exchange,
            folder,
            table,
            rank=rank,
            world_size=world_size,
            selection=selection,
            has_profile=has_profile,
        )
        self.lifetime = Lifetime(self.helper)
        self.lifetime.on_end(self.link.ended)
        self.failures: list[str] = []
        self.lifetime.on_end(self.failures.append)
        relay = FigureRelay(exchange, [self.link.add_events], rank == 0, writes=False)
        leader = None
        if rank == 0:
            wake = self.link.wake.set
            leader = Leader(job, relay.tell, wake=wake, planner=self.planner, final_stats_timeout_s=0.2)
        self.worker = SessionWorker(
            job,
            link=self.link,
            lifetime=self.lifetime,
            helper=self.helper if with_helper else None,  # type: ignore[arg-type]
            relay=relay,
            leader=leader,
            timing=timing,
        )
        self.worker.start()

    def iterate(
        self,
        count: int = 1,
        *,
        directive: Directive | None = None,
        factor: float = 1.0,
        raised: Sequence[tuple[int, int]] = (),
        undisturbed: bool = True,
        lowered: Sequence[tuple[int, int]] = (),
        woken_early: int = 0,
        replayed: bool = False,
    ) -> None:
        """Iterations end; the counter is read at both ends."""
        for _ in range(count):
            runs_as = directive or self.link.timetable.at(self.number)
            durations = tuple(factor * t for t in (0.001, 0.010, 0.020, 0.005))
            # On the same clock as ticks; back to back.
            begin_s = self.number * 0.036 * factor
            seen = record(self.number, begin_s=begin_s, durations_s=durations, undisturbed=undisturbed)
            if replayed:
                seen.replayed, seen.starts_s, seen.ends_s = True, [], []
            seen.raised, seen.lowered, seen.woken_early = list(raised), list(lowered), woken_early
            mhz = runs_as.frequency_mhz if isinstance(runs_as, Sweep) else None
            if self.obeys and not isinstance(runs_as, Follow):
                self.helper.events.append(wire.Applied(1, mhz, 0.0, 0.0, seen.begin_s, seen.begin_s + 0.001))
            before_mhz, self.read_mhz = self.read_mhz, mhz or 1410
            self.helper.events += [
                wire.Mark(begin_tag(self.number), seen.begin_s, 10.0 * self.number, before_mhz, 0.0),
                wire.Mark(end_tag(self.number), seen.end_s, 10.0 * self.number + 9.0, self.read_mhz, 0.0),
            ]
            self.number += 1
            self.link.finished(FinishedIteration(runs_as, seen))

    def fetch(self, key: str) -> Any:
        """What the rank published, waited for."""
        assert came_true(lambda: self.exchange.fetch(key) is not None), f"nothing under {key}"
        return self.exchange.fetch(key)

    def close(self) -> None:
        self.worker.close()


class Ranks:
    """Makes ranks of one job and ends them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.exchange = LocalExchange()
        self.made: list[Rank] = []

    def __call__(
        self,
        rank: int = 1,
        table: Timetable = TABLE,
        with_helper: bool = True,
        world_size: int = 2,
        has_profile: bool = False,
        reference_share: float = 0.0,
        busy: bool = False,
        enforce: bool = True,
        timing: Timing = FAST,
        target_file: Path | None = None,
    ) -> Rank:
        made = Rank(
            self.folder,
            rank,
            table,
            with_helper,
            self.exchange,
            world_size,
            has_profile,
            reference_share,
            busy,
            enforce,
            timing,
            target_file,
        )
        self.made.append(made)
        return self.made[-1]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    for rank in made.made:
        rank.close()


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.DEBUG, "perseus_plugin")
    return caplog


def publish_news(
    exchange: LocalExchange,
    catch_up: CatchUpPart | None = None,
    *,
    stage: int = 1,
    waits: Sequence[WaitPart] = (),
    **news: Any,
) -> None:
    made = News(**news)
    if made.action == "follow":
        part = PlanPart(
            version=made.version,
            schedule="1F1B",
            clocks_mhz=(810, 1410),
            times_s=(0.1, 0.2),
            catch_up=catch_up,
            waits=tuple(waits),
        )
        parts = PlanParts(version=made.version, parts=(part,))
        exchange.publish(part_key(made.version, stage), parts.model_dump())
    exchange.publish(NEWS, made.model_dump())


def stats_of(rank: Rank) -> RankStats:
    return receive(RankStats, rank.fetch(stats_key(rank.rank)))


# When it looks.


def test_iterations_are_looked_at_together_but_where_a_measurement_waits_for_them(ranks: Ranks) -> None:
    rank = ranks(timing=replace(FAST, idle_s=20.0, gather_s=3600.0))

    def seen() -> int:
        return rank.worker._stats.hooked_iterations

    for number in range(1, TABLE.sweep_end + 1):
        rank.iterate()
        assert came_true(lambda number=number: seen() == number), "the sweep waits"
    rank.fetch(estimate_key(0, 1))
    assert came_true(lambda: rank.link._gather_until_s > 0.0)
    for number in range(1, 6):  # of these the second and the fourth are kept whole
        rank.iterate()
        assert came_true(lambda number=number: seen() == TABLE.sweep_end + number)
    assert came_true(lambda: rank.link._gather_to == TABLE.sweep_end + 7)
    rank.iterate()
    assert not rank.link.wake.is_set()
    rank.iterate()
    assert came_true(lambda: seen() == TABLE.sweep_end + 7), "the next one is the eighth"


def test_iterations_are_looked_at_rarely_where_no_plans_are_made(ranks: Ranks) -> None:
    table = replace(TABLE, sweep=replace(TABLE.sweep, clocks_mhz=()))
    rank = ranks(table=table, with_helper=False, timing=replace(FAST, rarely_s=3600.0))
    rank.iterate()
    assert came_true(lambda: rank.link._gather_until_s > time.monotonic() + 1800.0)


def test_a_target_file_is_looked_at_while_nothing_else_happens(ranks: Ranks, tmp_path: Path) -> None:
    file = tmp_path / "target.json"
    rank = ranks(0, timing=replace(FAST, idle_s=3600.0, rarely_s=3600.0), target_file=file)
    leader = rank.worker._leader
    assert leader is not None
    coordinator = leader._coordinator
    assert coordinator is not None

    def entries() -> list[str]:
        return [one["source"] for one in coordinator.request({"do": "targets"}).get("entries", [])]

    file.write_text('{"slowdown": 0.1}')
    assert came_true(lambda: "target file" in entries())


# What plans are replayed over, and how a rank catches up.


def test_a_rank_publishes_its_iterations_after_the_sweep_and_while_it_follows_a_plan(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    first = receive(RankDurations, rank.fetch(durations_key(1)))
    assert first.placement.rank == 1
    assert {one.clocks_mhz for one in first.iterations} == {(0,), (810,)}
    publish_news(ranks.exchange, sequence=1, switch=rank.number, action="follow", version=1)
    assert came_true(lambda: isinstance(rank.link.timetable.at(rank.number), Follow))
    twelfth = rank.number + 11
    rank.iterate(14)

    def published() -> RankDurations:
        return receive(RankDurations, rank.fetch(durations_key(1)))

    assert came_true(lambda: published().iterations[-1].number >= twelfth)
    assert published().iterations[-1].clocks_mhz == (810, 1410)


def test_a_dry_run_has_newer_iterations_to_hold_its_plan_against(ranks: Ranks) -> None:
    rank = ranks(enforce=False)
    rank.iterate(TABLE.sweep_end)
    rank.fetch(durations_key(1))
    publish_news(ranks.exchange, sequence=1, switch=rank.number, action="full", reason="a dry run")
    assert came_true(lambda: rank.link.timetable.at(rank.number) == FullClock("a dry run"))
    twelfth = rank.number + 11
    rank.iterate(14)

    def newest() -> int:
        return receive(RankDurations, rank.fetch(durations_key(1))).iterations[-1].number

    assert came_true(lambda: newest() >= twelfth)


def test_catching_up_is_counted_with_what_it_takes(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    told = CatchUpPart(
        latest_starts_s=(0.0, 0.1),
        usual_delays_s=(0.0, 0.0),
        kinds=("forward", "backward"),
        options={
            "forward": ((1410, 0.010, 300.0), (810, 0.015, 150.0)),
            "backward": ((1410, 0.020, 300.0), (810, 0.030, 150.0)),
        },
        size_weight=2.0,
    )
    publish_news(ranks.exchange, told, sequence=1, switch=rank.number, action="follow", version=1)
    assert came_true(lambda: isinstance(rank.link.timetable.at(rank.number), Follow))
    rank.iterate(2)
    rank.iterate(3, raised=[(0, 1410)])
    rank.iterate(1, raised=[(0, 1410)], undisturbed=False)
    assert came_true(lambda: stats_of(rank).caught_up.iterations == 5)
    caught_up = stats_of(rank).caught_up
    assert (caught_up.instructions, caught_up.late_iterations, caught_up.raised) == (10, 3, 3)
    # 10 ms at 300 W instead of 15 ms at 150 W.
    assert caught_up.extra_energy_j == pytest.approx(3 * (3.0 - 2.25))


def test_waits_are_counted_with_those_that_ended_early(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    waits = (WaitPart(after=1, frequency_mhz=810, duration_s=0.1),)
    publish_news(ranks.exchange, waits=waits, sequence=1, switch=rank.number, action="follow", version=1)
    assert came_true(lambda: isinstance(rank.link.timetable.at(rank.number), Follow))
    rank.iterate(2)
    rank.iterate(3, lowered=[(1, 810)])
    rank.iterate(1, lowered=[(1, 810)], woken_early=1)
    rank.iterate(1, lowered=[(1, 810)], undisturbed=False)
    assert came_true(lambda: stats_of(rank).waited.iterations == 6)
    assert stats_of(rank).waited == Waited(iterations=6, planned=6, lowered=4, woken_early=1)


# The sweep.


def test_after_the_sweep_a_rank_publishes_what_it_measured(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    told = receive(RankEstimate, rank.fetch(estimate_key(0, 1)))
    assert told.placement == placement(1)
    assert told.gpu == "test GPU"
    assert told.power_limit_w == 300.0
    assert told.constant_time_s == pytest.approx({"load_microbatch": 0.001, "optimizer_step": 0.005})
    rows = {(row[0], row[1]): row[2] for row in told.estimate["instructions"]}
    assert rows == pytest.approx(
        {(k, c): t for k, t in (("forward", 0.01), ("backward", 0.02)) for c in (1410, 810)}, rel=1e-6
    )


def test_iterations_that_finish_amid_a_look_are_measured_like_any_others(ranks: Ranks) -> None:
    """Their clocks are confirmed by then, and of the last one of the sweep the estimate is made too."""
    rank = ranks()
    rank.helper.meanwhile = lambda: rank.iterate(min(3, TABLE.sweep_end - rank.number))
    told = receive(RankEstimate, rank.fetch(estimate_key(0, 1)))
    samples = {(row[0], row[1]): row[6] for row in told.estimate["instructions"]}
    assert samples == {(kind, clock): n for kind in ("forward", "backward") for clock, n in ((1410, 4), (810, 2))}


def test_a_step_that_becomes_a_graph_amid_the_sweep_ends_the_session(
    ranks: Ranks, heard: pytest.LogCaptureFixture
) -> None:
    rank = ranks(rank=1)
    rank.iterate(3)
    rank.iterate(1, replayed=True)
    assert came_true(lambda: rank.lifetime.ended and bool(heard.messages))
    assert rank.helper.retired
    (message,) = heard.messages
    assert "became a CUDA graph before profiling was over: capture it once there is a plan" in message


def test_a_graph_amid_the_sweep_of_a_job_whose_kept_profile_does_not_fit_ends_the_session(ranks: Ranks) -> None:
    rank = ranks(rank=1, has_profile=True)
    rank.iterate(4, replayed=True)
    rank.link.run_by(rank.link.timetable.swept_again(rank.number, (1410, 810), False))
    rank.iterate(1, replayed=True)
    assert came_true(lambda: rank.lifetime.ended)
    assert "became a CUDA graph before profiling was over" in rank.failures[0]


def test_graphs_of_a_job_that_is_not_said_to_have_any_are_told_once(
    ranks: Ranks, heard: pytest.LogCaptureFixture
) -> None:
    rank = ranks(rank=1, has_profile=True)
    rank.iterate(3, directive=Follow(1), replayed=True)
    assert came_true(lambda: "perseus.cuda_graph is not set" in heard.text)
    rank.close()
    assert heard.text.count("perseus.cuda_graph is not set") == 1
    assert not rank.failures or rank.failures == [""]


def test_nothing_is_published_before_the_sweep_is_over(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end - 1)
    assert came_true(lambda: stats_of(rank).hooked_iterations == TABLE.sweep_end - 1)
    assert rank.exchange.fetch(estimate_key(0, 1)) is None


def test_the_counter_is_polled_during_the_sweep_only(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(1)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 1)
    assert rank.helper.polling == []
    rank.iterate(TABLE.sweep_end - 1)
    rank.fetch(estimate_key(0, 1))
    assert rank.helper.polling == [0.005, None]


def test_a_rank_profiles_again_when_it_is_told_to(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    rank.fetch(estimate_key(0, 1))
    publish_news(rank.exchange, sequence=1, switch=12, action="sweep", clocks_mhz=(1400, 800, 1410))
    assert came_true(lambda: rank.link.timetable.at(12) == Sweep(0, 1410, kept=False, round=1))
    assert rank.link.timetable.sweep.clocks_mhz == (1410, 810, 1410), "the nearest clocks that this GPU has"
    rank.iterate(rank.link.timetable.sweep_end - rank.number - 1)
    assert came_true(lambda: stats_of(rank).hooked_iterations == rank.number)
    assert rank.exchange.fetch(estimate_key(1, 1)) is None
    rank.iterate(1)
    told = receive(RankEstimate, rank.fetch(estimate_key(1, 1)))
    samples = {(row[0], row[1]): row[6] for row in told.estimate["instructions"]}
    assert samples == {(kind, clock): n for kind in ("forward", "backward") for clock, n in ((1410, 8), (810, 4))}


def test_with_a_profile_from_elsewhere_a_rank_tells_its_full_clock_times(ranks: Ranks) -> None:
    table = Timetable(Round(1, (1410,)), 1, 2)
    rank = ranks(table=table, has_profile=True)
    rank.iterate(table.sweep_end)
    told = receive(Recheck, rank.fetch(recheck_key(0, 1)))
    assert told.stage == 1
    assert told.time_s == pytest.approx({"forward": 0.010, "backward": 0.020})
    assert rank.exchange.fetch(estimate_key(0, 1)) is None


# The account.


def test_a_clock_changed_from_outside_is_told_from_a_power_limit(ranks: Ranks, heard: pytest.LogCaptureFixture) -> None:
    rank = ranks()
    rank.helper.events += [
        wire.Deviation(0.0, 900, 1410),
        wire.Deviation(0.0, 900, 705),
        wire.Deviation(0.0, 900, 1410),
    ]
    assert came_true(lambda: stats_of(rank).deviations == 3)
    lines = [r.getMessage() for r in heard.records if "were asked for" in r.getMessage()]
    assert len(lines) == 2
    assert "somebody else sets its clock, or the driver does not honour locks; asked again" in lines[0]
    assert "Look for a power or thermal limit" in lines[1]


def test_a_gpu_at_its_power_limit_alarms_nobody(ranks: Ranks, heard: pytest.LogCaptureFixture) -> None:
    heard.set_level(logging.INFO, logger="perseus_plugin")
    rank = ranks()
    rank.helper.events += [
        wire.Mark(0, 1.0, 100.0, 1700, 5.0, 0),
        wire.Deviation(1.5, 1980, 1700),
        wire.Deviation(1.6, 1980, 1700),
        wire.Mark(0, 2.0, 200.0, 1700, 5.9, 0),
    ]
    assert came_true(lambda: stats_of(rank).deviations == 2)
    assert came_true(lambda: any("were asked for" in r.getMessage() for r in heard.records))
    told = [r for r in heard.records if "were asked for" in r.getMessage()]
    assert [r.levelno for r in told] == [logging.INFO]
    assert told[0].getMessage().startswith("the GPU is at its power limit: it runs at 1700 MHz where 1980 MHz")


def test_nothing_is_said_to_be_asked_again_where_we_give_way(ranks: Ranks, heard: pytest.LogCaptureFixture) -> None:
    rank = ranks()
    rank.worker._config = parse_config({"gpu": {"foreign_clock": "give_way"}})
    rank.helper.events += [
        wire.Deviation(0.0, 900, 1410),
        wire.Trouble("gave_way", "the SM clock was changed from outside", 0.0),
    ]
    assert came_true(lambda: bool(rank.failures))
    assert "asked again" not in heard.text


def test_iterations_whose_clock_never_reached_the_driver_count_for_no_clock(ranks: Ranks) -> None:
    rank = ranks()
    rank.obeys = False
    rank.iterate(TABLE.sweep_end)
    estimate = rank.fetch(estimate_key(0, 1))["estimate"]
    assert estimate["instructions"] == []
    assert came_true(lambda: rank.fetch(stats_key(1))["totals"]["profiling"]["iterations"] > 0)
    assert "full_clock" not in rank.fetch(stats_key(1))["totals"]


def test_iterations_are_counted_by_sort(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(TABLE.sweep_end)
    rank.iterate(2, directive=FullClock("planning"))
    rank.iterate(4, directive=Follow(1))
    assert came_true(lambda: stats_of(rank).hooked_iterations == 16)
    totals = stats_of(rank).totals
    expected = {"profiling": 9, "full_clock": 4, "plan": 4, "under_plans": 4, "every": 16}
    assert {sort: total.iterations for sort, total in totals.items()} == expected
    for total in totals.values():
        assert total.time_s == pytest.approx(0.036 * total.iterations)
        assert total.energy_j == pytest.approx(9.0 * total.iterations)
    assert stats_of(rank).instructions == 16 * 4


def test_clock_changes_and_the_switch_latency_are_taken_from_the_helper(
    ranks: Ranks, heard: pytest.LogCaptureFixture
) -> None:
    rank = ranks()
    rank.helper.events += [wire.SwitchLatency(0.01, 0.02, 8, 0), *[wire.Applied(1, 810, 0.0, 0.0, 0.0, 0.0)] * 3]
    assert came_true(lambda: rank.link.rise_lead_s == 0.02)
    assert came_true(lambda: stats_of(rank).requests == 3)
    assert stats_of(rank).switch_latency_s == (0.01, 0.02)
    assert not [told for told in heard.records if told.levelno >= logging.WARNING]
    rank.helper.events.append(wire.SwitchLatency(float("nan"), float("nan"), 0, 0))
    rank.helper.events.append(wire.SwitchLatency(float("nan"), float("nan"), 3, 3))
    assert came_true(lambda: bool(rank.failures))
    (failure,) = rank.failures
    assert "the driver takes locks but the clock does not follow (none of 3 changes was seen)" in str(failure)
    assert rank.link.rise_lead_s == 0.02, "no change ever showed"


def test_a_clock_that_deviates_is_told_once(ranks: Ranks, heard: pytest.LogCaptureFixture) -> None:
    rank = ranks()
    rank.helper.events += [wire.Deviation(0.0, 1410, 1200)] * 3
    assert came_true(lambda: "1200 MHz where 1410 MHz were asked for" in heard.text)
    assert came_true(lambda: stats_of(rank).deviations == 3)
    assert heard.text.count("1200 MHz") == 1
    assert not rank.failures


def test_a_counter_that_cannot_be_read_any_more_is_told_and_the_plan_goes_on(
    ranks: Ranks, heard: pytest.LogCaptureFixture
) -> None:
    rank = ranks()
    rank.helper.events.append(wire.Trouble("read_failed", "the counter is gone", 0.0))
    assert came_true(lambda: "energy is not measured any more: the counter is gone" in heard.text)
    assert not rank.failures
    assert rank.exchange.fetch(TROUBLE) is None
    rank.helper.events.append(wire.Trouble("read_again", "the energy counter can be read again", 0.0))
    assert came_true(lambda: "the energy counter can be read again: energy is measured as before" in heard.text)
    assert not rank.failures


# Trouble.


def test_trouble_of_the_helper_ends_the_session_and_rank_0_hears_of_it(ranks: Ranks) -> None:
    rank = ranks()
    rank.helper.events.append(wire.Trouble("lock_failed", "no permission", 0.0))
    assert receive(Trouble, rank.fetch(TROUBLE)) == Trouble(rank=1, reason="no permission")
    assert rank.failures == ["no permission"]


def test_of_a_clock_that_is_not_free_nobody_says_that_it_is_full(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    rank = ranks()

    def gone(*_: object) -> None:
        raise ExchangeError("the store is gone")

    monkeypatch.setattr(rank.exchange, "fetch", gone)
    assert came_true(lambda: rank.failures == ["the store is gone"])
    # The worker's work is over, but not its ear.
    rank.helper.events.append(wire.Trouble("helper_stuck", "the clock is held", 0.0, free=False))
    assert came_true(lambda: "training goes on, but not at full clocks: the clock is held" in heard.text)


def test_a_helper_that_was_started_again_is_told_and_the_plan_goes_on(
    ranks: Ranks, heard: pytest.LogCaptureFixture
) -> None:
    rank = ranks()
    rank.helper.events += [
        wire.Trouble("started_again", "it ended, and a second helper sets it as before", 0.0),
        *[wire.Trouble("paused", "the training process was stopped: its SM clock is free until it goes on", 0.0)] * 2,
        wire.Trouble("freed", "the SM clock is free after all", 0.0),
    ]
    assert came_true(lambda: "the SM clock is free after all" in heard.text)
    assert heard.text.count("was stopped: its SM clock is free until it goes on; nothing needs to be done") == 1
    assert "a second helper sets it as before. If that one ends as well, training goes on at full clocks" in heard.text
    assert not rank.failures
    assert rank.exchange.fetch(TROUBLE) is None


def test_the_clock_is_freed_after_several_iterations_worth_of_silence(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(3)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 3), "the thread has done with them"
    assert rank.helper.silences_s == [LEAST_SILENCE_S]
    rank.worker._free_when_silent(10.0)
    rank.worker._free_when_silent(10.5)
    assert rank.helper.silences_s == [LEAST_SILENCE_S, 10.0 * SILENT_ITERATIONS]
    for _ in range(RECENT_ITERATIONS):
        rank.worker._free_when_silent(2.0)
    assert rank.helper.silences_s[-1] == 2.0 * SILENT_ITERATIONS


def test_trouble_on_the_training_thread_is_told_once(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranks()
    told: list[str] = []
    publish = rank.exchange.publish
    monkeypatch.setattr(rank.exchange, "publish", lambda key, value: (told.append(key), publish(key, value)))
    rank.link.trouble("the hook failed")
    rank.fetch(TROUBLE)
    rank.iterate(3)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 3)
    assert told.count(TROUBLE) == 1


def test_a_store_that_fails_ends_the_session_and_not_the_job(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranks()

    def gone(*_: object) -> None:
        raise ExchangeError("the store is gone")

    monkeypatch.setattr(rank.exchange, "fetch", gone)
    monkeypatch.setattr(rank.exchange, "publish", gone)
    assert came_true(lambda: bool(rank.failures))
    assert rank.failures == ["the store is gone"]
    rank.close()


def test_a_store_that_freezes_at_the_end_is_said_once(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch, heard: pytest.LogCaptureFixture
) -> None:
    def gone(*_: object, **more: object) -> None:
        if more.get("at_once"):
            raise UnansweredError("its host has not answered")

    for told_before in (False, True):
        rank = ranks()
        monkeypatch.setattr(rank.exchange, "tell", gone)
        if told_before:
            rank.lifetime.fail(UnansweredError("its host has not answered"))
        heard.clear()
        rank.close()
        said = [told.message for told in heard.records if told.levelno >= logging.WARNING]
        assert len(said) == (not told_before)
        assert all("the summary may be incomplete: its host has not answered" in line for line in said)


@pytest.mark.parametrize("value", [{"sequence": "many"}, [], "text"])
def test_news_that_cannot_be_understood_end_the_session(ranks: Ranks, value: Any) -> None:
    rank = ranks()
    rank.exchange.publish(NEWS, value)
    assert came_true(lambda: bool(rank.failures))
    assert receive(Trouble, rank.fetch(TROUBLE)).rank == 1


# News.


def test_a_plan_is_taken_with_its_part_and_its_iteration(ranks: Ranks) -> None:
    rank = ranks()
    publish_news(rank.exchange, sequence=1, switch=7, action="follow", version=1)
    assert came_true(lambda: rank.link.timetable.at(7) == Follow(1))
    assert rank.link.timetable.at(6) == TABLE.at(6)
    assert {key: part.clocks_mhz for key, part in rank.link.parts.items()} == {(1, "1F1B"): (810, 1410)}
    assert stats_of(rank).late == 0


def test_a_plan_whose_part_is_missing_is_not_followed_until_it_is_there(ranks: Ranks) -> None:
    rank = ranks()
    publish_news(rank.exchange, stage=0, sequence=1, switch=7, action="follow", version=1)
    rank.iterate(1)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 1)
    assert rank.link.timetable == TABLE
    publish_news(rank.exchange, stage=1, sequence=1, switch=7, action="follow", version=1)
    assert came_true(lambda: rank.link.timetable.at(7) == Follow(1))


def test_announced_work_goes_to_rank_0(ranks: Ranks) -> None:
    rank = ranks()
    told = AnnouncedWork(iteration=9, replica=0, work=(1.0, 2.0))
    rank.link.announce(told)
    found: list[Any] = []
    assert came_true(lambda: bool(found.extend(rank.exchange.take_new(WORKS)) or found))
    assert [receive(AnnouncedWork, value) for value in found] == [told]


def test_work_that_is_announced_amid_trouble_goes_nowhere(ranks: Ranks) -> None:
    rank = ranks()
    rank.exchange.tell_all(TROUBLE, Trouble(rank=0, reason="its GPU is lost").model_dump())
    assert came_true(lambda: isinstance(rank.link.timetable.at(7), FullClock))
    rank.link.announce(AnnouncedWork(iteration=9, replica=0, work=(1.0, 2.0)))
    rank.iterate(1)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 1)
    assert rank.exchange.take_new(WORKS) == []


def publish_batch(rank: Rank, iteration: int, mhz: int = 810, stage: int = 1) -> None:
    part = BatchPart(
        version=0,
        schedule="1F1B",
        clocks_mhz=(mhz, 1410),
        times_s=(0.1, 0.2),
        iteration=iteration,
        base=1,
        pace_s=0.5,
        usual_s=0.4,
    )
    rank.exchange.publish(batch_key(iteration, 0, stage), packed(part.model_dump()))


def test_plans_of_batches_are_fetched_once_they_are_told_of(ranks: Ranks) -> None:
    rank = ranks()
    for iteration in (8, 9):
        publish_batch(rank, iteration)
    rank.exchange.tell_all(BATCHES, BatchNews(iterations=(8, 9)).model_dump())
    assert came_true(lambda: len(rank.link.parts) == 2)
    # Iteration 9's place has been taken by a later one, and that of 11 is another stage's.
    publish_batch(rank, 13)
    publish_batch(rank, 11, stage=0)
    rank.exchange.tell_all(BATCHES, BatchNews(iterations=(9, 11, 13)).model_dump())
    assert came_true(lambda: len(rank.link.parts) == 3)
    assert {part.iteration for part in rank.link.parts.values() if isinstance(part, BatchPart)} == {8, 9, 13}
    assert not rank.failures


def test_a_batch_at_a_clock_that_the_gpu_does_not_have_is_followed_by_nobody(ranks: Ranks) -> None:
    rank = ranks()
    publish_batch(rank, 8, mhz=600)
    rank.exchange.tell_all(BATCHES, BatchNews(iterations=(8,)).model_dump())
    assert came_true(lambda: bool(rank.failures))
    assert "600 MHz, which this GPU does not have" in rank.failures[0]
    assert not rank.link.parts


def test_only_newer_news_counts(ranks: Ranks) -> None:
    rank = ranks()
    publish_news(rank.exchange, sequence=2, switch=7, action="follow", version=2)
    assert came_true(lambda: rank.link.timetable.at(7) == Follow(2))
    for sequence in (1, 2):
        publish_news(rank.exchange, sequence=sequence, switch=3, action="full", reason="old")
        time.sleep(0.05)
    assert rank.link.timetable.at(7) == Follow(2)
    publish_news(rank.exchange, sequence=3, switch=9, action="full", reason="new")
    assert came_true(lambda: rank.link.timetable.at(9) == FullClock("new"))
    assert rank.link.timetable.at(8) == Follow(2)


def test_news_that_came_too_late_are_counted_and_hold_at_once(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(10)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 10)
    publish_news(rank.exchange, sequence=1, switch=7, action="follow", version=1)
    assert came_true(lambda: stats_of(rank).late == 1)
    assert rank.link.timetable.at(10) == Follow(1)


def test_a_new_plan_begins_its_sums_anew(ranks: Ranks) -> None:
    rank = ranks()
    publish_news(rank.exchange, sequence=1, switch=0, action="follow", version=1)
    assert came_true(lambda: rank.link.timetable.at(0) == Follow(1))
    rank.iterate(3)
    assert came_true(lambda: "plan" in stats_of(rank).totals and stats_of(rank).totals["plan"].iterations == 3)
    publish_news(rank.exchange, sequence=2, switch=3, action="follow", version=2, since=3)
    assert came_true(lambda: rank.link.timetable.at(3) == Follow(2, since=3))
    rank.iterate(2)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 5)
    assert stats_of(rank).totals["plan"].iterations == 2


def test_another_schedules_plan_begins_no_sum_anew(ranks: Ranks) -> None:
    rank = ranks()
    for version in (1, 2):
        switch = rank.number
        publish_news(rank.exchange, sequence=version, switch=switch, action="follow", version=version)
        assert came_true(lambda: rank.link.timetable.at(switch) == Follow(version))  # noqa: B023 - called at once
        rank.iterate(3)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 6)
    assert stats_of(rank).totals["plan"].iterations == 6


def test_references_are_counted_apart_and_told(ranks: Ranks) -> None:
    share = 0.1
    rank = ranks(table=replace(TABLE, reference_share=share), reference_share=share)
    publish_news(rank.exchange, sequence=1, switch=0, action="follow", version=1)
    assert came_true(lambda: rank.link.timetable.at(0) == Follow(1))
    rank.iterate(60)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 60)
    references = sum(is_reference(offset, share) for offset in range(60))
    assert {sort: totals.iterations for sort, totals in stats_of(rank).totals.items()} == {
        "plan": 60 - references,
        "under_plans": 60 - references,
        "reference": references,
        "every": 60,
    }
    told = receive(RankWindows, rank.fetch(windows_key(1)))
    assert told.replica == 0
    assert [window.block for window in told.windows] == [0, 1, 2]
    for window in told.windows:
        assert {one.energy_j for one in window.seen} == {9.0}
        assert {one.reference for one in window.seen} == {True, False}


def test_iterations_still_under_the_old_plan_do_not_count_for_the_new_one(ranks: Ranks) -> None:
    rank = ranks()
    publish_news(rank.exchange, sequence=1, switch=0, action="follow", version=1)
    assert came_true(lambda: rank.link.timetable.at(0) == Follow(1))
    rank.iterate(3)
    assert came_true(lambda: stats_of(rank).hooked_iterations == 3)
    publish_news(rank.exchange, sequence=2, switch=5, action="follow", version=2, since=5)
    assert came_true(lambda: rank.link.timetable.at(5) == Follow(2, since=5))
    rank.iterate(4)  # two still under the old plan
    assert came_true(lambda: stats_of(rank).hooked_iterations == 7)
    assert stats_of(rank).totals["plan"].iterations == 2


def test_asked_to_recheck_a_rank_times_its_instructions_at_full_clocks(ranks: Ranks) -> None:
    rank = ranks()
    publish_news(rank.exchange, sequence=1, switch=2, action="full", reason="too slow", recheck=True)
    assert came_true(lambda: rank.link.timetable.at(2) == FullClock("too slow"))
    rank.iterate(2, directive=Follow(1), factor=9.0)
    rank.iterate(1, factor=7.0)  # the first one at full clocks settles
    rank.iterate(PATIENCE - 1, factor=1.5)
    assert came_true(lambda: stats_of(rank).hooked_iterations == PATIENCE + 2)
    assert rank.exchange.fetch(recheck_key(1, 1)) is None
    rank.iterate(1, factor=4.0)
    told = receive(Recheck, rank.fetch(recheck_key(1, 1)))
    assert told.stage == 1
    assert told.time_s == pytest.approx({"forward": 0.015, "backward": 0.030})
    assert came_true(
        lambda: "recheck" in stats_of(rank).totals and stats_of(rank).totals["recheck"].iterations == PATIENCE
    )
    assert stats_of(rank).totals["recheck"].time_s == pytest.approx(0.036 * ((PATIENCE - 1) * 1.5 + 4.0))
    rank.iterate(5, factor=9.0)
    assert came_true(lambda: stats_of(rank).hooked_iterations == PATIENCE + 8)
    assert receive(Recheck, rank.fetch(recheck_key(1, 1))) == told


# The end.


def test_the_last_statistics_say_that_nothing_follows(ranks: Ranks) -> None:
    rank = ranks()
    rank.iterate(2)
    rank.close()
    stats = stats_of(rank)
    assert stats.final
    assert stats.hooked_iterations == 2, "what had not been taken yet counts too"
    assert not any(thread.name == "perseus" for thread in threading.enumerate())


def test_rank_0_writes_the_summary_of_all_ranks(ranks: Ranks) -> None:
    table = Timetable(Round(1, ()), 1, 2)
    both = [ranks(rank, table, with_helper=False) for rank in (1, 0)]
    for rank in both:
        rank.iterate(5)
        rank.close()
    summary = json.loads((ranks.folder / "summary.json").read_text())
    assert (summary["state"], summary["ranks"], summary["ranks_reporting"]) == ("finished", 2, 2)
    assert summary["iteration_time_s"]["full_clock"] == pytest.approx(0.036)
    assert summary["iterations"]["full_clock"] == 4, "warm-up does not count"
    assert summary["energy_j"]["full_clock"] is None
    assert not both[0].planner.requests, "without a sweep there is nothing to plan"
    assert dict(both[1].link.take_events()[-1])["Perseus/iteration_time_s/full_clock"] == pytest.approx(0.036)


def test_rank_0_does_not_wait_for_ever_for_a_rank_that_is_gone(ranks: Ranks) -> None:
    rank = ranks(0, Timetable(Round(0, ()), 1, 2), with_helper=False)
    rank.iterate(3)
    rank.close()
    summary = json.loads((ranks.folder / "summary.json").read_text())
    assert (summary["ranks"], summary["ranks_reporting"]) == (2, 1)


def test_rank_0_plans_from_all_estimates_and_ends_the_planner(ranks: Ranks) -> None:
    both = [ranks(rank) for rank in (0, 1)]
    for rank in both:
        rank.link.use_schedule("1F1B", lambda stage: [])
        rank.helper.events.append(wire.Tick(0.0, 0.001, 1.0, 1410, 0.0))
        # A counter that moves every 10 ms at 200 W.
        rank.helper.events += [
            wire.Tick(0.01 * i - 0.001, 0.01 * i, 2.0 * i, 1410, 0.0) for i in range(1, int(100 * 0.036 * 10))
        ]
        rank.iterate(TABLE.sweep_end)
        rank.fetch(estimate_key(0, rank.rank))
    planner = both[0].planner
    assert came_true(lambda: bool(planner.requests) or ranks.exchange.fetch(NEWS) is not None)
    for rank in both:
        rank.close()
    assert planner.closed


def test_a_summary_that_fails_does_not_keep_the_planner_alive(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = ranks(0)
    rank.iterate(1)

    def gone(*_: object) -> None:
        raise ExchangeError("the store is gone")

    assert came_true(lambda: ranks.exchange.fetch(stats_key(0)) is not None)
    monkeypatch.setattr(rank.exchange, "publish", gone)
    rank.close()
    assert rank.planner.closed


def test_iterations_of_a_schedule_that_is_not_followed_are_no_progress(
    ranks: Ranks, heard: pytest.LogCaptureFixture
) -> None:
    """They run at full clocks, whatever the timetable says."""
    rank = ranks(rank=0)
    for number in range(TABLE.sweep_end):
        seen = replace(record(number, begin_s=0.036 * number), schedule="", undisturbed=False)
        rank.link.finished(FinishedIteration(TABLE.at(number), seen))
    assert came_true(lambda: rank.exchange.fetch(estimate_key(0, 0)) is not None)
    assert "profiling block" not in heard.text
    assert "warming up" not in heard.text
    rank.iterate(directive=Sweep(1, 810, kept=False))
    assert came_true(lambda: "profiling block 2 of 3: 810 MHz" in heard.text)


@pytest.mark.parametrize(
    "more",
    [
        {"waits": [WaitPart(after=0, frequency_mhz=600, duration_s=0.1)]},
        {
            "catch_up": CatchUpPart(
                latest_starts_s=(0.0, 0.0),
                usual_delays_s=(0.0, 0.0),
                kinds=("forward", "backward"),
                options={"forward": ((600, 0.1, 1.0),), "backward": ((1410, 0.1, 1.0),)},
                size_weight=0.0,
            )
        },
    ],
)
def test_a_plan_at_clocks_that_the_gpu_does_not_have_is_followed_by_nobody(ranks: Ranks, more: dict[str, Any]) -> None:
    rank = ranks()
    publish_news(rank.exchange, sequence=1, switch=7, action="follow", version=1, **more)
    assert came_true(lambda: bool(rank.failures))
    assert "600 MHz, which this GPU does not have" in rank.failures[0]
    assert "600 MHz" in receive(Trouble, rank.fetch(TROUBLE)).reason
    assert not rank.link.parts
