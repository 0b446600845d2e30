"""`summary.json`: one model, from which the file is written, read, printed and described.

What earlier runs did not write has a default, so that their files are read too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from perseus_plugin.errors import ReportError
from perseus_plugin.files import read_model
from perseus_plugin.planning.plan import Plan

SUMMARY_FILE = "summary.json"


def _finite(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _ratio(energy_j: float | None, time_s: float | None) -> float | None:
    return energy_j / time_s if energy_j is not None and time_s else None


Figure = Annotated[float | None, BeforeValidator(_finite)]
"""A number; None: not known (yet)."""
Interval = tuple[float, float] | None
"""Between what a figure lies, with 95 % confidence; None: not known (yet)."""


def _told(meaning: str, default: Any = ..., *, metric: bool = False) -> Any:
    return Field(default=default, description=meaning, json_schema_extra={"metric": True} if metric else None)


class _Section(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False, frozen=True, populate_by_name=True)


class Columns(_Section):
    """A figure per iteration."""

    full_clock: Figure = _told("at full clocks, on the same work", None)
    predicted: Figure = _told("by the plans", None)
    measured: Figure = _told("as run under the plans", None)


class Changed(_Section):
    """A share against full clocks, in percent."""

    predicted: Figure = _told("by the plans", None)
    measured: Figure = _told("as run under the plans", None)


class PredictedSection(_Section):
    """How well predictions are known."""

    saving_percent: Interval = _told("between what the predicted saving lies", None)


class ReferenceSection(_Section):
    """What references between iterations under the plan have shown, and what they cost."""

    iterations: int = _told("references so far", 0)
    blocks: int = _told("blocks of them that the intervals rest on", 0)
    saving_percent: Interval = _told("between what the measured saving lies", None)
    slowdown_percent: Interval = _told("between what the measured slowdown lies", None)
    energy_not_saved_j: Figure = _told("what the plan would have saved in them", None)


class ConfidenceSection(_Section):
    """What is known of the plan, given the errors of its profile."""

    level_percent: float = _told("how sure the two below are")
    saving_percent: tuple[float, float] = _told("between what the plan's saving lies, by the model")
    gap_at_most_percent: float = _told("how far its energy is above the optimum at most")


class PlanSection(_Section):
    """The newest plan; its own figures are the model's, of one GPU per stage."""

    schedule: str = _told("key of the schedule it is for", "")
    saving_percent: Figure = _told("energy saved by the model", None)
    gap_percent: float = _told("how far its energy is above its lower bound")
    confidence: ConfidenceSection | None = _told("how well that is known; null: the profile carries no errors", None)
    planning_time_s: float = _told("how long planning took")
    clock_changes_per_iteration: list[int] = _told("per stage", [])
    dropped_plans: int = _told("plans that did not hold so far")


class MeasuredSection(_Section):
    """Per iteration at a straggler's pace."""

    iteration_time_s: Figure = _told("mean time", None)
    energy_j: Figure = _told("mean energy, all GPUs", None)


class StragglerSection(_Section):
    """What stragglers were answered with; what was saved is estimated from the profile."""

    reports: int = _told("reports of others that were taken", 0)
    detections: int = _told("slow ranks that the session saw itself", 0)
    refused: int = _told("reports refused", 0)
    replans: int = _told("answers planned", 0)
    switches: int = _told("switches from one answer to another", 0)
    iterations: int = _told("iterations at a straggler's pace")
    energy_saved_j: float = _told("saved by the answers, estimated")
    time_saved_s: float = _told("saved by the answers, estimated", 0.0)
    measured: MeasuredSection = _told("what was measured meanwhile", MeasuredSection())


class ProfilingSection(_Section):
    """What profiling took more than full clocks."""

    extra_time_s: Figure = _told("time")
    extra_energy_j: Figure = _told("energy, all GPUs", None)


