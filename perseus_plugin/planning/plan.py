"""The plan: one clock per instruction, what it is predicted to take, and how far it can be from the optimum."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from perseus_plugin.errors import PlanError, figure, shown, validation_problem
from perseus_plugin.files import read_text, write_atomically
from perseus_plugin.iteration.bounds import MOST_COUNT, MOST_MHZ, MOST_S, Clock, Count, PositiveTime, Time
from perseus_plugin.iteration.instructions import Instruction
from perseus_plugin.planning.power.planned import PlannedBudget, PlannedPeaks, PlannedPower


@dataclass(frozen=True, slots=True)
class PlannedInstruction:
    """One instruction of a plan.

    Attributes:
        instruction: which.
        frequency_mhz: SM clock to run it at.
        start_s, finish_s: predicted, from the start of the iteration.
    """

    instruction: Instruction
    frequency_mhz: int
    start_s: float
    finish_s: float


@dataclass(frozen=True, slots=True)
class PlannedWait:
    """A wait of one stage that is spent at a clock of its own.

    Attributes:
        after: position, in the stage's execution order, of the instruction that it follows; -1: it comes before the
            first.
        frequency_mhz: SM clock to wait at.
        start_s, finish_s: predicted, from the start of the iteration.
    """

    after: int
    frequency_mhz: int
    start_s: float
    finish_s: float


@dataclass(frozen=True, slots=True)
class Confidence:
    """How well a plan's promises are known, given the errors of its profile; see `planning.confidence`.

    Attributes:
        level: share of profiles, drawn within their errors, for which this holds.
        saving: lowest and highest, as shares.
        gap_at_most: how far the energy is above the optimum at most, as a share.
    """

    level: float
    saving: tuple[float, float]
    gap_at_most: float

    def __str__(self) -> str:
        low, high = self.saving
        return f"{100 * self.level:.0f} %: {100 * low:.1f} to {100 * high:.1f} %"


@dataclass(frozen=True, slots=True)
class Plan:
    """One clock per instruction. Energies are of one GPU per stage over a whole iteration, blocking included.

    Attributes:
        schedule: name of the schedule it was made for.
        microbatches: microbatches per iteration.
        deadline_s: iteration time that was allowed.
        iteration_time_s: predicted; not above `deadline_s`.
        energy_j: predicted.
        energy_lower_bound_j: no plan that meets the deadline takes less.
        baseline_time_s, baseline_energy_j: every instruction at the profile's highest clock.
        stages: per stage its instructions in execution order.
        confidence: None where the profile's errors are not known.
        cut_short: whether the clock ended the search, so that another one may find another plan; see `planning.work`.
        waits: per stage, in order, the waits with a clock of their own. All others are spent at the higher clock of
            the two instructions beside them; before the first and after the last at full clocks. Empty: there are none
            in any stage.
        waits_until_s: when something else ends the iteration; None: it ends with its last instruction.
        power: of a plan for a power budget, what it draws of that; None of all others.
    """

    schedule: str
    microbatches: int
    deadline_s: float
    iteration_time_s: float
    energy_j: float
    energy_lower_bound_j: float
    baseline_time_s: float
    baseline_energy_j: float
    stages: tuple[tuple[PlannedInstruction, ...], ...]
    confidence: Confidence | None = None
    cut_short: bool = False
    waits: tuple[tuple[PlannedWait, ...], ...] = ()
    waits_until_s: float | None = None
    power: PlannedPower | None = None

    @property
    def power_w(self) -> float:
        """Average power of one GPU per stage together, over an iteration."""
        return self.energy_j / (self.iteration_time_s if self.waits_until_s is None else self.waits_until_s)

    @property
    def promise(self) -> str:
        """What is known of saving and gap, for people."""
        if self.confidence is None:
            return (
                f"{figure(100 * self.saving, '.1f')} % less energy predicted, at most "
                f"{figure(100 * self.gap, '.2f')} % above the optimum of the profile, whose errors are not known"
            )
        return (
            f"{figure(100 * self.saving, '.1f')} % less energy predicted ({self.confidence}), at most "
            f"{figure(100 * self.confidence.gap_at_most, '.2f')} % above the optimum"
        )

    @property
    def gap(self) -> float:
        """How far the energy is above its lower bound, as a share of the bound."""
        return self.energy_j / self.energy_lower_bound_j - 1

    @property
    def saving(self) -> float:
        """Energy saved against the baseline, as a share of the baseline."""
        return 1 - self.energy_j / self.baseline_energy_j

    @property
    def slowdown(self) -> float:
        """Iteration time beyond the baseline's, as a share of it."""
        return self.iteration_time_s / self.baseline_time_s - 1

    def clocks_mhz(self, stage: int) -> list[int]:
        """The clocks of one stage's instructions in execution order."""
        return [planned.frequency_mhz for planned in self.stages[stage]]

    def waits_of(self, stage: int) -> tuple[PlannedWait, ...]:
        """One stage's waits with a clock of their own."""
        return self.waits[stage] if self.waits else ()

    @property
    def wait_clocks_mhz(self) -> tuple[tuple[tuple[int, int], ...], ...]:
        """Per stage its waits with a clock of their own: the position of the instruction before, and the clock."""
        return tuple(tuple((wait.after, wait.frequency_mhz) for wait in stage) for stage in self.waits)

    def clock_changes(self, stage: int) -> int:
        """How often the clock changes in one stage per iteration, from the last instruction to the first included.

        A wait counts with the changes that it adds. Before the first and after the last instruction there are full
        clocks anyway, so that a clock of its own adds one there.
        """
        clocks = self.clocks_mhz(stage)
        changes = sum(a != b for a, b in zip(clocks, [*clocks[1:], *clocks[:1]], strict=True))
        for wait in self.waits_of(stage):
            beside = clocks[max(wait.after, 0) : wait.after + 2]
            changes += sum(wait.frequency_mhz != clock for clock in beside) - (len(set(beside)) - 1)
        return changes


