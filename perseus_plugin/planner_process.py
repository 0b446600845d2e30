"""The planner in a process of its own, so that planning takes neither the interpreter nor the cores from training.

`PlannerProcess` is the side of rank 0; `python -m perseus_plugin.planner_process PARENT` is the other. One JSON line
per request and per answer; the process ends when its standard input does, so it cannot outlive the trainer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from perseus_plugin.errors import PerseusError, PlanError
from perseus_plugin.instructions import StreamOp, stream_from_rows, stream_to_rows
from perseus_plugin.planning.paced import Pace, pace_from_dict, pace_to_dict
from perseus_plugin.planning.plan import Plan, plan_from_json, plan_to_json
from perseus_plugin.profiling.profile import Measurement, Profile

if TYPE_CHECKING:
    from perseus_plugin.planning.planner import Planner
    from perseus_plugin.planning.targets import ChangeLimits, Effort


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
class PlanRequest:
    """Everything a plan depends on.

    Attributes:
        schedule: the schedule's name.
        streams: one per stage.
        constant_time_s: duration of constant-time work by (stage, name).
        profile: time and energy per (stage, kind) and clock.
        blocking_power_w: one per stage.
        slowdown: target against full clocks, as a share.
        margin: share by which slowed instructions are planned to end before they are needed.
        effort: quick, normal or thorough.
        max_changes, min_dwell_s: limits on clock changes.
        full_clock_only: (stage, kind) that must not be slowed.
        pace: plan for stragglers instead; None: one plan for the slowdown.
    """

    schedule: str
    streams: Sequence[Sequence[StreamOp]]
    constant_time_s: dict[tuple[int, str], float]
    profile: Profile
    blocking_power_w: Sequence[float]
    slowdown: float
    margin: float = 0.0
    effort: str = "quick"
    max_changes: int | None = None
    min_dwell_s: float = 0.0
    full_clock_only: frozenset[tuple[int, str]] = frozenset()
    pace: PaceRequest | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "schedule": self.schedule,
            "streams": [stream_to_rows(stream) for stream in self.streams],
            "constant_time_s": [[stage, name, t] for (stage, name), t in self.constant_time_s.items()],
            "profile": [[stage, kind, m.to_row()] for stage, kind, m in self.profile.rows()],
            "blocking_power_w": list(self.blocking_power_w),
            "slowdown": self.slowdown,
            "margin": self.margin,
            "effort": self.effort,
            "max_changes": self.max_changes,
            "min_dwell_s": self.min_dwell_s,
            "full_clock_only": [list(pair) for pair in sorted(self.full_clock_only)],
            "pace": None if self.pace is None else asdict(self.pace),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PlanRequest:
        """Inverse of `to_dict`."""
        return cls(
            schedule=data["schedule"],
            streams=[stream_from_rows(rows) for rows in data["streams"]],
            constant_time_s={(stage, name): t for stage, name, t in data["constant_time_s"]},
            profile=Profile.from_rows((stage, kind, Measurement.from_row(row)) for stage, kind, row in data["profile"]),
            blocking_power_w=data["blocking_power_w"],
            slowdown=data["slowdown"],
            margin=data["margin"],
            effort=data["effort"],
            max_changes=data["max_changes"],
            min_dwell_s=data["min_dwell_s"],
            full_clock_only=frozenset((stage, kind) for stage, kind in data["full_clock_only"]),
            pace=None if data["pace"] is None else PaceRequest.from_dict(data["pace"]),
        )


def plan_for(request: PlanRequest) -> Plan:
    """Plan in this process.

    Raises:
        PerseusError: there is no such plan, or the request is inconsistent.
    """
    from perseus_plugin.planning.targets import Target

    effort: Effort = request.effort  # type: ignore[assignment]
    return planner_for(request).plan(Target.slowdown(request.slowdown), limits_of(request), effort)


def planner_for(request: PlanRequest) -> Planner:
    """The planner of a request's job, its margin kept.

    Raises:
        PerseusError: the request is inconsistent.
    """
    from perseus_plugin.pipeline import build_graph
    from perseus_plugin.planning.planner import Planner

    return Planner(
        build_graph(request.streams, request.constant_time_s),
        _with_margin(request.profile, request.margin, request.blocking_power_w),
        blocking_power_w=request.blocking_power_w,
        full_clock_only=request.full_clock_only,
        schedule=request.schedule,
    )


def limits_of(request: PlanRequest) -> ChangeLimits:
    """A request's limits on clock changes."""
    from perseus_plugin.planning.targets import ChangeLimits

    return ChangeLimits(request.max_changes, request.min_dwell_s)