class CountsSection(_Section):
    """Iterations by what they count for.

    Of `all`, those that are neither `profiling`, `under_plans`, `straggler` nor references ran at full clocks besides.
    """

    full_clock: int = _told("at full clocks, in the sweep: part of `profiling`")
    profiling: int = _told("while profiling")
    plan: int = _told("under the newest plans: part of `under_plans`")
    under_plans: int = _told("under plans", 0)
    straggler: int = _told("at a straggler's pace", 0)
    all: int = _told("that ran, as far as the rank that saw most has told", 0)


class CatchingUpSection(_Section):
    """How often ranks were late and ran faster than planned."""

    late_iterations: int = _told("of the rank that was late most often", 0)
    iterations: int = _told("in which ranks could catch up", 0)
    raised_instructions: int = _told("run faster than planned, all ranks together", 0)
    raised_percent: Figure = _told("the same as a share of all instructions", None)
    extra_energy_per_iteration_j: Figure = _told("what that took, all GPUs, by the profile", None)


class WaitingSection(_Section):
    """At which clocks GPUs waited; all ranks together, over iterations under plans."""

    iterations: int = _told("in which waits had clocks of their own", 0)
    planned_waits: int = _told("waits that the plan gives a clock of their own", 0)
    lowered_waits: int = _told("of them, those that were spent at it", 0)
    woken_early: int = _told("of those, the ones that ended before the clock was back", 0)


class BatchesSection(_Section):
    """What came of batches that were announced."""

    announced: int = _told("iterations whose work was")
    planned: int = _told("of them, those that ran under a plan of their own, on rank 0")
    explained_percent: Figure = _told("share of the durations' variance that the work explains", None)
    error_percent: Figure = _told("what it leaves, as a share of a duration", None)
    margin_percent: Figure = _told("of such plans", None)
    saving_percent: Figure = _told("over the iterations that this was learned from", None)
    ended: str = _told("why batches are not planned for one by one; empty: they are", "")


class LimitSection(_Section):
    """For how much of the time of iterations the power limit held GPUs below the clock asked for; all that tell it."""

    full_clock_percent: Figure = _told("at full clocks", None)
    plan_percent: Figure = _told("under the plan", None)


class BesideSection(_Section):
    """What iterations took beside computing, loading and other work that is timed, when the plan was made."""

    time_s: Figure = _told("in an iteration", None)
    percent: Figure = _told("the same as a share of it", None)
    transfer_s: Figure = _told("how long a transfer between stages takes", None)
    once_s: Figure = _told("what an iteration takes once, transfers left away", None)


class OverheadSection(_Section):
    """What the plugin itself takes."""

    hook_time_per_iteration_s: Figure = _told("time on a training thread, mean over ranks", None)
    hook_time_percent: Figure = _told("the same as a share of an iteration", metric=True)
    switch_latency_p50_s: Figure = _told("how long a clock change takes, median, of the slowest GPU", None)
    switch_latency_p95_s: Figure = _told("the same, 95 % of changes", None)
    clock_requests: int = _told("asked of the driver, all ranks together", 0)
    late_switches: int = _told("switches to a plan that a rank heard of too late", 0)
    emulated_instructions: int = _told("instructions run on emulated GPUs", 0)
    emulated_instructions_overrun: int = _told("of them, those that the CPU was too slow for", 0)


class ValuedSection(_Section):
    """A sum of energies, each at the value of its moment."""

    total: Figure = _told("of all iterations", None)
    under_plans: Figure = _told("of those under plans", None)
    full_clocks: Figure = _told("of the same iterations, had they taken at those moments what full clocks take", None)
    full_clocks_between: Interval = _told("between what that lies", None)
    known_percent: Figure = _told("share of the energy whose value is known, and which alone is in these sums", None)


class WorthSection(_Section):
    """What energy was worth by the signals; of the GPUs alone, without what the site takes beside them."""

    energy_kwh: Figure = _told("of all iterations, all GPUs", None)
    currency: str = _told("of prices", "")
    money: ValuedSection = _told("what energy cost", ValuedSection())
    carbon_kg: ValuedSection = _told("what energy emitted, CO2", ValuedSection())


