"""`perseus simulate` of a trace: what is asked, found, said and written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from perseus_plugin.cli.destinations import STANDARD, write, written
from perseus_plugin.cli.job import profile_from_options, schedule_name
from perseus_plugin.cli.simulation.description import gpu_named, profile_on, waiting_on
from perseus_plugin.cli.simulation.traces.findings import explained, spreads, stragglers
from perseus_plugin.cli.simulation.traces.kineto import ENDINGS, load_traces
from perseus_plugin.cli.simulation.traces.output import PLAN_HEAD, Answer, as_json, lines, notes, plan_rows, timeline
from perseus_plugin.cli.simulation.traces.table import PARQUET, is_table, load_table
from perseus_plugin.cli.simulation.traces.traced import GivenSchedule, TracedJob
from perseus_plugin.cli.simulation.traces.worth import Asked, mean_times_s, profile_from, worth
from perseus_plugin.cli.terminal import columns, console, say, working
from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.planning.targets import ChangeLimits, Effort, dwell_for
from perseus_plugin.profiling.derived import with_rows_for

_TABLES = (".csv.gz", PARQUET)


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        schedule: as for `perseus plan`; None: found in the trace.
        chunks: model chunks per stage; None: as the trace says, or else as the schedule usually has.
        stages: of the pipeline; None: found in the trace.
        gpu: of the catalogue.
        profile: its curves instead.
        blocking_power, power_limit_w: as for `perseus plan`, with a profile.
        input_share: as for `perseus plan`, too.
        slowdown: allowed, as a share.
        latency_s: how long a clock change takes.
        lower_while_waiting: whether waits may get lower clocks.
        effort, max_changes, min_dwell_s: as for `perseus plan`.
        outputs: JSON files to write.
        perfetto: a trace to write.
        html: a page to write.
        as_json: print JSON in the place of text and tables.
    """

    schedule: str | None
    chunks: int | None
    stages: int | None
    gpu: str
    profile: Path | None
    blocking_power: str | None
    power_limit_w: float | None
    input_share: float
    slowdown: float
    latency_s: float
    lower_while_waiting: bool
    effort: Effort
    max_changes: int | None
    min_dwell_s: float | None
    outputs: Sequence[Path]
    perfetto: Path | None
    html: Path | None = None
    as_json: bool = False


def is_trace(paths: Sequence[Path]) -> bool:
    """Whether these are traces, and no profile or model description.

    Raises:
        ConfigError: a file cannot be read.
    """
    return paths[0].name.endswith((*ENDINGS, *_TABLES)) or (
        paths[0].suffix == ".csv" and paths[0].exists() and is_table(paths[0])
    )


def simulate_trace(paths: Sequence[Path], options: Options) -> None:
    """Read, find, plan, say and write.

    Raises:
        PerseusError: naming what is wrong.
    """
    for path in options.outputs:
        if path != STANDARD and path.suffix != ".json":
            raise ConfigError(f"--output: got {path}; allowed: a path that ends in .json, of a trace")
    with working("reading"):
        job = _read(paths, options)
    with working("planning"):
        answer = _answer(job, options)
    content = json.dumps(as_json(answer), indent=2, allow_nan=False) + "\n"
    for path in options.outputs:
        write(path, content)
    if options.perfetto is not None:
        write(options.perfetto, json.dumps(timeline(answer), allow_nan=False), "--perfetto")
    if options.html is not None:
        # Loads plotly, which the rest does without.
        from perseus_plugin.cli.simulation.traces.page import page

        write(options.html, page(answer), "--html")
    if options.as_json:
        write(STANDARD, content)
        return
    to = console(stderr=STANDARD in (*options.outputs, options.perfetto, options.html))
    for line in lines(answer):
        say(line, to)
    table = columns(*PLAN_HEAD)
    for row in plan_rows(answer):
        table.add_row(*row)
    to.print(table)
    for line in notes(answer):
        say(line, to)
    say(written(*options.outputs, options.perfetto, options.html), to)


def _read(paths: Sequence[Path], options: Options) -> TracedJob:
    given = None if options.schedule is None else _given(options.schedule, options.chunks)
    if paths[0].name.endswith(ENDINGS):
        return load_traces(paths, given, options.stages, options.chunks)
    if len(paths) > 1 or options.stages is not None:
        what = f"{len(paths)} files" if len(paths) > 1 else "--stages"
        raise ConfigError(f"got {what}; allowed: one table of operations, which says its stages")
    return load_table(paths[0], given, options.chunks)


def _given(schedule: str, chunks: int | None) -> GivenSchedule:
    """What `--schedule` names, where `--chunks` says so many."""
    if chunks is not None and schedule not in OF_CHUNKS:
        raise ConfigError(f"--chunks: got {chunks} with {schedule}; allowed: with {' or '.join(OF_CHUNKS)}")
    if schedule in SCHEDULES:
        return GivenSchedule(schedule, SCHEDULES[schedule], OF_CHUNKS.get(schedule))
    if not Path(schedule).exists():
        raise ConfigError(f"--schedule: got {schedule!r}; allowed: {', '.join(SCHEDULES)}, or an existing file")
    streams = load_streams(schedule)
    return GivenSchedule(schedule_name(schedule), lambda stages, microbatches: streams)


def _answer(job: TracedJob, options: Options) -> Answer:
    times_s = mean_times_s(job)
    if options.profile is None:
        gpu = gpu_named(options.gpu)
        profile, power_of = profile_on(gpu, times_s, waiting_on(gpu)), f"the {gpu.name}"
        power_w: float | list[float] = gpu.blocking_w
    else:
        given, power_w = profile_from_options(options.profile, options.blocking_power, 1.0, options.power_limit_w)
        profile = profile_from(with_rows_for(given, job.streams, options.input_share), times_s, str(options.profile))
        power_of = f"the profile {options.profile.name}"
    watts = tuple(power_w) if isinstance(power_w, list) else (power_w,) * job.stages
    if len(watts) != job.stages:
        raise ConfigError(
            f"--blocking-power: got {len(watts)} figures; allowed: one, or one for each of {job.stages} stages"
        )
    dwell_s = options.min_dwell_s
    if dwell_s is None:
        dwell_s = dwell_for(min(rows[0].time_s for rows in profile.table.values()), options.latency_s)
    explains = explained(job)
    asked = Asked(
        watts,
        options.slowdown,
        options.latency_s,
        options.lower_while_waiting,
        options.effort,
        ChangeLimits(options.max_changes, dwell_s),
    )
    return Answer(
        job,
        power_of,
        profile,
        spreads(job),
        explains,
        stragglers(job, explains),
        worth(job, explains, profile, asked),
    )