def pace_for(request: PlanRequest) -> Pace:
    """Answer stragglers in this process.

    Raises:
        PerseusError: there is no such plan, or the request is inconsistent.
    """
    from perseus_plugin.pipeline import build_graph
    from perseus_plugin.planning.pace import plan_pace

    assert request.pace is not None  # the caller looked
    return plan_pace(
        build_graph(request.streams, request.constant_time_s),
        request.profile,
        request.pace.variants,
        clocks_mhz=request.pace.clocks_mhz,
        blocking_power_w=request.blocking_power_w,
        slowdown=request.slowdown,
        at_least_s=request.pace.at_least_s,
        planned_on=lambda profile: _with_margin(profile, request.margin, request.blocking_power_w),
        limits=limits_of(request),
        effort=request.effort,  # type: ignore[arg-type]
        full_clock_only=request.full_clock_only,
        schedule=request.schedule,
    )


def _with_margin(profile: Profile, margin: float, blocking_power_w: Sequence[float]) -> Profile:
    """The profile with everything below the top clock taking longer by the margin.

    A plan for it has slowed instructions end that much before they are needed, and stays feasible at any margin, since
    full clocks are as fast as ever. In the time between the GPU waits, so the energy is that of the instruction and of
    blocking for that long.
    """
    if margin <= 0:
        return profile

    def later(stage: int, m: Measurement) -> Measurement:
        # A list that is too short is the planner's to refuse.
        watts = blocking_power_w[stage] if stage < len(blocking_power_w) else 0.0
        extra_s = m.time_s * margin
        return replace(m, time_s=m.time_s + extra_s, energy_j=m.energy_j + watts * extra_s)

    return Profile(
        {
            (stage, kind): (rows[0], *(later(stage, m) for m in rows[1:]))
            for (stage, kind), rows in profile.table.items()
        }
    )


@dataclass(frozen=True)
class PlanAnswer:
    """What came back: a plan (or an answer to stragglers) and the seconds it took, or why there is none."""

    plan: Plan | None
    planning_time_s: float
    error: str = ""
    pace: Pace | None = None


class PlannerProcess:
    """Starts the planner and asks it; every method returns at once.

    The process starts ahead of the first request, so that loading the solver costs no time when a plan is wanted.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "perseus_plugin.planner_process", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        )
        self._answer: PlanAnswer | None = None
        self._busy = False

    @property
    def busy(self) -> bool:
        """Whether a request is being worked on."""
        return self._busy

    def submit(self, request: PlanRequest) -> None:
        """Begin a request; one at a time."""
        if self._busy:
            raise PlanError("planner: a request is being worked on already")
        self._busy, self._answer = True, None
        threading.Thread(target=self._ask, args=(request,), name="perseus-planner", daemon=True).start()

    def poll(self) -> PlanAnswer | None:
        """The answer to the last request, once; None while there is none."""
        answer, self._answer = self._answer, None
        return answer

    def close(self) -> None:
        """End the process."""
        with suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        try:
            self._process.wait(timeout=1.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _ask(self, request: PlanRequest) -> None:
        begin_s = time.monotonic()
        pace = None
        try:
            assert self._process.stdin is not None  # both are pipes, see Popen
            assert self._process.stdout is not None
            self._process.stdin.write(json.dumps(request.to_dict()) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
            if not line:
                raise PlanError(f"planner process ended with status {self._process.poll()}")
            reply = json.loads(line)
            error, text = reply["error"], reply["plan"]
            plan = None if text is None else plan_from_json(text)
            pace = None if reply["pace"] is None else pace_from_dict(reply["pace"])
        except OSError:
            plan, error = None, f"planner process ended with status {self._process.poll()}; see its message above"
        except (ValueError, KeyError, PerseusError) as failure:
            plan, error = None, str(failure)
        self._answer = PlanAnswer(plan, time.monotonic() - begin_s, error, pace)
        self._busy = False


def end_with(parent: int) -> None:
    """End when the trainer is gone, even if a process it forked still holds our standard input open."""
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(0)


def main() -> None:
    """Answer requests on standard input until it ends."""
    threading.Thread(target=end_with, args=(int(sys.argv[1]),), daemon=True).start()
    with suppress(OSError):
        os.nice(5)  # the trainer comes first
    import perseus_plugin.planning.planner  # noqa: F401  (loads OR-Tools before the first request)

    for line in sys.stdin:
        text, pace, error = None, None, ""
        try:
            request = PlanRequest.from_dict(json.loads(line))
            if request.pace is None:
                text = plan_to_json(plan_for(request))
            else:
                pace = pace_to_dict(pace_for(request))
        except Exception as failure:
            error = str(failure) if isinstance(failure, PerseusError) else repr(failure)
        print(json.dumps({"plan": text, "pace": pace, "error": error}), flush=True)


if __name__ == "__main__":
    main()
