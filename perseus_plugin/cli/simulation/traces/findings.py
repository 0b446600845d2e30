"""What a traced job shows by itself: whether its graph explains its iterations, and who is slow. Pure."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from perseus_plugin.cli.simulation.traces.traced import TracedJob
from perseus_plugin.iteration.graph import FloatArray, build_graph
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.planning.calibration import fitted, with_transfers
from perseus_plugin.planning.replay import finishes

FAULTY = 1.1
"""A stage that is so many times as slow as in the median replica has a fault of its own, or another batch."""
LASTING = 0.75
"""Share of the steps in which a stage has to be slow to be so for long."""
_SELDOM = 0.1  # less often is not worth a line
_SAME = 0.5  # share of the steps in which one replica is the slowest, if it is always the same
_MATTERS = 0.01  # share of an iteration that the slowest replica has to be behind to be a straggler


@dataclass(frozen=True, slots=True)
class Spread:
    """How long the instructions of a kind take in a stage.

    Attributes:
        stage, kind: which.
        mean_s: over all steps and replicas.
        p10_s, p90_s: one in ten is shorter, one in ten longer.
        within: standard deviation about the mean of their own iteration, as a share of that mean.
    """

    stage: int
    kind: str
    mean_s: float
    p10_s: float
    p90_s: float
    within: float


@dataclass(frozen=True, slots=True)
class Explained:
    """How well the graph gives the iteration times that were traced.

    Attributes:
        transfer_s: what a transfer between stages takes, by what fits best.
        end_s: what an iteration takes once, beside its instructions and transfers: an optimizer, gradients reduced.
        traced_s: how long an iteration takes, as a median; NaN: the trace does not say.
        error_mean, error_worst: by which the graph is off, as shares of the iteration; NaN likewise.
    """

    transfer_s: float
    end_s: float
    traced_s: float
    error_mean: float
    error_worst: float

    @property
    def overheads(self) -> Overheads:
        """As the planner takes them."""
        return Overheads(self.transfer_s, self.end_s)


@dataclass(frozen=True, slots=True)
class SlowStage:
    """A stage of a replica that is slow.

    Attributes:
        replica, stage: which.
        steps: share of the steps in which it is.
        times: how many times as long as in the median replica its work takes in these.
        kinds: the same by kind of work, over all steps.
    """

    replica: int
    stage: int
    steps: float
    times: float
    kinds: dict[str, float]

    @property
    def lasts(self) -> bool:
        """Whether it is slow for long."""
        return self.steps >= LASTING


@dataclass(frozen=True, slots=True)
class Stragglers:
    """Who makes others wait.

    Attributes:
        sort: "none", "same" (one replica is mostly the slowest) or "rotating".
        behind: how much longer the slowest replica takes than the median one, as a share, on average.
        slowest: by replica, the share of the steps in which it is the slowest, the most often first.
        work: (stage, kind) in which the slowest replica mostly loses its time; None: there is no straggler.
        stages: slow stages, the most often first.
    """

    sort: Literal["none", "same", "rotating"]
    behind: float
    slowest: dict[int, float]
    work: tuple[int, str] | None
    stages: tuple[SlowStage, ...]


def spreads(job: TracedJob) -> list[Spread]:
    """By stage and kind."""
    found = []
    for (stage, kind), nodes in job.classes.items():
        took = job.durations_s[:, :, nodes]
        own_mean = np.maximum(took.mean(axis=2, keepdims=True), 1e-12)
        low_s, high_s = np.percentile(took, (10, 90))
        within = float(np.sqrt(np.mean((took / own_mean - 1) ** 2)))
        found.append(Spread(stage, kind, float(took.mean()), float(low_s), float(high_s), within))
    return sorted(found, key=lambda one: (one.stage, one.kind))


def explained(job: TracedJob) -> Explained:
    """Fit a time per transfer and one per iteration, and hold the graph against the traced iterations."""
    with_unit = build_graph(job.streams, latency_s=1.0)
    durations_s, starts_s = _columns(job.durations_s), _columns(job.starts_s)
    timed = np.isfinite(job.times_s)
    if not timed.any():
        transfer_s, _ = fitted(with_unit, durations_s, None, starts_s)
        return Explained(transfer_s, 0.0, math.nan, math.nan, math.nan)
    told = np.repeat(timed, len(job.replicas))
    times_s = job.times_s[timed]
    transfer_s, end_s = fitted(with_unit, durations_s[:, told], times_s, starts_s[:, told])
    finish_s = finishes(with_transfers(with_unit, transfer_s), durations_s[:, told]).max(axis=0)
    off = np.abs(finish_s.reshape(len(times_s), -1).max(axis=1) + end_s - times_s) / times_s
    return Explained(transfer_s, end_s, float(np.median(times_s)), float(off.mean()), float(off.max()))


def stage_paces(job: TracedJob) -> FloatArray:
    """Shape (steps, replicas, stages): how many times as long as in the step's median replica the work takes.

    Of a single replica: as in its own median step.
    """
    work_s = np.stack([job.durations_s[:, :, nodes].sum(axis=2) for nodes in job.graph.stage_nodes], axis=2)
    usual_s = np.median(work_s, axis=1 if len(job.replicas) > 1 else 0, keepdims=True)
    paces: FloatArray = work_s / np.maximum(usual_s, 1e-12)
    return paces


def faulty_replicas(job: TracedJob) -> npt.NDArray[np.bool_]:
    """Shape (replicas,): those with a stage that is slow over all steps together."""
    by_stage = np.stack([job.durations_s[:, :, nodes].mean(axis=(0, 2)) for nodes in job.graph.stage_nodes])
    faulty: npt.NDArray[np.bool_] = (by_stage > FAULTY * np.median(by_stage, axis=1, keepdims=True)).any(axis=0)
    return faulty


def stragglers(job: TracedJob, explains: Explained) -> Stragglers:
    """Who is slow, how often, and in which work."""
    return Stragglers(*_slowest(job, explains), tuple(_slow_stages(job)))


def _slowest(
    job: TracedJob, explains: Explained
) -> tuple[Literal["none", "same", "rotating"], float, dict[int, float], tuple[int, str] | None]:
    steps, replicas = job.durations_s.shape[:2]
    if replicas == 1:
        return "none", 0.0, {}, None
    graph = build_graph(job.streams, latency_s=explains.transfer_s)
    own_s = finishes(graph, _columns(job.durations_s)).max(axis=0).reshape(steps, replicas)
    behind = float(np.mean(own_s.max(axis=1) / np.median(own_s, axis=1) - 1))
    last = own_s.argmax(axis=1)
    slowest = {job.replicas[one]: count / steps for one, count in Counter(last.tolist()).most_common()}
    if behind < _MATTERS:
        return "none", behind, slowest, None
    lost_s = {}
    for key, nodes in job.classes.items():
        took = job.durations_s[:, :, nodes].sum(axis=2)
        lost_s[key] = float((took[np.arange(steps), last] - np.median(took, axis=1)).sum())
    same = next(iter(slowest.values())) >= _SAME
    return "same" if same else "rotating", behind, slowest, max(lost_s, key=lambda key: lost_s[key])


def _slow_stages(job: TracedJob) -> list[SlowStage]:
    paces, found = stage_paces(job), []
    by_kind = {key: job.durations_s[:, :, nodes].mean(axis=(0, 2)) for key, nodes in job.classes.items()}
    for place, replica in enumerate(job.replicas):
        for stage in range(job.stages):
            slow = paces[:, place, stage] > FAULTY
            if slow.mean() >= _SELDOM:
                kinds = {
                    kind: float(means[place] / max(float(np.median(means)), 1e-12))
                    for (its_stage, kind), means in by_kind.items()
                    if its_stage == stage
                }
                times = float(np.median(paces[slow, place, stage]))
                found.append(SlowStage(replica, stage, float(slow.mean()), times, kinds))
    return sorted(found, key=lambda one: (-one.steps, -one.times))


def _columns(of_nodes: FloatArray) -> FloatArray:
    """Shape (nodes, steps times replicas)."""
    columns: FloatArray = np.ascontiguousarray(of_nodes.reshape(-1, of_nodes.shape[2]).T)
    return columns
