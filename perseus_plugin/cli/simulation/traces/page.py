"""What is known of a traced job as a page, like a report's: one file that needs nothing else."""

from __future__ import annotations

import html

from perseus_plugin._version import __version__
from perseus_plugin.cli.simulation.traces.output import (
    PLAN_HEAD,
    Answer,
    caution_lines,
    graph_line,
    job_lines,
    lanes_of,
    median_step,
    notes,
    plan_rows,
    spread_lines,
    straggler_lines,
)
from perseus_plugin.cli.simulation.traces.worth import Estimate
from perseus_plugin.errors import figure
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.reporting.report.document import (
    TIMELINE_TEXT,
    cards,
    document,
    listed,
    picture,
    plotting,
    table,
)
from perseus_plugin.reporting.report.lanes import Lanes, with_path_and_waits
from perseus_plugin.reporting.report.phrases import Rows


def page(answer: Answer) -> str:
    """The whole file; needs plotly, see `document.check_plotly`."""
    head = plotting()
    # Loads plotly.
    from perseus_plugin.reporting.report.figures import timeline

    which, *order = job_lines(answer)
    parts = [
        f'<h1>What would be saved</h1><div class="muted">{html.escape(which)}</div>',
        *(f'<section class="note"><b>{html.escape(line)}</b></section>' for line in caution_lines(answer)),
        '<section class="note"><b>No energy was measured.</b> A trace holds times; power, and what a clock does to '
        f"them, are those of {html.escape(answer.power_of)}.</section>",
        cards(_headline(answer)),
        f"<section id='plans'><h2>Plans, replayed over the traced durations</h2>"
        f"{table([PLAN_HEAD, *plan_rows(answer)])}{listed(notes(answer))}</section>",
        f"<section id='bloat'><h2>Energy that is wasted</h2>{table(_bloat_rows(answer))}</section>",
        f"<section id='stragglers'><h2>Stragglers</h2>"
        f"{listed(line.strip() for line in straggler_lines(answer)) or '<p>No stage is slow.</p>'}</section>",
        picture("timeline", "A step before and after", timeline(_before_and_after(answer)), _STEP_TEXT),
        f"<section id='instructions'><h2>Instructions, as traced</h2>{listed([*order, *spread_lines(answer)])}"
        f'<p>{html.escape(graph_line(answer))}</p><p class="muted">perseus_plugin {html.escape(__version__)}</p>'
        "</section>",
    ]
    return document(f"What would be saved: {answer.job.name}", parts, head)


_STEP_TEXT = (
    "The replayed step of median length: as traced, and at the clocks of the last plan, without what catching up "
    f"would change; of the slowest replica, and of the fastest one. {TIMELINE_TEXT}"
)


def _headline(answer: Answer) -> list[tuple[str, str, str]]:
    found = answer.worth
    shown = [
        (f"{ride.name} plan saves", figure(ride.saving.mean, ".1%"), f"{figure(ride.time_ratio - 1, '+.2%')} time")
        for ride in found.rides
    ]
    for name, share, why in (
        ("intrinsic bloat", found.bloat.intrinsic, "stages are not balanced"),
        ("extrinsic bloat", found.bloat.extrinsic, "a slower replica is waited for"),
    ):
        shown.append((name, figure(share.mean, ".1%"), why))
    if len(answer.job.replicas) > 1:
        shown.append(("slowest replica", f"{answer.stragglers.behind:.1%}", "behind the median one"))
    return shown


def _bloat_rows(answer: Answer) -> Rows:
    def row(name: str, joules: Estimate, share: Estimate | None) -> tuple[str, str, str]:
        own, low, high = (figure(one, ".1f") for one in (joules.mean, joules.low, joules.high))
        percent = ""
        if share is not None:
            part, least, most = (figure(one, ".2%") for one in (share.mean, share.low, share.high))
            percent = f"{part} ({least} to {most})"
        return name, f"{own} J ({low} to {high})", percent

    bloat = answer.worth.bloat
    return [
        ("", f"per pipeline and iteration, of {bloat.iterations}", "share"),
        row("at full clocks", bloat.full_j, None),
        row("intrinsic bloat", bloat.intrinsic_j, bloat.intrinsic),
        row("extrinsic bloat", bloat.extrinsic_j, bloat.extrinsic),
    ]


def _before_and_after(answer: Answer) -> list[Lanes]:
    job, step = answer.job, median_step(answer)
    graph = build_graph(job.streams, latency_s=answer.explained.transfer_s)
    ends_s = [graph.iteration_time_s(took) for took in job.durations_s[step]]
    shown = dict.fromkeys((ends_s.index(max(ends_s)), ends_s.index(min(ends_s))))
    return [
        with_path_and_waits(lanes_of(answer, ride, step, replica), graph)
        for replica in shown
        for ride in (None, answer.worth.rides[-1])
    ]
