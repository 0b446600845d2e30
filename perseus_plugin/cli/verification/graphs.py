"""Replays of a CUDA graph: does the time since its launch say where the GPU is, as clocks by host time suppose?"""

from __future__ import annotations

import queue
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from perseus_plugin.cli.verification.arithmetic import extra_s, pattern, spread
from perseus_plugin.cli.verification.measuring import Subject
from perseus_plugin.cli.verification.running import bounded
from perseus_plugin.control.graphed import OF_LATE, GraphClocks
from perseus_plugin.errors import GpuError
from perseus_plugin.exchange.messages import PhasesPart
from perseus_plugin.reporting.verification import GraphReplays

_FIRST = 3  # replays whose times make the plan that the others are held against
_LEAST = _FIRST + 2 * OF_LATE + 1
_LONGEST_WAIT_S = 10.0
_ANY_MHZ = 1000  # no clock is set: phases are only for their times


@dataclass(frozen=True)
class Replay:
    """What was seen of one.

    Attributes:
        called_s, returned_s: the call that launches it.
        launched_s: when the GPU got to it, as a session takes that.
        passed_s: when the host saw its begin and each of its instructions' end.
        ended_s: when it ended, as a session takes that.
        read: whether another process read the GPU meanwhile.
    """

    called_s: float
    returned_s: float
    launched_s: float
    passed_s: Sequence[float]
    ended_s: float
    read: bool

    @property
    def took_s(self) -> float:
        """From its launch to its end."""
        return self.ended_s - self.launched_s


def measure_graphs(subject: Subject, seconds: float) -> GraphReplays:
    """Replay the pattern's step, with another process reading the GPU in every other replay.

    Raises:
        GpuError: there are no graphs here, or a replay does not end.
    """
    bench, watch = subject.bench, subject.watch
    steps, _ = pattern(subject.times_s)
    captured = bench.capture(steps)
    if captured is None:
        raise GpuError("graphs were not tried: an emulated GPU runs no kernels")
    found: list[Replay] = []
    reached: queue.SimpleQueue[float] = queue.SimpleQueue()
    try:
        with bounded(bench) as boundaries:
            end_s = time.monotonic() + seconds
            while time.monotonic() < end_s or len(found) < _LEAST:
                read = len(found) % 2 == 1
                watch.go_on() if read else watch.pause()
                bench.settle()
                boundaries.reach(reached.put)
                called_s = time.monotonic()
                captured.replay()
                returned_s = time.monotonic()
                boundaries.reach(reached.put)
                passed_s = captured.passed_s()
                launched_s, ended_s = (reached.get(timeout=_LONGEST_WAIT_S) for _ in range(2))
                found.append(Replay(called_s, returned_s, launched_s, passed_s, ended_s, read))
    finally:
        watch.go_on()
        bench.settle()
    return figures_of(found)


def figures_of(found: Sequence[Replay]) -> GraphReplays:
    """What replays show, the first ones as the plan that the others are held against. Pure.

    Args:
        found: more than three, every other one read.
    """
    planned_s = [
        statistics.median(times)
        for times in zip(*([at_s - one.launched_s for at_s in one.passed_s] for one in found[:_FIRST]), strict=True)
    ]
    clocks = GraphClocks(
        PhasesPart(
            clocks_mhz=(_ANY_MHZ,) * (len(planned_s) - 1),
            starts_s=tuple(planned_s[:-1]),
            end_s=statistics.median(one.took_s for one in found[:_FIRST]),
            iteration_s=planned_s[-1],
        )
    )
    errors_s, allowed = list[float](), list[bool]()
    for number, one in enumerate(found):
        fit = clocks.fit
        if number >= _FIRST:
            for at_s, plan_s in zip(one.passed_s[1:], planned_s[1:], strict=True):
                after_s = at_s - one.launched_s
                errors_s.append(after_s - fit.begin_s - fit.pace * plan_s)
                allowed.append(fit.earliest_s(plan_s) <= after_s <= fit.latest_s(plan_s))
        clocks.saw(one.took_s)
    took_s = [one.took_s for one in found]
    pairs = list(zip(found[2::2], found[1::2], strict=False))  # quiet, read; the first one warms up
    longer_s, longer_se_s = extra_s([quiet.took_s for quiet, _ in pairs], [read.took_s for _, read in pairs])
    usual_s = statistics.median(took_s)
    return GraphReplays(
        replays=len(found),
        marks=len(planned_s) - 1,
        replay_ms=spread(took_s, 1e3),
        jitter_percent=100 * statistics.stdev(took_s[1:]) / usual_s,
        call_us=spread([one.returned_s - one.called_s for one in found], 1e6),
        begin_us=spread([one.passed_s[0] - one.called_s for one in found], 1e6),
        seen_us=spread([one.passed_s[-1] - one.ended_s for one in found], 1e6),
        where_us=spread(errors_s, 1e6),
        within_percent=100 * statistics.mean(allowed),
        read_percent=100 * longer_s / usual_s,
        read_se_percent=100 * longer_se_s / usual_s,
    )
