"""What a report and its answer cost in messages, bytes and time of rank 0, at growing numbers of ranks.

Simulated: one real coordinator, an exchange in this process that counts what the real one would ask the store, and the
real planner. Every pipeline has 64 GPUs: 8 stages of 8 GPUs each. What the other ranks do (look at the news, take the
part of a plan that is their own) is done once for one of them and counted per rank.

    python benchmarks/straggler_scale.py
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from perseus_plugin.config import parse_config
from perseus_plugin.control.selection import Selection
from perseus_plugin.exchange.messages import (
    NEWS,
    STRAGGLERS,
    News,
    Placement,
    RankStats,
    Recheck,
    part_key,
    receive,
    recheck_key,
    stats_key,
)
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.gpus.emulated.physics import A100, load_class
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.leader.coordinator import Coordinator
from perseus_plugin.leader.job import Job as JobFacts
from perseus_plugin.leader.state import Phase
from perseus_plugin.planning.process import PlanAnswer, PlanRequest, pace_for, plan_for
from perseus_plugin.profiling.known import Known
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.stragglers.book import Report

STAGES, GPUS_PER_STAGE = 8, 8


class CountingExchange(LocalExchange):
    """Counts calls to the store, and the bytes of keys and values, as `StoreExchange` makes them for each method."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.bytes = 0

    def _count(self, calls: int, key: str, value: Any = None) -> None:
        self.calls += calls
        self.bytes += calls * len(key) + len(json.dumps(value))

    def publish(self, key: str, value: Any) -> None:
        self._count(1, key, value)
        super().publish(key, value)

    def fetch(self, key: str) -> Any | None:
        value = super().fetch(key)
        self._count(1 if value is None else 2, key, value)  # whether it is there, and what it is
        return value

    def withdraw(self, key: str) -> None:
        self._count(1, key)
        super().withdraw(key)

    def tell_all(self, key: str, value: Any) -> None:
        self._count(1, "turn")
        super().tell_all(key, value)

    def told(self, key: str) -> Any | None:
        return super().fetch(key)

    def append(self, name: str, value: Any) -> None:
        self._count(2, name, value)  # a place is taken, and filled
        super().append(name, value)

    def take_new(self, name: str) -> list[Any]:
        taken = super().take_new(name)
        self._count(1, name)
        for value in taken:
            self._count(3, name, value)  # whether it is there, what it is, and that it is not needed any more
        return taken

    def heard(self, key: str) -> Any | None:
        return super().fetch(key)


class InProcessPlanner:
    """Plans when it is polled; its time is not the coordinator's."""

    busy = False

    def __init__(self) -> None:
        self._request: PlanRequest | None = None
        self.seconds = 0.0

    def submit(self, request: PlanRequest) -> None:
        self._request = request

    def poll(self) -> PlanAnswer | None:
        request, self._request = self._request, None
        if request is None:
            return None
        begin_s = time.perf_counter()
        if request.pace is None:
            answer = PlanAnswer(plan_for(request), 0.0)
        else:
            answer = PlanAnswer(None, 0.0, "", pace_for(request))
        self.seconds += time.perf_counter() - begin_s
        return answer


def profile() -> Profile:
    """Stages that differ a little, on the emulated A100."""
    rows = []
    for stage in range(STAGES):
        for kind, full_s in (("forward", 0.03), ("backward", 0.06)):
            for clock in (1410, 1305, 1200, 1095, 990, 885):
                time_s = (1 + 0.02 * (stage % 4)) * full_s * A100.stretch(load_class(kind), clock)
                power_w = A100.power_w(load_class(kind), clock)
                rows.append((stage, kind, Measurement(clock, time_s, time_s * power_w)))
    return Profile.from_rows(rows)


def placement(rank: int, ranks: int) -> Placement:
    """Tensor-parallel ranks are neighbours, then stages, then replicas."""
    stage, replica = rank // GPUS_PER_STAGE % STAGES, rank // (GPUS_PER_STAGE * STAGES)
    return Placement(
        rank=rank, world_size=ranks, stage=stage, stages=STAGES, replica=replica, local_rank=rank % 8, device="cuda"
    )


