"""A pipeline of emulated GPUs in virtual time: what a sweep sees of it, and what plans really take on it.

Nothing sleeps and nothing is late, so that a promise is held against what the same GPUs do with the plan, exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from perseus_plugin.exchange.messages import Placement, RankEstimate
from perseus_plugin.gpus.emulated.device import model_tables
from perseus_plugin.gpus.emulated.dynamics import Dynamics, Tables
from perseus_plugin.gpus.emulated.physics import WAITING, GpuModel, load_class
from perseus_plugin.iteration.instructions import Compute, Receive, Send, StageStream
from perseus_plugin.iteration.record import IterationRecord, hooked_operations
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.iteration.timetable import Sweep
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.collector import SweepCollector
from perseus_plugin.profiling.estimator import estimate_stage
from perseus_plugin.profiling.observations import StageEstimate, Tick
from perseus_plugin.profiling.survey import Survey, stage_estimates, survey_of

_POLL_S = 0.005
_FIRST_S = 10.0

ClockOf = Callable[[int, int], int]
"""The clock of a stage's compute instruction, by stage and position."""


class VirtualJob:
    """One pipeline, 1F1B, transfers take no time.

    Args:
        model: the GPUs.
        forward_s, backward_s: full-clock times per stage.
        microbatches: of an iteration.
        limit_w: the power limit that is set; None: the model's.

    Attributes:
        streams: what every stage executes.
        of_stages: what the last sweep found out, by stage.
    """

    def __init__(
        self,
        model: GpuModel,
        forward_s: Sequence[float],
        backward_s: Sequence[float],
        microbatches: int,
        limit_w: float | None = None,
    ) -> None:
        self.model = model
        self._work_s = {"forward": forward_s, "backward": backward_s}
        self.streams: list[StageStream] = [
            [replace(op, blocking=False) if isinstance(op, Send) else op for op in stream]
            for stream in one_f_one_b(len(forward_s), microbatches)
        ]
        tables = model_tables(model, model.tick_period_s, model.tick_period_s, 0.0)
        self._gpus = [
            _Watched(
                Dynamics(
                    _FIRST_S,
                    model.max_clock_mhz,
                    model.static_w,
                    ticks=int(_FIRST_S / model.tick_period_s),
                    dynamic_w=tables.dynamic_w[WAITING],
                    limit_w=model.limit_w if limit_w is None else limit_w,
                    spare_j=model.burst_j,
                ),
                tables,
            )
            for _ in forward_s
        ]
        self._number = 0
        self.of_stages: list[StageEstimate] = []

    def iterate(
        self, clock_of: ClockOf, edge_mhz: int, sizes: Sequence[float] = ()
    ) -> tuple[float, float, list[IterationRecord]]:
        """One iteration; waits are spent at the higher clock of the instructions beside them.

        Args:
            clock_of: the clocks.
            edge_mhz: the clock before the first and after the last instruction.
            sizes: of microbatches, as factors of the usual one; empty: all are usual.

        Returns:
            Its time, the energy of all GPUs, and what each stage saw.
        """
        begin_s, before_j = self._gpus[0].at_s, sum(gpu.energy_j for gpu in self._gpus)
        records = []
        for stream in self.streams:
            operations, slots = hooked_operations(stream)
            records.append(IterationRecord(self._number, "1F1B", operations, slots, undisturbed=True, begin_s=begin_s))
        self._run(records, clock_of, edge_mhz, sizes)
        end_s = max(record.ends_s[-1] for record in records)
        for gpu, record in zip(self._gpus, records, strict=True):
            gpu.wait_until(end_s)
            record.end_s = end_s
        self._number += 1
        return end_s - begin_s, sum(gpu.energy_j for gpu in self._gpus) - before_j, records

    def follow(self, plan: Plan, iterations: int) -> tuple[float, float]:
        """Mean time and energy of iterations under a plan, after one in which GPUs settle."""
        clocks = [[one.frequency_mhz for one in stage] for stage in plan.stages]
        return self._mean(lambda stage, slot: clocks[stage][slot], self.model.max_clock_mhz, iterations)

    def at(self, mhz: int, iterations: int) -> tuple[float, float]:
        """Mean time and energy of iterations at one clock, after one in which GPUs settle."""
        return self._mean(lambda stage, slot: mhz, mhz, iterations)

    def swept(self, order_mhz: Sequence[int], steps: int) -> Survey:
        """What a sweep over these clocks, in this order, with so many kept iterations at each finds out."""
        collectors = [SweepCollector(self.model.max_clock_mhz) for _ in self._gpus]
        for gpu in self._gpus:
            gpu.ticks.clear()
        for block, mhz in enumerate(order_mhz):
            for step in range(steps + 1):
                _, _, records = self.iterate(lambda stage, slot, mhz=mhz: mhz, mhz)
                for collector, record in zip(collectors, records, strict=True):
                    collector.add(Sweep(block, mhz, kept=step > 0), record)
        stages = len(self._gpus)
        told = []
        for stage, (collector, gpu) in enumerate(zip(collectors, self._gpus, strict=True)):
            for tick, capped_s in gpu.ticks:
                collector.add_tick(tick, capped_s)
            place = Placement(
                rank=stage, world_size=stages, stage=stage, stages=stages, replica=0, local_rank=stage, device="cpu"
            )
            told.append(
                RankEstimate(
                    placement=place,
                    gpu=self.model.name,
                    estimate=estimate_stage(collector.runs()).to_dict(),
                    constant_time_s={},
                    power_limit_w=self.model.most_w,
                )
            )
        self.of_stages = stage_estimates(told, stages)
        return survey_of(told, self.of_stages)

    def _mean(self, clock_of: ClockOf, edge_mhz: int, iterations: int) -> tuple[float, float]:
        self.iterate(clock_of, edge_mhz)
        ran = [self.iterate(clock_of, edge_mhz)[:2] for _ in range(iterations)]
        return sum(time_s for time_s, _ in ran) / iterations, sum(energy_j for _, energy_j in ran) / iterations

    def _run(
        self, records: Sequence[IterationRecord], clock_of: ClockOf, edge_mhz: int, sizes: Sequence[float]
    ) -> None:
        arrived: dict[tuple[int, int, str], list[float]] = {}
        taken: dict[tuple[int, int, str], int] = {}
        places, ready_s = [0] * len(self.streams), [record.begin_s for record in records]
        while any(place < len(stream) for place, stream in zip(places, self.streams, strict=True)):
            for stage, stream in enumerate(self.streams):
                while places[stage] < len(stream):
                    op = stream[places[stage]]
                    if isinstance(op, Send):
                        arrived.setdefault((stage, op.peer, op.channel), []).append(ready_s[stage])
                    elif isinstance(op, Receive):
                        way = (op.peer, stage, op.channel)
                        if len(arrived.get(way, ())) <= taken.get(way, 0):
                            break
                        ready_s[stage] = max(ready_s[stage], arrived[way][taken.get(way, 0)])
                        taken[way] = taken.get(way, 0) + 1
                    elif isinstance(op, Compute):
                        slot, of_stage = len(records[stage].ends_s), len(records[stage].slots)
                        mhz = clock_of(stage, slot)
                        before_mhz = clock_of(stage, slot - 1) if slot else edge_mhz
                        after_mhz = clock_of(stage, slot + 1) if slot + 1 < of_stage else edge_mhz
                        work_s = self._work_s[op.kind][stage] * (sizes[op.microbatch] if sizes else 1.0)
                        gpu = self._gpus[stage]
                        gpu.wait_until(ready_s[stage], max(before_mhz, mhz))
                        records[stage].starts_s.append(gpu.at_s)
                        gpu.work(op.kind, work_s, mhz)
                        records[stage].ends_s.append(gpu.at_s)
                        ready_s[stage] = gpu.at_s
                        gpu.clock(max(mhz, after_mhz))
                    places[stage] += 1


