"""What the planner is asked and what it answers, as data that passes through JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from perseus_plugin.iteration.instructions import StageStream
from perseus_plugin.iteration.replayed import InForce, Overheads, Replayed, Samples, StageCatchUp
from perseus_plugin.planning.paced import Pace, pace_from_dict, pace_to_dict
from perseus_plugin.planning.plan import Plan, plan_from_json, plan_to_json
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.streams import stream_to_json, streams_from_json
from perseus_plugin.planning.targets import Target
from perseus_plugin.profiling.profile import Measurement, Profile


@dataclass(frozen=True)
class PaceRequest:
    """What an answer to stragglers depends on beside all that a plan does; see `planning.pace.plan_pace`.

    Attributes:
        variants: slowdown per stage, for each sort of pipeline.
        clocks_mhz: the job's plan, per stage.
        at_least_s: lower bound on the pace.
    """

    variants: tuple[tuple[float, ...], ...]
    clocks_mhz: tuple[tuple[int, ...], ...]
    at_least_s: float = 0.0

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PaceRequest:
        """From plain JSON data."""
        return cls(
            tuple(tuple(variant) for variant in data["variants"]),
            tuple(tuple(clocks) for clocks in data["clocks_mhz"]),
            data["at_least_s"],
        )


@dataclass(frozen=True)
class Made:
    """How the answer to a request was made of it, so that it can be made again without the iterations it was held over.

    Attributes:
        target, margin, effort, search, lower_while_waiting, max_changes, full_clocks, drawn: see `PlanRequest`.
    """

    target: Target
    margin: float
    effort: str
    search: bool
    lower_while_waiting: bool
    max_changes: int | None = None
    full_clocks: bool = False
    drawn: float = 1.0


@dataclass(frozen=True)
class PlanRequest:
    """Everything a plan depends on.

    Attributes:
        schedule: the schedule's name.
        streams: one per stage.
        constant_time_s: duration of constant-time work by (stage, name).
        profile: time and energy per (stage, kind) and clock.
        blocking_power_w: one per stage.
        blocking_power_se_w: its standard error, None: unknown.
        target: what to plan for.
        limit: binds whatever the target says: what would draw more is planned to draw no more instead.
        margin: share by which slowed instructions are planned to end before they are needed.
        effort: quick, normal or thorough.
        max_changes, min_dwell_s: limits on clock changes.
        full_clock_only: (stage, kind) that must not be slowed.
        pace: plan for stragglers instead; None: one plan for the target.
        samples: measured iterations, over which the plan has to hold; None: the profile's means are all there is.
        quantile: share of those iterations that have to keep to their time.
        catch_up: whether late ranks may catch up.
        latency_s: how long a clock change takes; None: unknown.
        lower_while_waiting: whether waits may be spent at clocks of their own, where the latency is known.
        in_force: the plan that is followed; if it holds over the samples, no other is made.
        overheads: what iterations take beside the work that is known; None: as the samples tell.
        search: whether clocks are searched for, or only rounded, which takes milliseconds.
        refine_s: a better plan than the one in force is looked for, at lowest priority and for about so long; 0: no.
        full_clocks: every instruction at full clocks, so that waits alone can have other ones.
        drawn: share of a power budget that is planned to be drawn.
        jitter: the step is one CUDA graph whose clocks change by time, and an instruction's duration and an iteration's
            pace vary by such shares: margin and number of clock changes are chosen for that. None: as they are given.
        made: of a request that was answered, how.
    """

    schedule: str
    streams: Sequence[StageStream]
    constant_time_s: dict[tuple[int, str], float]
    profile: Profile
    blocking_power_w: Sequence[float]
    target: Target = field(default_factory=Target.slowdown)
    margin: float = 0.0
    effort: str = "quick"
    max_changes: int | None = None
    min_dwell_s: float = 0.0
    full_clock_only: frozenset[tuple[int, str]] = frozenset()
    pace: PaceRequest | None = None
    samples: Samples | None = None
    quantile: float = 0.9
    catch_up: bool = False
    latency_s: float | None = None
    lower_while_waiting: bool = True
    in_force: InForce | None = None
    overheads: Overheads | None = None
    blocking_power_se_w: float | None = None
    limit: PowerBudget | None = None
    search: bool = True
    refine_s: float = 0.0
    full_clocks: bool = False
    drawn: float = 1.0
    jitter: tuple[float, float] | None = None
    made: Made | None = None

    def how(self) -> Made:
        """How its plan is made."""
        return Made(**{one.name: getattr(self, one.name) for one in fields(Made)})

    def as_made(self) -> PlanRequest:
        """The request that has the same answer and no measured iterations."""
        how = self.made or self.how()
        changes = {one.name: getattr(how, one.name) for one in fields(Made)}
        return replace(
            self, samples=None, in_force=None, limit=None, pace=None, refine_s=0.0, jitter=None, made=None, **changes
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "schedule": self.schedule,
            "streams": [stream_to_json(stream) for stream in self.streams],
            "constant_time_s": [[stage, name, t] for (stage, name), t in self.constant_time_s.items()],
            "profile": [[stage, kind, m.to_row()] for stage, kind, m in self.profile.rows()],
            "blocking_power_w": list(self.blocking_power_w),
            "target": self.target.to_dict(),
            "margin": self.margin,
            "effort": self.effort,
            "max_changes": self.max_changes,
            "min_dwell_s": self.min_dwell_s,
            "full_clock_only": [list(pair) for pair in sorted(self.full_clock_only)],
            "pace": None if self.pace is None else asdict(self.pace),
            "samples": None if self.samples is None else asdict(self.samples),
            "quantile": self.quantile,
            "catch_up": self.catch_up,
            "latency_s": self.latency_s,
            "lower_while_waiting": self.lower_while_waiting,
            "in_force": None if self.in_force is None else asdict(self.in_force),
            "overheads": None if self.overheads is None else asdict(self.overheads),
            "blocking_power_se_w": self.blocking_power_se_w,
            "limit": None if self.limit is None else Target.power_budget(self.limit).to_dict(),
            "search": self.search,
            "refine_s": self.refine_s,
            "full_clocks": self.full_clocks,
            "drawn": self.drawn,
            "jitter": self.jitter,
        }

    def pieces(self) -> Iterator[str]:
        """`to_dict` as JSON, piece by piece: no other thread of the interpreter runs while one is being encoded."""
        data = replace(self, samples=None, streams=()).to_dict()
        del data["samples"], data["streams"]
        yield json.dumps(data)[:-1] + ', "streams": ['
        for number, stream in enumerate(self.streams):
            yield (", " if number else "") + json.dumps(stream_to_json(stream))
        yield '], "samples": '
        if self.samples is None:
            yield "null}"
            return
        between = "{"
        for one in fields(self.samples):
            yield f'{between}"{one.name}": ['
            for number, iteration in enumerate(getattr(self.samples, one.name)):
                yield ", [" if number else "["
                for replica, stages in enumerate(iteration):
                    yield (", " if replica else "") + json.dumps(stages)
                yield "]"
            yield "]"
            between = ", "
        yield "}}"

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanRequest:
        """Inverse of `to_dict`."""
        return cls(
            schedule=data["schedule"],
            streams=streams_from_json(data["streams"]),
            constant_time_s={(stage, name): t for stage, name, t in data["constant_time_s"]},
            profile=Profile.from_rows((stage, kind, Measurement.from_row(row)) for stage, kind, row in data["profile"]),
            blocking_power_w=data["blocking_power_w"],
            target=Target.from_dict(data["target"]),
            margin=data["margin"],
            effort=data["effort"],
            max_changes=data["max_changes"],
            min_dwell_s=data["min_dwell_s"],
            full_clock_only=frozenset((stage, kind) for stage, kind in data["full_clock_only"]),
            pace=None if data["pace"] is None else PaceRequest.from_dict(data["pace"]),
            samples=None if data["samples"] is None else Samples.from_dict(data["samples"]),
            quantile=data["quantile"],
            catch_up=data["catch_up"],
            latency_s=data["latency_s"],
            lower_while_waiting=data["lower_while_waiting"],
            in_force=None if data["in_force"] is None else InForce.from_dict(data["in_force"]),
            overheads=None if data["overheads"] is None else Overheads(**data["overheads"]),
            blocking_power_se_w=data["blocking_power_se_w"],
            limit=None if data["limit"] is None else Target.from_dict(data["limit"]).budget,
            search=data["search"],
            refine_s=data["refine_s"],
            full_clocks=data["full_clocks"],
            drawn=data["drawn"],
            jitter=None if data["jitter"] is None else (data["jitter"][0], data["jitter"][1]),
        )


@dataclass(frozen=True)
class PlanAnswer:
    """What came back: a plan (or an answer to stragglers) and the seconds it took, or why there is none.

    Attributes:
        plan: the plan; None without an error where the one in force stays.
        planning_time_s: what it took.
        error: why there is none.
        pace: answer to stragglers.
        replayed: what measured iterations said of the plan; None where there were none.
        held: what they said of the plan in force, if there is one.
        catch_up: per stage what its ranks need to know to catch up; empty where they do not, or where what they have
            been told of the plan in force still holds.
        paced_catch_up: the same for each of the pace's variants.
        overheads: what iterations were taken to take beside the work that is known.
        cut_short: whether the clock ended a search that the answer depends on.
        lost: there is none as the planner's process was lost each time that it was asked.
        dropped: there is none as it was not wanted any more.
        uniform: one clock for all that keeps the request's limit, or else the lowest; None: it has none.
        made: how the plan was made; None: there is none.
    """

    plan: Plan | None
    planning_time_s: float
    error: str = ""
    pace: Pace | None = None
    replayed: Replayed | None = None
    held: Replayed | None = None
    catch_up: tuple[StageCatchUp, ...] = ()
    paced_catch_up: tuple[tuple[StageCatchUp, ...], ...] = ()
    overheads: Overheads = field(default_factory=Overheads)
    cut_short: bool = False
    lost: bool = False
    dropped: bool = False
    uniform: Plan | None = None
    made: Made | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "plan": None if self.plan is None else plan_to_json(self.plan),
            "error": self.error,
            "pace": None if self.pace is None else pace_to_dict(self.pace),
            "replayed": None if self.replayed is None else asdict(self.replayed),
            "held": None if self.held is None else asdict(self.held),
            "catch_up": [asdict(stage) for stage in self.catch_up],
            "paced_catch_up": [[asdict(stage) for stage in variant] for variant in self.paced_catch_up],
            "overheads": asdict(self.overheads),
            "cut_short": self.cut_short,
            "uniform": None if self.uniform is None else plan_to_json(self.uniform),
            "dropped": self.dropped,
            "made": None if self.made is None else {**asdict(self.made), "target": self.made.target.to_dict()},
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any], planning_time_s: float) -> PlanAnswer:
        """Inverse of `to_dict`."""
        return cls(
            plan=None if data["plan"] is None else plan_from_json(data["plan"]),
            planning_time_s=planning_time_s,
            error=data["error"],
            pace=None if data["pace"] is None else pace_from_dict(data["pace"]),
            replayed=None if data["replayed"] is None else Replayed.from_dict(data["replayed"]),
            held=None if data["held"] is None else Replayed.from_dict(data["held"]),
            catch_up=tuple(StageCatchUp.from_dict(stage) for stage in data["catch_up"]),
            paced_catch_up=tuple(
                tuple(StageCatchUp.from_dict(stage) for stage in variant) for variant in data["paced_catch_up"]
            ),
            overheads=Overheads(**data["overheads"]),
            cut_short=data["cut_short"],
            uniform=None if data["uniform"] is None else plan_from_json(data["uniform"]),
            dropped=data["dropped"],
            made=None
            if data["made"] is None
            else Made(**{**data["made"], "target": Target.from_dict(data["made"]["target"])}),
        )
