"""The pictures of a report, as plotly figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import sample_colorscale
from plotly.subplots import make_subplots

from perseus_plugin.planning.curve import CurveSample, FrontierCurve
from perseus_plugin.planning.plan import Plan
from perseus_plugin.profiling.profile import Profile
from perseus_plugin.reporting.record.samples import Sample
from perseus_plugin.reporting.report.lanes import Block, Lanes, Wait
from perseus_plugin.reporting.report.palette import BLUE, BOUND, CLOCKS, GREEN, MUTED, RED, SERIES, TEXT, WAITING
from perseus_plugin.reporting.report.style import legend_above, styled
from perseus_plugin.reporting.report.worth import PerIteration

_LABELLED = 200  # most blocks of a row of pictures that carry their microbatch
_CAPTION_PX, _BELOW_PX = 62, 55  # two lines above each iteration; as `styled` leaves below
_MAX_STAGES_OF_CURVES = 32


def timeline(lanes: Sequence[Lanes]) -> go.Figure:
    """Iterations above each other: stages as rows, blocks coloured by clock, waiting in grey.

    Waits with a clock of their own are thin, in the colour of that clock.
    """
    stages = max(len(one.rows) for one in lanes)
    clocks = [block.clock_mhz for one in lanes for block in one.blocks if block.clock_mhz]
    clocks += [wait.clock_mhz for one in lanes for wait in one.waits if wait.own]
    low, high = min(clocks, default=0), max(clocks, default=1)
    drawn_px = len(lanes) * (_CAPTION_PX + 34 * stages)
    figure = make_subplots(
        rows=len(lanes),
        cols=1,
        shared_xaxes=True,
        vertical_spacing=_CAPTION_PX / drawn_px if len(lanes) > 1 else 0,
        # On two lines: a narrow window would cut one.
        subplot_titles=[f"<b>{one.title}</b><br>{one.end_s:.4f} s, {_waits(one)}" for one in lanes],
    )
    for row, one in enumerate(lanes, 1):
        for trace in (_waiting_bars(one, low, high), _block_bars(one, low, high)):
            figure.add_trace(trace, row=row, col=1)
        figure.update_yaxes(
            autorange="reversed", fixedrange=True, tickvals=list(range(stages)), row=row, col=1,
            ticktext=[f"stage {stage}" for stage in range(stages)],
        )  # fmt: skip
    # Bars whose colours are numbers make plotly.js warn about each of them; so the scale has a trace of its own.
    figure.add_trace(
        go.Scatter(
            name="scale", x=[None], y=[None], mode="markers", hoverinfo="skip",
            marker={"color": [low, high], "coloraxis": "coloraxis"},
        ), row=1, col=1,
    )  # fmt: skip
    figure.update_layout(
        barmode="overlay",
        bargap=0,
        showlegend=False,
        height=_CAPTION_PX + _BELOW_PX + drawn_px,
        coloraxis={
            "colorscale": CLOCKS,
            "cmin": min(low, high - 1),
            "cmax": high,
            "colorbar": {"title": {"text": "SM clock<br>MHz"}, "thickness": 14, "len": 0.9, "outlinewidth": 0},
        },
    )
    end_s = max(one.end_s for one in lanes)
    figure.update_xaxes(range=[-0.004 * end_s, 1.004 * end_s])
    figure.update_xaxes(title_text="time from the first instruction (s)", row=len(lanes), col=1)
    figure.update_yaxes(showgrid=False, ticks="outside", ticklen=5, tickcolor="rgba(0,0,0,0)")
    figure.update_annotations(x=0, xanchor="left", align="left", font={"size": 14})
    return styled(figure, _CAPTION_PX)


def _waits(one: Lanes) -> str:
    share = one.waiting_s / (len(one.rows) * one.end_s) if one.end_s else 0.0
    return f"GPUs wait {100 * share:.1f} % of it"


def _waiting_bars(one: Lanes, low: int, high: int) -> go.Bar:
    # One bar per wait, not one behind a whole row: where bars lie on each other the pointer finds the wrong one.
    waits = one.waits
    colours = _colours([wait.clock_mhz for wait in waits if wait.own], low, high)
    return go.Bar(
        name="waiting",
        orientation="h",
        y=[wait.stage for wait in waits],
        base=[round(wait.start_s, 6) for wait in waits],
        x=[round(wait.finish_s - wait.start_s, 6) for wait in waits],
        width=[0.2 if wait.own else 0.86 for wait in waits],
        marker={"color": [colours[wait.clock_mhz] if wait.own else WAITING for wait in waits], "line": {"width": 0}},
        customdata=[_about_wait(wait) for wait in waits],
        hovertemplate="%{y} waits %{customdata}, from %{base:.4f} s on<extra></extra>",
    )


def _about_wait(wait: Wait) -> str:
    said = f"{1e3 * (wait.finish_s - wait.start_s):.1f} ms"
    if wait.clock_mhz:
        said += f" at {wait.clock_mhz} MHz"
    if not math.isnan(wait.energy_j):
        said += f", {wait.energy_j:.2f} J by the profile"
    return said


def _block_bars(one: Lanes, low: int, high: int) -> go.Bar:
    blocks = one.blocks
    colours = _colours([block.clock_mhz for block in blocks], low, high)
    labelled = len(blocks) <= _LABELLED
    outline = 1.6 if labelled else 0.8
    return go.Bar(
        name="instructions",
        orientation="h",
        y=[block.instruction.stage for block in blocks],
        base=[round(block.start_s, 6) for block in blocks],
        x=[round(block.finish_s - block.start_s, 6) for block in blocks],
        width=[0.86 if "backward" in block.instruction.kind else 0.6 for block in blocks],
        marker={
            "color": [colours[block.clock_mhz] if block.clock_mhz else CLOCKS[-1] for block in blocks],
            "line": {
                "color": ["#111111" if block.critical else "#ffffff" for block in blocks],
                "width": [outline if block.critical else 0.25 * outline for block in blocks],
            },
        },
        text=[f"{block.instruction.kind[0].upper()}{block.instruction.microbatch}" for block in blocks]
        if labelled
        else None,
        textposition="inside" if labelled else "none",
        insidetextanchor="middle",
        textangle=0,
        textfont={"color": TEXT, "size": 10},
        hovertext=[_about(block) for block in blocks],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _colours(clocks_mhz: Sequence[int], low: int, high: int) -> dict[int, str]:
    shares = {clock: (clock - low) / (high - low) if high > low else 1.0 for clock in clocks_mhz}
    return {clock: sample_colorscale(CLOCKS, min(max(share, 0.0), 1.0))[0] for clock, share in shares.items()}


def _about(block: Block) -> str:
    which = block.instruction
    lines = [
        f"<b>{which.kind} {which.microbatch}</b>, stage {which.stage}"
        + (f", chunk {which.chunk}" if which.chunk else ""),
        f"{block.clock_mhz} MHz" if block.clock_mhz else "full clock",
        f"{block.start_s:.4f} to {block.finish_s:.4f} s ({1e3 * (block.finish_s - block.start_s):.1f} ms)",
    ]
    if not math.isnan(block.energy_j):
        lines.append(f"{block.energy_j:.2f} J by the profile")
    if block.critical:
        lines.append("on the critical path")
    return "<br>".join(lines)


def frontier(
    made: FrontierCurve, plan: Plan, per: PerIteration | None, least_cost: CurveSample | None = None
) -> go.Figure:
    """Bound and plans over the iteration time, energy above power, with full clocks and the plan that was chosen."""
    shapes: list[tuple[str, list[tuple[float, float]], dict[str, Any]]] = [
        ("lower bound", [(p.deadline_s, p.bound_j) for p in made.samples],
         {"mode": "lines", "line": {"color": BOUND, "width": 2}}),
        ("plans", [(p.iteration_time_s, p.energy_j) for p in made.samples],
         {"mode": "markers", "marker": {"color": BLUE, "size": 8}}),
    ]  # fmt: skip
    chosen = [
        ("full clocks", plan.baseline_time_s, plan.baseline_energy_j, "square", RED),
        ("the job's plan", plan.iteration_time_s, plan.energy_j, "star", GREEN),
    ]
    if per is not None and not per.predicted:
        time_s = plan.baseline_time_s * per.plan_s / per.full_s
        energy_j = plan.baseline_energy_j * per.plan_j / per.full_j
        chosen.append(("as run, against measured full clocks", time_s, energy_j, "diamond-open", GREEN))
    if least_cost is not None:
        chosen.append(("least cost", least_cost.iteration_time_s, least_cost.energy_j, "hexagram-open", BLUE))
    for name, time_s, energy_j, symbol, colour in chosen:
        marker = {"symbol": symbol, "size": 14, "color": colour, "line": {"width": 2, "color": colour}}
        shapes.append((name, [(time_s, energy_j)], {"mode": "markers", "marker": marker}))
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06)
    for name, points, look in shapes:
        about = "no plan takes less than" if name == "lower bound" else f"{name}<br>%{{x:.4f}} s,"
        saved = "<br>%{customdata:.1f} % less energy than full clocks<extra></extra>"
        for row, unit in ((1, "J"), (2, "W")):
            figure.add_trace(
                go.Scatter(
                    name=name, legendgroup=name, showlegend=row == 1, x=[time_s for time_s, _ in points],
                    y=[energy_j if row == 1 else energy_j / time_s for time_s, energy_j in points],
                    customdata=[100 * (1 - energy_j / made.baseline_energy_j) for _, energy_j in points],
                    hovertemplate=f"{about} %{{y:.1f}} {unit}{saved}", **look,
                ), row=row, col=1,
            )  # fmt: skip
    energies_j = [energy_j for _, points, _ in shapes for _, energy_j in points]
    times_s = [time_s for _, points, _ in shapes for time_s, _ in points]
    ticks_s, longer = _percents(times_s, plan.baseline_time_s, "s")
    ticks_j, less = _percents(energies_j, plan.baseline_energy_j, "J")
    figure.update_xaxes(
        title_text="iteration time, against full clocks", tickvals=ticks_s, ticktext=longer, row=2, col=1
    )
    figure.update_xaxes(tickvals=ticks_s, row=1, col=1)
    figure.update_yaxes(title_text="energy per iteration", tickvals=ticks_j, ticktext=less, row=1, col=1)
    figure.update_yaxes(title_text="average power (W)", row=2, col=1)
    figure.update_layout(height=640, legend=legend_above())
    return styled(figure)


def _percents(values: Sequence[float], of: float, unit: str) -> tuple[list[float], list[str]]:
    """Ticks at round percentages of what full clocks take, each with its value."""
    low, high = (100 * (bound(values) / of - 1) for bound in (min, max))
    step = next((step for step in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50) if (high - low) / step <= 7), 100)
    percents = [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]
    digits = 1 if step < 1 else 0
    ticks = [of * (1 + percent / 100) for percent in percents]
    return ticks, [
        f"{tick:,.4g} {unit}<br>" + (f"{percent:+.{digits}f} %" if percent else "full clocks")
        for tick, percent in zip(ticks, percents, strict=True)
    ]


def curves(profile: Profile) -> go.Figure:
    """Energy and time over the clock, per stage, one column per kind of instruction; bars are 2 standard errors."""
    kinds = sorted({kind for _, kind in profile.table}, key=lambda kind: ("backward" in kind, kind))
    titles = [f"<b>{kind.replace('_backward', '<br>backward')}</b>" for kind in kinds] + [""] * len(kinds)
    figure = make_subplots(rows=2, cols=len(kinds), shared_xaxes=True, vertical_spacing=0.07, subplot_titles=titles)
    shown = min(profile.stages, _MAX_STAGES_OF_CURVES)
    named: set[int] = set()
    for (stage, kind), rows in profile.table.items():
        if stage >= shown:
            continue
        clocks = [m.frequency_mhz for m in rows]
        look: dict[str, Any] = {
            "name": f"stage {stage}", "legendgroup": f"stage {stage}", "x": clocks, "mode": "lines+markers",
            "line": {"color": _stage_colour(stage, shown), "width": 1.6}, "marker": {"size": 6},
        }  # fmt: skip
        about = f"stage {stage} {kind} at %{{x}} MHz<br>%{{y:.2f}} "
        energy_bars, time_bars = [2 * m.energy_se_j for m in rows], [2e3 * m.time_se_s for m in rows]
        figure.add_trace(
            go.Scatter(
                y=[m.energy_j for m in rows], error_y=_error_bars(energy_bars), showlegend=stage not in named,
                hovertemplate=about + "J ± %{error_y.array:.2f}<extra></extra>", **look,
            ), row=1, col=1 + kinds.index(kind),
        )  # fmt: skip
        figure.add_trace(
            go.Scatter(
                y=[1e3 * m.time_s for m in rows], error_y=_error_bars(time_bars), showlegend=False,
                hovertemplate=about + "ms ± %{error_y.array:.2f}<extra></extra>", **look,
            ), row=2, col=1 + kinds.index(kind),
        )  # fmt: skip
        named.add(stage)
    figure.update_yaxes(title_text="energy (J)", row=1, col=1)
    figure.update_yaxes(title_text="time (ms)", row=2, col=1)
    figure.update_xaxes(title_text="SM clock (MHz)", row=2)
    figure.update_layout(height=560, legend={"y": 1, "x": 1.01})
    return styled(figure)


def _error_bars(values: list[float]) -> dict[str, Any]:
    known = [0.0 if math.isnan(value) else value for value in values]
    return {"type": "data", "array": known, "thickness": 1.2, "width": 3}


def _stage_colour(stage: int, stages: int) -> str:
    if stages <= len(SERIES):
        return SERIES[stage]
    return f"hsl({round(330 * stage / stages)},55%,42%)"


def clocks(samples: Sequence[Sample]) -> go.Figure:
    """Per stage what was asked of the driver and what the clock read, over one iteration."""
    stages = len(samples)
    figure = make_subplots(
        rows=stages, cols=1, shared_xaxes=True, vertical_spacing=min(0.04, 0.3 / stages), row_titles=[]
    )
    for stage, sample in enumerate(samples):
        times, asked = _steps(sample)
        figure.add_trace(
            go.Scatter(
                name="asked for", legendgroup="asked", showlegend=stage == 0, x=times, y=asked, mode="lines",
                line={"shape": "hv", "color": MUTED, "width": 1.6}, connectgaps=False,
                hovertemplate=f"stage {stage}: %{{y}} MHz asked for at %{{x:.4f}} s<extra></extra>",
            ), row=stage + 1, col=1,
        )  # fmt: skip
        powers = {since: watts for since, _, watts in sample.powers()}
        figure.add_trace(
            go.Scatter(
                name="read back", legendgroup="read", showlegend=stage == 0, mode="markers",
                x=[r.time_s for r in sample.readings], y=[r.clock_mhz for r in sample.readings],
                marker={"color": BLUE, "size": 4}, customdata=[powers.get(r.time_s, 0.0) for r in sample.readings],
                hovertemplate=f"stage {stage}: %{{y}} MHz read at %{{x:.4f}} s<br>%{{customdata:.0f}} W from then on"
                "<extra></extra>",
            ), row=stage + 1, col=1,
        )  # fmt: skip
        figure.update_yaxes(title_text=f"stage {stage}<br>MHz", nticks=4, fixedrange=True, row=stage + 1, col=1)
    seen = [
        clock for one in samples for clock in (*(r[1] for r in one.requests), *(r[1] for r in one.readings)) if clock
    ]
    if seen:
        room = 20 + 0.06 * (max(seen) - min(seen))
        figure.update_yaxes(range=[min(seen) - room, max(seen) + room])
    figure.update_xaxes(title_text="time from the beginning of the iteration (s)", row=stages, col=1)
    figure.update_layout(height=120 + 105 * stages, legend=legend_above())
    return styled(figure)


def _steps(sample: Sample) -> tuple[list[float], list[int | None]]:
    """The clock asked for over the iteration; None while the lock is given up."""
    before = [request for request in sample.requests if request.time_s < 0]
    within = [request for request in sample.requests if request.time_s >= 0]
    now = before[-1].clock_mhz or None if before else None
    times, values = [0.0], [now]
    for request in within:
        times.append(request.time_s)
        values.append(request.clock_mhz or None)
    return [*times, sample.time_s], [*values, values[-1]]