class _Watched:
    """A GPU whose energy counter is polled."""

    def __init__(self, dynamics: Dynamics, tables: Tables) -> None:
        self._dynamics, self._tables = dynamics, tables
        self._shown_j = dynamics.shown_j(tables)
        self.ticks: list[tuple[Tick, float]] = []

    @property
    def at_s(self) -> float:
        return self._dynamics.at_s

    @property
    def energy_j(self) -> float:
        return self._dynamics.energy_j

    def clock(self, mhz: int) -> None:
        self._dynamics.pending = [(self._dynamics.at_s, mhz)]

    def wait_until(self, to_s: float, mhz: int | None = None) -> None:
        if mhz is not None:
            self.clock(mhz)
        while self._dynamics.at_s < to_s:
            before_s = self._dynamics.at_s
            self._dynamics.advance(self._tables, min(to_s, before_s + _POLL_S))
            shown_j = self._dynamics.shown_j(self._tables)
            if shown_j != self._shown_j:
                tick = Tick(before_s, self._dynamics.at_s, shown_j)
                self.ticks.append((tick, self._dynamics.capped_s))
                self._shown_j = shown_j

    def work(self, kind: str, full_clock_s: float, mhz: int) -> None:
        self.clock(mhz)
        self._dynamics.advance(self._tables, self._dynamics.at_s + 1e-12)
        load = load_class(kind)
        self._dynamics.begin_work(self._tables, load, full_clock_s, self._tables.dynamic_w[load], 0.0)
        self.wait_until(self._dynamics.completes_s(self._tables))