class Summary(_Section):
    """The whole of summary.json. Times and energies are means per iteration, energies of all GPUs of the job."""

    schema_name: Literal["perseus-summary"] = Field(
        default="perseus-summary", alias="schema", description="what this is"
    )
    version: Literal[1] = _told("of the format", 1)
    state: Literal["running", "finished", "crashed"] = _told("running is also what a killed job leaves")
    emulated: bool = _told("whether the figures are those of emulated GPUs")
    gpu: str = _told("name of the GPUs")
    backend: str = _told("who sets the clocks")
    dry_run: bool = _told("whether clocks are left alone outside the sweep (`enforce` is false)", False)
    ranks: int = _told("of the job")
    ranks_reporting: int = _told("whose figures are in here")
    stages: int = _told("of the pipeline")
    iteration_time_s: Columns = _told("iteration time")
    energy_j: Columns = _told("energy of an iteration")
    saving_percent: Changed = _told("energy saved against full clocks")
    slowdown_percent: Changed = _told("time beyond full clocks")
    predicted_between: PredictedSection = _told("how well predictions are known", PredictedSection())
    references: ReferenceSection = _told("iterations at full clocks between those under the plan", ReferenceSection())
    planned_schedules: dict[str, int] = _told("iterations under the plans, by key of the schedule", {})
    targets: dict[str, int] = _told("iterations from the first plan on, by the target that was in force", {})
    plan: PlanSection | None = _told("the newest plan; null: none (yet)")
    stragglers: StragglerSection | None = _told("what stragglers were answered with; null: not looked for", None)
    profiling: ProfilingSection = _told("what profiling took more than full clocks")
    iterations: CountsSection = _told("by what they count for")
    catching_up: CatchingUpSection = _told("ranks that were late", CatchingUpSection())
    waiting: WaitingSection = _told("at which clocks GPUs waited", WaitingSection())
    at_power_limit: LimitSection = _told(
        "share of the time for which the power limit held GPUs, as they tell", LimitSection()
    )
    beside: BesideSection = _told(
        "in an iteration, neither computing nor loading nor other timed work", BesideSection()
    )
    batches: BatchesSection | None = _told("announced batches; null: there were none", None)
    worth: WorthSection | None = _told("what energy was worth by the signals; null: there are none", None)
    overhead: OverheadSection = _told("what the plugin itself takes")

    @property
    def power_w(self) -> Columns:
        """Average power over an iteration, all GPUs of the job together."""
        energies, times = self.energy_j, self.iteration_time_s
        return Columns(
            full_clock=_ratio(energies.full_clock, times.full_clock),
            predicted=_ratio(energies.predicted, times.predicted),
            measured=_ratio(energies.measured, times.measured),
        )

    def predicts(self, plan: Plan) -> bool:
        """Whether it has a prediction, and that is of this plan alone."""
        told = self.plan
        return (
            self.saving_percent.predicted is not None
            and told is not None
            and told.schedule == plan.schedule
            and told.saving_percent is not None
            and len(self.planned_schedules) <= 1
            and math.isclose(told.saving_percent, 100 * plan.saving, abs_tol=1e-9)
        )

    @property
    def metrics(self) -> dict[str, float]:
        """Known figures of sections that are marked as metrics, by section and key: `overhead/hook_time_percent`."""
        found: dict[str, float] = {}
        for name, section in self:
            for key, field in type(section).model_fields.items() if isinstance(section, _Section) else ():
                extra, value = field.json_schema_extra, getattr(section, key)
                if isinstance(extra, dict) and extra.get("metric") and value is not None:
                    found[f"{name}/{key}"] = float(value)
        return found

    def to_json(self) -> str:
        """The content of the file."""
        return json.dumps(self.model_dump(by_alias=True), indent=2, allow_nan=False) + "\n"


def load_summary(path: Path) -> Summary:
    """Read summary.json.

    Raises:
        ReportError: it cannot be read, or is something else; the message names file, place and value.
    """
    return read_model(path, Summary, ReportError)
