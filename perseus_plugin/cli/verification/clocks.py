"""With `--set-clocks`: how long changes take, and what waiting draws at each clock."""

from __future__ import annotations

import itertools
import time

from perseus_plugin.cli.verification.arithmetic import Steady, spread, steady
from perseus_plugin.cli.verification.measuring import Subject
from perseus_plugin.control.clock_log import DEVIATION_MHZ
from perseus_plugin.control.helper.latency import POLL_S, REST_S, TIMEOUT_S
from perseus_plugin.control.wire import Applied
from perseus_plugin.profiling.sweep import choose_clocks
from perseus_plugin.reporting.verification import Switch, WaitingAtClock

_LOWEST = 0.5  # of the highest clock: below that no plan goes
_PAIRED, _WAITED = 4, 6  # clocks
_AWAKE_S = 0.15  # for a change and back: an idle GPU may be slower
_LATE_S = 2.0  # until a request has reached the driver


def measure_switches(subject: Subject, rounds: int, seconds: float) -> list[Switch]:
    """Every change between some clocks, up and down; the lock is given up at the end.

    Args:
        subject: whose clocks.
        rounds: how often each change is made; fewer when the time is up, but once in any case.
        seconds: how long it may take.
    """
    supported = subject.gpu.supported_clocks_mhz()
    clocks = choose_clocks(supported, _PAIRED, round(_LOWEST * supported[0]))
    seen_s: dict[tuple[int, int], list[float]] = {pair: [] for pair in itertools.permutations(clocks, 2)}
    unseen = dict.fromkeys(seen_s, 0)
    end_s = time.monotonic() + seconds
    for turn in range(rounds):
        if turn and time.monotonic() > end_s:
            break
        for before_mhz, after_mhz in seen_s:
            subject.bench.occupy(_AWAKE_S)
            _ask(subject, before_mhz)
            time.sleep(REST_S)
            taken_s = _change_s(subject, after_mhz)
            if taken_s is None:
                unseen[before_mhz, after_mhz] += 1
            else:
                seen_s[before_mhz, after_mhz].append(taken_s)
            subject.bench.settle()
    subject.watch.helper.request(None)
    return [
        Switch(
            from_mhz=before_mhz,
            to_mhz=after_mhz,
            latency_ms=spread(values, 1e3) if values else None,
            unseen=unseen[before_mhz, after_mhz],
        )
        for (before_mhz, after_mhz), values in seen_s.items()
    ]


def measure_waiting_at(subject: Subject, seconds: float) -> list[WaitingAtClock]:
    """Waiting as in the pattern, and without work, at some clocks; the lock is given up at the end."""
    supported = subject.gpu.supported_clocks_mhz()
    found = []
    seconds = subject.watch.long_enough_s(seconds)
    for clock_mhz in choose_clocks(supported, _WAITED, round(_LOWEST * supported[0])):
        _ask(subject, clock_mhz)
        at_work = _steady(subject, seconds, spin=True)
        idle = _steady(subject, seconds, spin=False)
        found.append(
            WaitingAtClock(
                clock_mhz=clock_mhz, read_mhz=at_work.clock_mhz, power_w=at_work.power_w, idle_w=idle.power_w
            )
        )
    subject.watch.helper.request(None)
    return found


def _steady(subject: Subject, seconds: float, *, spin: bool) -> Steady:
    subject.bench.settle()
    begin_s = time.monotonic()
    if spin:
        subject.bench.queue_wait(seconds)
        subject.bench.settle()
    else:
        time.sleep(seconds)
    end_s = time.monotonic()
    time.sleep(0.15)  # the last change of the counter within it may not have been told yet
    return steady(subject.watch.ticks(), [(begin_s + (end_s - begin_s) / 3, end_s)])


def _change_s(subject: Subject, target_mhz: int) -> float | None:
    """Seconds from the driver call for a clock until it is read back; None if it never is."""
    asked_s = time.monotonic()
    reached_s = _ask(subject, target_mhz)
    if reached_s is None:
        return None
    called = _called(subject, target_mhz, asked_s)
    return None if called is None else reached_s - called.called_s


def _ask(subject: Subject, target_mhz: int) -> float | None:
    """Ask for a clock and look until it is there: when that was; None if it never is."""
    end_s = time.monotonic() + TIMEOUT_S
    subject.watch.helper.request(target_mhz)
    while time.monotonic() < end_s:
        if abs(subject.gpu.read_clock_mhz() - target_mhz) <= DEVIATION_MHZ:
            return time.monotonic()
        time.sleep(POLL_S)
    return None


def _called(subject: Subject, target_mhz: int, asked_s: float) -> Applied | None:
    """The request as it reached the driver; None if it was there before, or never did."""
    end_s = time.monotonic() + _LATE_S
    while time.monotonic() < end_s:
        for event in reversed(subject.watch.applied()):
            if event.requested_s < asked_s:
                break
            if event.frequency_mhz == target_mhz:
                return event
        if not subject.watch.helper.alive:
            return None
        time.sleep(0.005)
    return None