class Job:
    """Rank 0 of a job, following a plan."""

    def __init__(self, ranks: int, microbatches: int) -> None:
        self.ranks = ranks
        self.exchange = CountingExchange()
        self.planner = InProcessPlanner()
        streams = one_f_one_b(STAGES, microbatches)
        table = profile()
        about = JobFacts(
            config=parse_config({"stragglers": {"min_interval_s": 0.0}, "watch": {"reference_share": 0}}),
            placement=placement(0, ranks),
            exchange=self.exchange,
            output_dir=Path(tempfile.mkdtemp()),
            selection=Selection("nvml", "nvml:GPU-0", "A100"),
            known=Known(True, Survey(table, A100.blocking_w)),
            timetable=Timetable(Round(0, (1410,)), 1, 2),
        )
        self.coordinator = Coordinator(about, self.planner)
        self.coordinator.use_schedule("1f1b", lambda stage: streams[stage])
        for rank in range(ranks):
            stats = RankStats(placement=placement(rank, ranks), totals={})
            self.exchange.publish(stats_key(rank), stats.model_dump())
            stage = placement(rank, ranks).stage
            times_s = {kind: table.table[stage, kind][0].time_s for kind in ("forward", "backward")}
            self.exchange.publish(recheck_key(0, rank), Recheck(stage=stage, time_s=times_s).model_dump())
        self.iteration = 10
        while self.coordinator.phase is not Phase.FOLLOWING:
            self.step()

    def step(self) -> None:
        self.iteration += 1
        self.coordinator.step(self.iteration)

    def cost(self, action: Callable[[], Any]) -> tuple[int, int, float]:
        """Messages, bytes and milliseconds that something takes, the planner's own time left out."""
        calls, size, planning_s = self.exchange.calls, self.exchange.bytes, self.planner.seconds
        begin_s = time.perf_counter()
        action()
        seconds = time.perf_counter() - begin_s - (self.planner.seconds - planning_s)
        return self.exchange.calls - calls, self.exchange.bytes - size, 1e3 * seconds

    def report(self) -> None:
        """The last rank reports itself."""
        report = Report(rank=self.ranks - 1, slowdown=1.25)
        self.exchange.append(STRAGGLERS, report.model_dump())

    def answer(self) -> None:
        """Rank 0 hears of it, has it planned and tells everybody."""
        self.step()
        self.step()
        assert self.coordinator.phase is Phase.FOLLOWING
        assert self.coordinator.state.answers.situation is not None

    def hear(self) -> None:
        """What one rank does at the end of the iteration in which there are news."""
        where = placement(self.ranks - 1, self.ranks)
        news = receive(News, self.exchange.fetch(NEWS))
        assert self.exchange.fetch(part_key(news.version_for(where.replica), where.stage)) is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--microbatches", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[128, 1280, 10240])
    arguments = parser.parse_args()
    logging.getLogger("perseus_plugin").setLevel(logging.ERROR)
    print(
        "| ranks | rank 0, nothing new | report, at its sender | report and answer, at rank 0 | news | at each rank |"
    )
    print("|---|---|---|---|---|---|")
    for ranks in arguments.ranks:
        job = Job(ranks, arguments.microbatches)
        idle = [job.cost(job.step) for _ in range(50)]
        cells = [f"{idle[0][0]} msg, {idle[0][1]} B, {statistics.median(ms for _, _, ms in idle):.2f} ms"]
        for action in (job.report, job.answer):
            calls, size, milliseconds = job.cost(action)
            cells.append(f"{calls} msg, {size:,} B, {milliseconds:.1f} ms")
        cells.append(f"{len(json.dumps(job.exchange.fetch(NEWS)))} B")
        calls, size, milliseconds = job.cost(job.hear)
        cells.append(f"{calls} msg, {size:,} B, {milliseconds:.1f} ms")
        print(f"| {ranks:,} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