_ROUNDING_S = 1e-6


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Baseline(_Strict):
    iteration_time_s: PositiveTime
    energy_j: Annotated[float, Field(gt=0)]


class _Confidence(_Strict):
    level: Annotated[float, Field(gt=0, lt=1)]
    saving: Annotated[list[float], Field(min_length=2, max_length=2)]
    gap_at_most: Annotated[float, Field(ge=0)]


class _Budget(_Strict):
    name: str
    allowed_w: Annotated[float, Field(gt=0)]
    planned_w: Annotated[float, Field(ge=0)]


class _Peaks(_Strict):
    window_s: PositiveTime
    job_w: Annotated[float, Field(ge=0)]
    node_w: Annotated[float, Field(ge=0)]
    gpu_w: Annotated[float, Field(ge=0)]


class _Power(_Strict):
    job_w: Annotated[float, Field(ge=0)]
    budgets: list[_Budget]
    peaks: _Peaks
    time_lower_bound_s: PositiveTime
    converged: bool


_Wait: TypeAlias = tuple[
    Annotated[int, Field(ge=-1)],
    Clock,
    Time,
    Time,
]


class _PlanFile(_Strict):
    schema_name: Literal["perseus-plan"] = Field(alias="schema")
    version: Literal[1]
    schedule: str
    microbatches: Annotated[Count, Field(ge=1)]
    deadline_s: PositiveTime
    iteration_time_s: PositiveTime
    energy_j: Annotated[float, Field(gt=0)]
    energy_lower_bound_j: Annotated[float, Field(gt=0)]
    gap: float
    baseline: _Baseline
    stages: Annotated[list[list[list[str | int]]], Field(min_length=1)]
    predicted_s: list[list[Annotated[list[float], Field(min_length=2, max_length=2)]]]
    confidence: _Confidence | None = None
    cut_short: bool = False
    waits: list[list[_Wait]] = []
    waits_until_s: Annotated[float, Field(gt=0)] | None = None
    power: _Power | None = None


def plan_to_json(plan: Plan) -> str:
    """The content of `plan.json`.

    `stages` holds `[kind, microbatch, frequency_mhz]`, and the chunk where not 0; `waits` holds
    `[after, frequency_mhz, start_s, finish_s]`.
    """
    known = plan.confidence
    content = _PlanFile(
        schema="perseus-plan",
        version=1,
        schedule=plan.schedule,
        microbatches=plan.microbatches,
        deadline_s=plan.deadline_s,
        iteration_time_s=plan.iteration_time_s,
        energy_j=plan.energy_j,
        energy_lower_bound_j=plan.energy_lower_bound_j,
        gap=plan.gap,
        baseline=_Baseline(iteration_time_s=plan.baseline_time_s, energy_j=plan.baseline_energy_j),
        stages=[[_row(p) for p in stage] for stage in plan.stages],
        predicted_s=[[[p.start_s, p.finish_s] for p in stage] for stage in plan.stages],
        confidence=None
        if known is None
        else _Confidence(level=known.level, saving=list(known.saving), gap_at_most=known.gap_at_most),
        cut_short=plan.cut_short,
        waits=[[(w.after, w.frequency_mhz, w.start_s, w.finish_s) for w in stage] for stage in plan.waits],
        waits_until_s=plan.waits_until_s,
        power=None if plan.power is None else _Power.model_validate(asdict(plan.power), strict=False),
    )
    return json.dumps(content.model_dump(by_alias=True, exclude_defaults=True), allow_nan=False) + "\n"


