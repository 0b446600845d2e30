"""`verify.json` for people: tables, and a page of them that works offline. Pure."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass

from perseus_plugin.errors import figure
from perseus_plugin.reporting.report.document import cards, document, table
from perseus_plugin.reporting.report.phrases import Rows
from perseus_plugin.reporting.verification import Estimator, KindOfWork, Spread, Verification


@dataclass(frozen=True)
class Part:
    """A table with what it means."""

    title: str
    text: str
    rows: Rows


def parts(found: Verification) -> Iterator[Part]:
    """Everything that was measured."""
    yield Part(
        "Reading the GPU",
        "Time that one call takes while the GPU works, in microseconds. The helper process makes such calls, never the "
        "training thread.",
        [_SPREAD_HEAD, *(_spread_row(name, spread) for name, spread in found.calls_us.items())],
    )
    if (seen := found.boundaries) is not None:
        more = (
            ""
            if seen.drift_ppm is None
            else f" The GPU's event clock runs {figure(seen.drift_ppm, '+.1f')} ppm off the host's."
        )
        yield Part(
            "When instructions begin and end",
            "In microseconds. The error is that of the recorded time, against an event that is spun on; that reference "
            f"itself is late by at most {seen.reference_us:.0f} µs. Mean error {figure(seen.bias_us, '+.1f')} µs "
            "(+: recorded too late). Late is what is done at a boundary: a clock request goes out so much after the "
            "GPU got there." + more,
            [
                _SPREAD_HEAD,
                _spread_row("error of the time", seen.error_us),
                _spread_row("late, Python idle", seen.late_us),
                _spread_row("late, Python computes", seen.late_busy_us),
                _spread_row("late, Python queues kernels", seen.late_queueing_us),
            ],
        )
    if (cost := found.hooks) is not None:
        yield Part(
            "Cost of the hooks",
            f"Two boundaries per instruction; instructions of {cost.instruction_ms:.1f} ms.",
            [
                ("", "per instruction"),
                ("calls on the training thread, median", f"{cost.call_us.median:.1f} µs"),
                ("the same, 95 %", f"{cost.call_us.p95:.1f} µs"),
                ("as a share of the instruction", f"{cost.share_percent:.3f} %"),
                ("longer where the CPU is the bottleneck", f"{figure(cost.host_bound_us, '+.1f')} µs"),
                ("longer where the GPU is", f"{figure(cost.gpu_bound_us, '+.1f')} ± {cost.gpu_bound_se_us:.1f} µs"),
            ],
        )
    if (graphs := found.graphs) is not None:
        yield Part(
            "Replays of a CUDA graph",
            f"A step of the pattern captured as one CUDA graph, replayed {graphs.replays} times; in each, the host saw "
            f"when the GPU passed {graphs.marks} places. Where it is, is foretold from the replays before, as where "
            f"clocks change by host time: {graphs.within_percent:.1f} % of the places were passed within what is "
            "allowed for there.",
            [
                _SPREAD_HEAD,
                _spread_row("a replay (ms)", graphs.replay_ms),
                _spread_row("the call that launches it (µs)", graphs.call_us),
                _spread_row("from that call until it is seen to run (µs)", graphs.begin_us),
                _spread_row("its end is seen after (µs)", graphs.seen_us),
                _spread_row("a place's foretold time is off by (µs)", graphs.where_us),
                ("replays vary by (standard deviation)", f"{graphs.jitter_percent:.3f} %", "", "", ""),
                (
                    "longer while another process reads the GPU",
                    f"{figure(graphs.read_percent, '+.3f')} ± {graphs.read_se_percent:.3f} %",
                    *[""] * 3,
                ),
            ],
        )
    if (counter := found.counter) is not None:
        yield Part(
            "Energy counter",
            "What one change of the counter measures: a stretch of time (window) that ended some time (lag) before. A "
            "window as long as the period misses nothing.",
            [
                ("", "ms"),
                ("period, median", number(counter.period_ms, 1)),
                ("period, 95 % at most", number(counter.period_p95_ms, 1)),
                ("window, as fitted", number(counter.window_ms, 1)),
                ("lag, as fitted", number(counter.lag_ms, 1)),
                ("period of the instantaneous power", number(counter.power_period_ms, 1)),
            ],
        )
    for title, tested in (
        ("Energy of an instruction", found.estimator),
        ("Energy of an instruction, at the power limit", found.at_the_limit),
    ):
        if tested is None:
            continue
        yield Part(
            title,
            f"The profiling sweep's estimator on {tested.iterations} iterations of a pipeline's pattern "
            f"({tested.seconds:.0f} s, {tested.waiting_percent:.0f} % waiting), against long steady runs of each kind "
            "alone in turns with it. Where clocks differ between the two, so does the energy itself.",
            _columns(tested),
        )
    if found.waiting:
        yield Part(
            "Waiting, no clock locked",
            "What the GPU draws in each way of waiting.",
            [
                ("way of waiting", "power (W)", "SM clock (MHz)", "watched (s)"),
                *(
                    (one.how, number(one.power_w, 1), number(one.clock_mhz, 0), f"{one.seconds:.1f}")
                    for one in found.waiting
                ),
            ],
        )
    if found.switches:
        yield Part(
            "Clock changes",
            "From the call to the driver until the SM clock reads the new value, in milliseconds.",
            [
                ("from (MHz)", "to (MHz)", "median", "95 %", "seen", "not seen"),
                *(
                    (
                        str(one.from_mhz),
                        str(one.to_mhz),
                        *(
                            ("-", "-", "0")
                            if one.latency_ms is None
                            else (
                                f"{one.latency_ms.median:.1f}",
                                f"{one.latency_ms.p95:.1f}",
                                str(one.latency_ms.samples),
                            )
                        ),
                        str(one.unseen),
                    )
                    for one in found.switches
                ),
            ],
        )
    if found.waiting_at:
        yield Part(
            "Waiting by clock",
            "At locked clocks: waiting as in the pattern, and without any work.",
            [
                ("asked for (MHz)", "read (MHz)", "waiting (W)", "no work (W)"),
                *(
                    (str(one.clock_mhz), number(one.read_mhz, 0), number(one.power_w, 1), number(one.idle_w, 1))
                    for one in found.waiting_at
                ),
            ],
        )


def machine_line(found: Verification) -> str:
    """What was looked at, and when."""
    machine = found.machine
    software = [f"{name} {version}" for name, version in machine.software.items()]
    driver = [f"driver {machine.driver}"] if machine.driver else []
    clocks = "clocks were set" if found.set_clocks else "read-only: no clock was set"
    return " · ".join([machine.gpu, *driver, *software, found.date, f"{found.seconds:.0f} s", clocks])


EMULATED = "Emulated GPU: every figure below is a model's or this CPU's, and none is a GPU's."


def page(found: Verification) -> str:
    """The whole file."""
    note = f'<section class="note"><b>{EMULATED}</b></section>' if found.machine.emulated else ""
    sections = [
        f"<section><h2>{html.escape(part.title)}</h2><p class='muted'>{html.escape(part.text)}</p>"
        f"{table(part.rows)}</section>"
        for part in parts(found)
    ]
    missing = "".join(f"<li>{html.escape(f'{name}: {why}')}</li>" for name, why in found.missing.items())
    return document(
        f"Perseus verify: {found.machine.gpu}",
        [
            f'<h1>Perseus verify</h1><div class="muted">{html.escape(machine_line(found))}</div>{note}',
            cards(headline(found)),
            *sections,
            f"<section><h2>Not measured</h2><ul>{missing}</ul></section>" if missing else "",
            f'<p class="muted">{html.escape(found.machine.backend)} · perseus_plugin '
            f"{html.escape(found.perseus_plugin)}</p>",
        ],
    )


def headline(found: Verification) -> list[tuple[str, str, str]]:
    """The figures that matter most, as (name, value, more)."""
    made = []
    if found.estimator is not None:
        errors = [abs(one.error_percent) for one in found.estimator.kinds if one.error_percent is not None]
        if errors:
            made.append(
                ("energy of an instruction", f"{max(errors):.1f} % off", "against long steady runs, the worse kind")
            )
    if found.hooks is not None:
        made.append(("cost of the hooks", f"{found.hooks.share_percent:.3f} %", "of an instruction, training thread"))
    if found.boundaries is not None:
        made.append(("time of a boundary", f"{found.boundaries.error_us.median:.0f} µs off", "median"))
    if found.counter is not None:
        window = f"{number(found.counter.window_ms, 0)} ms window, {number(found.counter.lag_ms, 0)} ms lag"
        made.append(("energy counter moves every", f"{number(found.counter.period_ms, 0)} ms", window))
    return made


def number(value: float | None, digits: int) -> str:
    """A figure, or that it is not known."""
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    """An error, with its sign."""
    return "-" if value is None else f"{figure(value, '+.2f')} %"


def _share_off(value: float | None, truth: float | None) -> float | None:
    return None if value is None or not truth else 100 * (value / truth - 1)


_SPREAD_HEAD = ("", "median", "95 %", "highest", "samples")


def _columns(tested: Estimator) -> Rows:
    """A column per kind, and one for waiting."""
    by_kind = {one.kind: _column(one) for one in tested.kinds}
    waiting = {
        "estimated power (W)": f"{number(tested.waiting_w, 1)} ± {number(tested.waiting_se_w, 1)}",
        "steady power (W)": number(tested.steady_waiting_w, 1),
        "power off by": percent(_share_off(tested.waiting_w, tested.steady_waiting_w)),
    }
    columns = {**by_kind, "waiting": waiting}
    names = next(iter(by_kind.values()))
    return [("", *columns), *((name, *(column.get(name, "") for column in columns.values())) for name in names)]


def _column(one: KindOfWork) -> dict[str, str]:
    return {
        "time (ms), pattern": number(one.time_ms, 2),
        "time (ms), steady": number(one.steady_time_ms, 2),
        "estimated energy (J)": f"{number(one.estimated_j, 3)} ± {number(one.estimated_se_j, 3)}",
        "energy off by": percent(one.error_percent),
        "estimated power (W)": number(one.estimated_w, 1),
        "steady power (W)": number(one.steady_w, 1),
        "power off by": percent(one.power_error_percent),
        "SM clock (MHz), pattern": number(one.clock_mhz, 0),
        "SM clock (MHz), steady": number(one.steady_clock_mhz, 0),
        "at the power limit, steady": f"{number(one.capped_percent, 1)} %",
    }


def _spread_row(name: str, spread: Spread) -> tuple[str, ...]:
    return (name, f"{spread.median:.1f}", f"{spread.p95:.1f}", f"{spread.highest:.1f}", str(spread.samples))
