"""Random jobs, and a simulation of one iteration that shares no code with the package's graph."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from hypothesis import strategies as st

from perseus_plugin.iteration.instructions import Compute, Constant, Receive, Send, StageStream
from perseus_plugin.iteration.schedules import early_recomputation_1f1b, gpipe, interleaved_1f1b, one_f_one_b
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.process import plan_for, with_errors
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.profiling.profile import Measurement, Profile


@dataclass(frozen=True)
class Job:
    streams: Sequence[StageStream]
    profile: Profile
    blocking_w: tuple[float, ...]
    latency_s: float = 0.0


def simulate(
    streams: Sequence[StageStream],
    duration_s: Callable[[int, Compute], float],
    constant_s: Mapping[tuple[int, str], float] | None = None,
    latency_s: float = 0.0,
    ran: list[tuple[int, Compute, float, float]] | None = None,
) -> float:
    """Iteration time by stepping every stage's clock through its stream until nothing moves any more.

    Every instruction is added to `ran`: its stage, itself, when it started and when it ended.
    """
    at, now = [0] * len(streams), [0.0] * len(streams)
    mail: dict[tuple[int, int, str], list[float]] = {}
    moved = True
    while moved:
        moved = False
        for stage, stream in enumerate(streams):
            while at[stage] < len(stream):
                op = stream[at[stage]]
                if isinstance(op, Compute):
                    begun = now[stage]
                    now[stage] += duration_s(stage, op)
                    if ran is not None:
                        ran.append((stage, op, begun, now[stage]))
                elif isinstance(op, Constant):
                    now[stage] += (constant_s or {}).get((stage, op.name), 0.0)
                elif isinstance(op, Send):
                    if op.blocking:
                        other = streams[op.peer][at[op.peer]] if at[op.peer] < len(streams[op.peer]) else None
                        if not (isinstance(other, Receive) and other.peer == stage and other.channel == op.channel):
                            break
                        now[stage] = now[op.peer] = max(now[stage], now[op.peer]) + latency_s
                        at[op.peer] += 1
                    else:
                        mail.setdefault((stage, op.peer, op.channel), []).append(now[stage] + latency_s)
                else:
                    letters = mail.get((op.peer, stage, op.channel))
                    if not letters:
                        break
                    now[stage] = max(now[stage], letters.pop(0))
                at[stage] += 1
                moved = True
    assert all(position == len(stream) for position, stream in zip(at, streams, strict=True)), "deadlock"
    return max(now)


def replay(job: Job, plan: Plan) -> tuple[float, float]:
    """Iteration time and energy of a plan, from the profile and the simulation alone."""
    clock = {
        (p.instruction.stage, p.instruction.kind, p.instruction.microbatch, p.instruction.chunk): p.frequency_mhz
        for stage in plan.stages
        for p in stage
    }
    spent = [0.0] * len(job.streams)
    busy = [0.0] * len(job.streams)

    def run(stage: int, op: Compute) -> float:
        wanted = clock[stage, op.kind, op.microbatch, op.chunk]
        row = next(m for m in job.profile.table[stage, op.kind] if m.frequency_mhz == wanted)
        spent[stage] += row.energy_j
        busy[stage] += row.time_s
        return row.time_s

    end = simulate(job.streams, run, latency_s=job.latency_s)
    waiting = sum(watts * (end - used) for watts, used in zip(job.blocking_w, busy, strict=True))
    return end, sum(spent) + waiting


def every_choice(job: Job, max_changes: int | None = None) -> list[tuple[float, float]]:
    """Iteration time and energy of all choices of clocks, blocking power until the end of each included.

    Args:
        job: small enough.
        max_changes: only those in which no stage changes its clock more often, the way back to its first one included.
    """
    instructions = [(s, op) for s, stream in enumerate(job.streams) for op in stream if isinstance(op, Compute)]
    found = []
    for rows in itertools.product(*(job.profile.table[s, op.kind] for s, op in instructions)):
        chosen = dict(zip(instructions, rows, strict=True))
        if max_changes is not None:
            by_stage = [
                [row.frequency_mhz for (s, _), row in chosen.items() if s == t] for t in range(len(job.streams))
            ]
            changes = [sum(a != b for a, b in zip(own, own[1:] + own[:1], strict=True)) for own in by_stage]
            if max(changes) > max_changes:
                continue
        end = simulate(job.streams, lambda s, op, chosen=chosen: chosen[s, op].time_s, latency_s=job.latency_s)
        energy = sum(row.energy_j - job.blocking_w[s] * row.time_s for (s, _), row in chosen.items())
        found.append((end, energy + sum(job.blocking_w) * end))
    return found


def brute_force(job: Job, deadline_s: float) -> float:
    """Least energy of all choices of clocks that meet the deadline."""
    in_time = [energy for end, energy in every_choice(job) if end <= deadline_s * (1 + 1e-12)]
    return min(in_time, default=float("inf"))


def blocking(streams: Sequence[StageStream]) -> list[StageStream]:
    """The same streams with sends that wait for their receiver."""
    return [[replace(op, blocking=True) if isinstance(op, Send) else op for op in stream] for stream in streams]


@st.composite
def schedules(draw: st.DrawFn, max_stages: int = 4, max_microbatches: int = 5) -> Sequence[StageStream]:
    """Streams of a random schedule."""
    stages = draw(st.integers(1, max_stages))
    microbatches = draw(st.integers(1, max_microbatches))
    kind = draw(st.sampled_from(["1f1b", "gpipe", "blocking gpipe", "early", "interleaved"]))
    if kind == "interleaved" and stages > 1:
        return interleaved_1f1b(stages, stages * draw(st.integers(1, 2)), chunks=2)
    if kind == "early":
        return early_recomputation_1f1b(stages, microbatches)
    if kind.endswith("gpipe"):
        streams = gpipe(stages, microbatches)
        return blocking(streams) if kind.startswith("blocking") else streams
    return one_f_one_b(stages, microbatches)


@st.composite
def profiles_for(draw: st.DrawFn, streams: Sequence[StageStream], max_clocks: int = 5) -> Profile:
    """Rows for every (stage, kind) of the streams; mostly sensible, with bumps, and each stage with its own clocks."""
    table = {}
    kinds = {op.kind for stream in streams for op in stream if isinstance(op, Compute)}
    for stage in range(len(streams)):
        clocks = draw(st.lists(st.integers(20, 140), min_size=1, max_size=max_clocks, unique=True))
        for kind in kinds:
            base, power = draw(st.floats(0.01, 2.0)), draw(st.floats(100.0, 400.0))
            share = draw(st.floats(0.2, 1.0))
            rows = []
            for clock in clocks:
                relative = clock / max(clocks)
                seconds = base * (share / relative + 1 - share) * draw(st.floats(0.97, 1.03))
                watts = power * (0.3 + 0.7 * relative**3) * draw(st.floats(0.97, 1.03))
                rows.append(Measurement(10 * clock, seconds, watts * seconds))
            table[stage, kind] = tuple(rows)
    return Profile(table)


@st.composite
def jobs(draw: st.DrawFn, max_stages: int = 4, max_microbatches: int = 5, max_clocks: int = 5) -> Job:
    """A random job."""
    streams = draw(schedules(max_stages, max_microbatches))
    profile = draw(profiles_for(streams, max_clocks))
    powers = draw(st.lists(st.floats(0.0, 90.0), min_size=len(streams), max_size=len(streams)))
    return Job(streams, profile, tuple(powers), draw(st.sampled_from([0.0, 0.0, 0.003])))


def bundled_profile(stages: int, clocks: Sequence[int] = (1400, 1200, 1000, 800, 600)) -> Profile:
    """A fixed profile whose last stage is the longest."""
    table = {}
    for stage in range(stages):
        for kind, base in (("forward", 0.050), ("backward", 0.095)):
            slower = 1.08 if stage == stages - 1 else 1.0 + 0.004 * stage
            rows = []
            for clock in clocks:
                relative = clock / clocks[0]
                seconds = base * slower * (0.75 / relative + 0.25)
                rows.append(Measurement(clock, seconds, (110 + 270 * relative**2.6) * seconds))
            table[stage, kind] = tuple(rows)
    return Profile(table)


def made_again(request: PlanRequest, answer: PlanAnswer) -> Plan:
    """A plan by what its job keeps of how it was made: nothing that was measured while iterations ran."""
    told = PlanAnswer.from_dict(json.loads(json.dumps(answer.to_dict())), 0.0)
    kept = replace(request, samples=None, overheads=told.overheads, made=told.made).as_made()
    return with_errors(kept, plan_for(kept))