def _row(planned: PlannedInstruction) -> list[str | int]:
    one = planned.instruction
    return [one.kind, one.microbatch, planned.frequency_mhz, *([one.chunk] if one.chunk else [])]


def plan_from_json(text: str) -> Plan:
    """Read what `plan_to_json` wrote.

    Raises:
        PlanError: naming the place and the reason.
    """
    try:
        file = _PlanFile.model_validate_json(text)
    except ValidationError as error:
        raise PlanError(validation_problem(error, _PlanFile)) from error
    if len(file.stages) != len(file.predicted_s):
        raise PlanError(f"predicted_s: {len(file.predicted_s)} stages; stages has {len(file.stages)}")
    if file.waits and len(file.waits) != len(file.stages):
        raise PlanError(f"waits: {len(file.waits)} stages; stages has {len(file.stages)}")
    for stage, waits in enumerate(file.waits):
        order = [after for after, *_ in waits]
        if order != sorted(set(order)) or (order and order[-1] >= len(file.stages[stage])):
            raise PlanError(f"waits.{stage}: after {order}; allowed: rising, below {len(file.stages[stage])}")
    stages = []
    for stage, (rows, times) in enumerate(zip(file.stages, file.predicted_s, strict=True)):
        if len(rows) != len(times):
            raise PlanError(f"predicted_s.{stage}: {len(times)} entries; stages.{stage} has {len(rows)}")
        stages.append(
            tuple(_planned(stage, at, row, pair) for at, (row, pair) in enumerate(zip(rows, times, strict=True)))
        )
    plan = Plan(
        schedule=file.schedule,
        microbatches=file.microbatches,
        deadline_s=file.deadline_s,
        iteration_time_s=file.iteration_time_s,
        energy_j=file.energy_j,
        energy_lower_bound_j=file.energy_lower_bound_j,
        baseline_time_s=file.baseline.iteration_time_s,
        baseline_energy_j=file.baseline.energy_j,
        stages=tuple(stages),
        confidence=None if file.confidence is None else _confidence(file.confidence),
        cut_short=file.cut_short,
        waits=tuple(tuple(PlannedWait(*wait) for wait in stage) for stage in file.waits),
        waits_until_s=file.waits_until_s,
        power=None if file.power is None else _power(file.power),
    )
    if not math.isclose(plan.gap, file.gap, abs_tol=1e-9):
        raise PlanError(f"gap: got {file.gap}; energy_j and energy_lower_bound_j make it {plan.gap}")
    return plan


def _power(file: _Power) -> PlannedPower:
    return PlannedPower(
        job_w=file.job_w,
        budgets=tuple(PlannedBudget(one.name, one.allowed_w, one.planned_w) for one in file.budgets),
        peaks=PlannedPeaks(file.peaks.window_s, file.peaks.job_w, file.peaks.node_w, file.peaks.gpu_w),
        time_lower_bound_s=file.time_lower_bound_s,
        converged=file.converged,
    )


def _confidence(file: _Confidence) -> Confidence:
    low, high = file.saving
    return Confidence(file.level, (low, high), file.gap_at_most)


def _planned(stage: int, at: int, row: list[str | int], times: list[float]) -> PlannedInstruction:
    match row:
        case [str(kind), int(microbatch), int(frequency), *rest] if (
            kind and 0 <= microbatch <= MOST_COUNT and 0 < frequency <= MOST_MHZ and len(rest) <= 1
        ):
            chunk = rest[0] if rest else 0
            if isinstance(chunk, int) and 0 <= chunk <= MOST_COUNT:
                if not -_ROUNDING_S <= times[0] <= times[1] <= MOST_S:
                    raise PlanError(f"predicted_s.{stage}.{at}: got {shown(times)}; allowed: start and finish, rising")
                return PlannedInstruction(Instruction(stage, kind, microbatch, chunk), frequency, *times)
    raise PlanError(f"stages.{stage}.{at}: got {shown(row)}; allowed: [kind, microbatch, frequency_mhz]")


def save_plan(plan: Plan, path: Path | str) -> None:
    """Write `plan.json`, through a temporary file and a rename.

    Raises:
        OSError: the file cannot be written.
    """
    write_atomically(Path(path), plan_to_json(plan))


def load_plan(path: Path | str) -> Plan:
    """Read `plan.json`.

    Raises:
        PlanError: naming the file, the place and the reason.
    """
    try:
        return plan_from_json(read_text(path))
    except (OSError, ValueError) as error:
        raise PlanError(f"{path}: cannot read the plan: {error}") from error
    except PlanError as error:
        raise PlanError(f"{path}: {error}") from error
