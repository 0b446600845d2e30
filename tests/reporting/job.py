"""An output folder as a job leaves it, made by the code that makes it in a job; only what ran is made up."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from perseus_plugin.control import wire
from perseus_plugin.exchange.messages import Placement, PlanPart, RankStats
from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.iteration.timetable import Directive, Follow, FullClock, Round, Sweep, Timetable
from perseus_plugin.planning.plan import Plan, save_plan
from perseus_plugin.planning.planner import Target, make_plan
from perseus_plugin.profiling.kept import save_survey
from perseus_plugin.profiling.profile import Measurement, Profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.reporting.live.account import FULL_CLOCK, PLAN, PROFILING, Account, begin_tag, end_tag
from perseus_plugin.reporting.live.reporter import Reporter
from perseus_plugin.reporting.live.summary import Predicted
from perseus_plugin.reporting.record.recorder import Recorder
from perseus_plugin.reporting.record.samples import is_sampled
from tests.factories import BLOCKING_W, CLOCKS_MHZ, energy_j, placement, time_s

STEP_S = 0.005
TICK_S = 0.01
SWEEP = (CLOCKS_MHZ[0], CLOCKS_MHZ[-1], CLOCKS_MHZ[0])


@dataclass
class Job:
    """Replicas of a 1F1B pipeline; the ranks' clocks agree and nothing is late.

    Attributes:
        folder: output folder, made here.
        switch_latency_s: of clock changes; given, the profile has waiting power by clock, and the plan waits with a
            clock of their own.
        dry_run: clocks are left alone, so no plan is run.
        records: every `IterationRecord`, by rank and number.
    """

    folder: Path
    stages: int = 2
    microbatches: int = 4
    replicas: int = 1
    emulated: bool = True
    facts: dict[str, str] = field(default_factory=lambda: {"microbatch size": "3"})
    silent: Sequence[int] = ()
    switch_latency_s: float | None = None
    dry_run: bool = False
    records: dict[tuple[int, int], IterationRecord] = field(default_factory=dict)
    predicted: Predicted | None = None

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.world_size = self.stages * self.replicas
        self.streams: list[list[StreamOp]] = [
            [*stream, Constant("optimizer_step", collective=True)]
            for stream in one_f_one_b(self.stages, self.microbatches)
        ]
        self.profile = noisy_profile(self.stages)
        if self.switch_latency_s is not None:
            self.profile = with_waiting_power(self.profile)
        constants = {(stage, "optimizer_step"): STEP_S for stage in range(self.stages)}
        self.survey = Survey(self.profile, BLOCKING_W, frozenset(), constants)
        self.graph: PipelineGraph = build_graph(self.streams, constants)
        self.plan: Plan = make_plan(
            self.graph,
            self.profile,
            blocking_power_w=BLOCKING_W,
            target=Target.slowdown(0.0),
            schedule="1F1B",
            switch_latency_s=self.switch_latency_s,
        )
        self.timetable = Timetable(Round(2, SWEEP), settle_steps=1, steps_per_clock=2)
        self.placements = [placement(rank, self.world_size, self.stages) for rank in range(self.world_size)]
        about = {"gpu": "test GPU", "backend": "emulated", "emulated": self.emulated, "facts": self.facts}
        self.recorders = [
            Recorder(self.folder, where, about, measures_energy=True, enabled=where.rank not in self.silent)
            for where in self.placements
        ]
        self.accounts = [Account(True, recorder.energy) for recorder in self.recorders]
        self.now_s = time.monotonic() - 1000
        self.counters_j = [0.0] * self.world_size
        self.locked_mhz = [0] * self.world_size
        self.last: Directive | None = None
        self.number = 0
        self.parts = [
            PlanPart(
                version=1,
                schedule="1F1B",
                clocks_mhz=tuple(self.plan.clocks_mhz(stage)),
                times_s=tuple(one.finish_s - one.start_s for one in self.plan.stages[stage]),
            )
            for stage in range(self.stages)
        ]

    @property
    def plan_from(self) -> int:
        """First iteration under the plan, when nothing else is said."""
        return self.timetable.sweep_end + 3

    def profiled(self) -> Job:
        """Run until the profile is there, and write it."""
        self.iterate(self.timetable.sweep_end + 1)
        save_survey(self.survey, {"stage 0: gpu": "test GPU"}, self.folder)
        return self

    def planned(self, iterations: int = 12) -> Job:
        """Profile, plan and follow the plan."""
        self.profiled()
        save_plan(self.plan, self.folder / "plan.json")
        if not self.dry_run:
            self.timetable = self.timetable.switched(self.plan_from, Follow(1))
        self.iterate(self.plan_from + iterations - self.number)
        return self

    def replayed(self, energy_ratio: float, saving: tuple[float, float]) -> Job:
        """The plan is predicted to take so much of full clocks' energy by iterations that differ, see `Predicted`."""
        self.predicted = Predicted(1.0, energy_ratio, saving)
        return self

    def finished(self) -> Job:
        """Write all that a job writes at its end."""
        for recorder in self.recorders:
            recorder.step(final=True)
        self.summarise("finished")
        return self

    def summarise(self, state: str) -> None:
        """Write summary.json."""
        stats = [
            RankStats(
                placement=where, totals=account.totals, overhead_s=1e-5 * self.number, hooked_iterations=self.number
            )
            for where, account in zip(self.placements, self.accounts, strict=True)
        ]
        facts: dict[str, Any] = {"gpu": "test GPU", "emulated": self.emulated, "backend": "emulated"}
        facts["dry_run"] = self.dry_run
        reporter = Reporter(self.folder, {"world_size": self.world_size, "stages": self.stages, **facts})
        has_plan = (self.folder / "plan.json").exists()
        reporter.update(
            stats,
            state,
            plan=self.plan if has_plan else None,
            planning_time_s=0.25,
            dropped_plans=0,
            predicted=self.predicted,
        )

    def iterate(self, count: int) -> None:
        """Iterations run; what they run as says the timetable."""
        for _ in range(count):
            self._iteration(self.timetable.at(self.number))
            self.number += 1
        self.recorders[0].use_schedule("1F1B", self.streams.__getitem__, self.stages)

    def _iteration(self, directive: Directive) -> None:
        clock_of = dict(self._clocks(directive))
        durations = [
            0.0 if i is None else time_s(i.kind, clock_of[i.stage][at], i.stage)
            for i, at in zip(self.graph.instructions, self._positions(), strict=True)
        ]
        starts, finishes = self.graph.times(np.array(durations))
        end_s = self.now_s + float(finishes.max()) + 0.001
        for recorder, account, where in zip(self.recorders, self.accounts, self.placements, strict=True):
            nodes = self.graph.stage_nodes[where.stage]
            operations, slots = hooked_operations(self.streams[where.stage])
            record = IterationRecord(
                self.number,
                "1F1B",
                operations,
                slots,
                undisturbed=self.last is not None and self.last.identity == directive.identity,
                begin_s=self.now_s,
                end_s=end_s,
                starts_s=(self.now_s + starts[nodes]).tolist(),
                ends_s=(self.now_s + finishes[nodes]).tolist(),
                directive=directive,
            )
            self.records[where.rank, self.number] = record
            self._measure(recorder, account, where, record, clock_of[where.stage])
        self.last = directive
        self.now_s = end_s + 0.0001

    def _positions(self) -> list[int]:
        """Per node its position among the instructions of its stage."""
        at = [0] * len(self.graph)
        for nodes in self.graph.stage_nodes:
            compute = [node for node in nodes.tolist() if self.graph.instructions[node] is not None]
            for position, node in enumerate(compute):
                at[node] = position
        return at

    def _clocks(self, directive: Directive) -> list[tuple[int, list[int]]]:
        if isinstance(directive, Follow):
            return [(stage, self.plan.clocks_mhz(stage)) for stage in range(self.stages)]
        clock = directive.frequency_mhz if isinstance(directive, Sweep) else CLOCKS_MHZ[0]
        return [(stage, [clock] * 2 * self.microbatches) for stage in range(self.stages)]

    def _measure(
        self, recorder: Recorder, account: Account, where: Placement, record: IterationRecord, clocks: list[int]
    ) -> None:
        directive = record.directive
        rows = [
            (start, end, clocks[slot], op)
            for start, end, slot, op in zip(
                record.starts_s, record.ends_s, record.slots, record.operations, strict=True
            )
            if isinstance(op, Compute)
        ]
        spent_j = sum(energy_j(op.kind, clock, where.stage) for _, _, clock, op in rows)
        busy_s = sum(end - start for start, end, _, _ in rows)
        used_j = spent_j + BLOCKING_W * (record.end_s - record.begin_s - busy_s)
        if is_sampled(self.timetable, record.number):
            for event in self._events(where, record, rows, used_j, isinstance(directive, FullClock)):
                recorder.helper_event(event)
        part = self.parts[where.stage]
        recorder.iteration(directive, record, self.timetable, {(part.version, part.schedule): part})
        sorts: list[str] = []
        if isinstance(directive, Follow) and record.undisturbed:
            sorts = [PLAN]
        elif isinstance(directive, Sweep):
            full = directive.kept and record.undisturbed and directive.frequency_mhz == CLOCKS_MHZ[0]
            sorts = [PROFILING, FULL_CLOCK] if full else [PROFILING]
        account.add(record.number, sorts, record.end_s - record.begin_s)
        before_j = self.counters_j[where.rank]
        self.counters_j[where.rank] += used_j
        account.add_reading(wire.Mark(begin_tag(record.number), record.begin_s, before_j, 1410, math.nan))
        account.add_reading(wire.Mark(end_tag(record.number), record.end_s, before_j + used_j, 1410, math.nan))
        if record.number % 50 == 0:
            recorder.step()

    def _events(
        self, where: Placement, record: IterationRecord, rows: list[Any], used_j: float, free: bool
    ) -> list[wire.Event]:
        """Requests where the clock changes, and a counter that ticks evenly and reads the clock asked for."""
        events: list[wire.Event] = []
        for start, _, clock, _ in rows:
            if not free and clock != self.locked_mhz[where.rank]:
                self.locked_mhz[where.rank] = clock
                events.append(wire.Applied(1, clock, start, 0.0, start, start + 0.0001))
        ticks = math.floor((record.end_s - record.begin_s) / TICK_S)
        power_w = used_j / (record.end_s - record.begin_s)
        for tick in range(1, ticks + 1):
            now_s = record.begin_s + tick * TICK_S
            clock = next((c for start, _, c, _ in reversed(rows) if start <= now_s), CLOCKS_MHZ[0])
            energy = self.counters_j[where.rank] + power_w * tick * TICK_S
            events.append(wire.Tick(now_s - 0.002, now_s, energy, clock, 0.0))
        return events


def noisy_profile(stages: int) -> Profile:
    """The profile of the factories, with standard errors."""
    return Profile.from_rows(
        (stage, kind, Measurement(clock, t, e, samples=20, time_se_s=0.002 * t, energy_se_j=0.01 * e))
        for stage, kind, clock in itertools.product(range(stages), ("forward", "backward"), CLOCKS_MHZ)
        for t, e in [(time_s(kind, clock, stage), energy_j(kind, clock, stage))]
    )


WAITING_W = {clock: 50.0 + 40.0 * (clock / CLOCKS_MHZ[0]) ** 2 for clock in CLOCKS_MHZ}


def with_waiting_power(profile: Profile) -> Profile:
    """The same with what waiting draws by clock."""
    return Profile.from_rows(
        (stage, kind, replace(row, blocking_power_w=WAITING_W[row.frequency_mhz]))
        for stage, kind, row in profile.rows()
    )
