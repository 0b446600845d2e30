"""Rank 0 of a job of two stages, with a planner in this process and a store in memory; the other ranks are made up."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perseus_plugin.config import parse_config
from perseus_plugin.exchange.messages import NEWS, News, PlanPart, PlanParts, part_key, receive
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.iteration.instructions import StreamOp
from perseus_plugin.iteration.timetable import Directive, Round, Timetable
from perseus_plugin.leader.batch_desk import BatchPlannerProcess
from perseus_plugin.leader.coordinator import Coordinator
from perseus_plugin.planning.frontier_process import BackgroundFrontier
from perseus_plugin.planning.process import PlanAnswer, PlanRequest, answer_to
from perseus_plugin.profiling.survey import Survey
from tests.factories import job_of, record, stream_of

TABLE = Timetable(Round(4, (1410, 810, 1110, 1410)), settle_steps=1, steps_per_clock=3)
SWEEP_END = TABLE.sweep_end
PATIENCE = 3
FULL_S = 0.5  # of an iteration at full clocks, schedule A; what surrounds the schedule included
SCHEDULES: dict[str, Callable[[int], Sequence[StreamOp]]] = {
    "A": stream_of(2, 4),
    "B": stream_of(2, 8),
    **{str(microbatches): stream_of(2, microbatches) for microbatches in range(2, 30)},
}


class FakePlanner:
    """Plans in this process, when told to."""

    def __init__(self) -> None:
        self.requests: list[PlanRequest] = []
        self.error = ""
        self.answer: PlanAnswer | None = None
        self.dropped = 0

    @property
    def busy(self) -> bool:
        return False

    def submit(self, request: PlanRequest) -> None:
        # Through JSON, as to the real one.
        self.requests.append(PlanRequest.from_dict(json.loads(json.dumps(request.to_dict()))))

    def finish(self) -> None:
        """The last request is answered."""
        made = PlanAnswer(None, 0.0, self.error) if self.error else answer_to(self.requests[-1])
        self.answer = dataclasses.replace(made, planning_time_s=0.1)

    def drop(self) -> None:
        self.dropped += 1
        self.answer = PlanAnswer(None, 0.1, "not wanted", dropped=True)

    def poll(self) -> PlanAnswer | None:
        answer, self.answer = self.answer, None
        return answer


def parts_of(exchange: LocalExchange, version: int, stage: int) -> dict[str, PlanPart]:
    """What a stage is told of a set of plans, by schedule."""
    told = receive(PlanParts, exchange.fetch(part_key(version, stage)))
    assert told.version == version
    return {part.schedule: part for part in told.parts}


class RankZero:
    """See the module's docstring.

    Attributes:
        told: figures that went to the monitor.
        woken: how often a report has woken the worker.
        now_s: the clock that never goes back.
    """

    def __init__(
        self,
        folder: Path,
        block: dict[str, Any],
        *,
        world_size: int = 2,
        shards: int = 1,
        exchange: LocalExchange | None = None,
        planner: FakePlanner | None = None,
        refiner: FakePlanner | None = None,
        survey: Survey | None = None,
        frontier: BackgroundFrontier | None = None,
        batch_process: Callable[[], BatchPlannerProcess] | None = None,
    ) -> None:
        self.folder, self.world_size = folder, world_size
        self.exchange = exchange or LocalExchange()
        self.planner = planner or FakePlanner()
        self.config = parse_config(block)
        self.iteration, self.now_s, self.schedule = SWEEP_END, 1000.0, "A"
        self.told: list[list[tuple[str, float]]] = []
        self.woken: list[bool] = []
        about = job_of(self.config, self.exchange, folder, TABLE, world_size=world_size, shards=shards, survey=survey)
        self.coordinator = Coordinator(
            about,
            self.planner,
            frontier=frontier,
            batch_process=batch_process,
            tell=self.told.append,
            wake=lambda: self.woken.append(True),
            refiner=refiner,
            monotonic=lambda: self.now_s,
        )

    @property
    def news(self) -> News | None:
        value = self.exchange.fetch(NEWS)
        return None if value is None else receive(News, value)

    def newest(self) -> News:
        """The newest news, which must exist."""
        news = self.news
        assert news is not None
        return news

    def expected_s(self) -> float:
        """How long an iteration of the usual schedule may take under its plan, which must exist."""
        assert self.coordinator.plan is not None
        expected_s = self.coordinator.state.expected_s(self.coordinator.plan.schedule)
        assert expected_s is not None
        return expected_s

    def step(self) -> None:
        self.coordinator.use_schedule(self.schedule, SCHEDULES[self.schedule])
        self.coordinator.step(self.iteration)

    def run(self, directive: Directive, duration_s: float, count: int = 1, *, undisturbed: bool = True) -> None:
        """Iterations end on rank 0."""
        for _ in range(count):
            seen = record(self.iteration, schedule=self.schedule, undisturbed=undisturbed)
            seen.end_s = seen.begin_s + duration_s
            self.coordinator.saw(directive, seen)
            self.iteration += 1
            self.step()
