"""A job's output folder, read for a report: what is there, and what is missing and why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from perseus_plugin.errors import PerseusError, ReportError
from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import StageStream
from perseus_plugin.iteration.replayed import Overheads
from perseus_plugin.planning.curve import FRONTIER_FILE, FrontierCurve, load_curve
from perseus_plugin.planning.plan import Plan, load_plan
from perseus_plugin.planning.streams import load_streams
from perseus_plugin.profiling.kept import read_survey
from perseus_plugin.profiling.profile import Profile, load_profile
from perseus_plugin.profiling.survey import Survey
from perseus_plugin.reporting.live.events import EVENTS_FILE, read_events
from perseus_plugin.reporting.record.lines import ONE_GRAPH
from perseus_plugin.reporting.record.recorder import FOLDER, SCHEDULES
from perseus_plugin.reporting.record.records import RankRecord, Series, load_record, series
from perseus_plugin.reporting.record.samples import Sample
from perseus_plugin.reporting.record.summary import SUMMARY_FILE, Summary, load_summary
from perseus_plugin.reporting.report.baseline import full_clocks, scale_to

_KNOWN = (SUMMARY_FILE, "plan.json", "profile.csv", "schedule.json", EVENTS_FILE, FOLDER)
_QUIET_S = 120.0  # a running job that has written nothing for so long has probably died

ReadT = TypeVar("ReadT")


ONE_GRAPH_SEEN = "its steps are one CUDA graph each, in which no instruction is seen"


@dataclass
class JobFolder:
    """What an output folder holds.

    Attributes:
        path: of the folder.
        summary, plan, frontier, profile, survey, streams: as far as they are there.
        profile_scale: what times and energies of the profile have to be multiplied by to be those the plan was made on.
        schedules: streams of the schedules that ran, by key.
        records: by rank.
        events: lines of events.jsonl.
        missing: what is not there and what a report lacks because of that, for people.
        written_s: Unix time of the newest file.
    """

    path: Path
    summary: Summary | None = None
    plan: Plan | None = None
    frontier: FrontierCurve | None = None
    profile: Profile | None = None
    survey: Survey | None = None
    streams: list[StageStream] | None = None
    profile_scale: float = 1.0
    schedules: dict[str, list[StageStream]] = field(default_factory=dict)
    records: dict[int, RankRecord] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    written_s: float = 0.0

    @property
    def world_size(self) -> int:
        """Ranks of the job, 0 if nothing says it."""
        if self.summary is not None:
            return self.summary.ranks
        return next((record.placement.world_size for record in self.records.values()), 0)

    @property
    def stages(self) -> int:
        """Pipeline stages, 0 if nothing says it."""
        if self.summary is not None:
            return self.summary.stages
        if self.plan is not None:
            return len(self.plan.stages)
        return next((record.placement.stages for record in self.records.values()), 0)

    @property
    def emulated(self) -> bool | None:
        """Whether figures are a model's; None if nothing says it."""
        if self.summary is not None:
            return self.summary.emulated
        return any(record.header.emulated for record in self.records.values()) if self.records else None

    @property
    def gpu(self) -> str:
        """Name of the GPUs; empty if nothing says it."""
        if self.summary is not None:
            return self.summary.gpu
        return " / ".join(sorted({record.header.gpu for record in self.records.values()}))

    @property
    def one_graph(self) -> bool:
        """Whether the job's steps are one CUDA graph each, in which no instruction is seen."""
        name, value = ONE_GRAPH
        return any(record.header.facts.get(name) == value for record in self.records.values())

    @property
    def dry_run(self) -> bool:
        """Whether the job leaves clocks alone, so that no plan is run."""
        return self.summary is not None and self.summary.dry_run

    @property
    def yet(self) -> str:
        """Follows on what is missing: " (yet)" while it may still come, nothing once the job has ended."""
        return "" if state_of(self) in ("finished", "crashed") else " (yet)"

    def graph(self) -> PipelineGraph | None:
        """Of the plan's schedule; None if its streams are not there, or are of another schedule."""
        if self.streams is None or self.plan is None:
            return None
        constants = {} if self.survey is None else self.survey.constants_for(self.streams)
        beside = self.overheads
        graph = build_graph(self.streams, constants, beside.transfer_s, beside.end_s)
        planned = {one.instruction for row in self.plan.stages for one in row}
        return graph if planned == set(graph.node_of) else None

    @property
    def overheads(self) -> Overheads:
        """What iterations take beside the work that is known, as the plan has it."""
        if self.summary is None:
            return Overheads()
        beside = self.summary.beside
        return Overheads(beside.transfer_s or 0.0, beside.once_s or 0.0)

    def series(self) -> Series | None:
        """The job's iterations."""
        return series(self.records, self.world_size)

    def pipeline(self, states: tuple[str, ...], replica: int = 0) -> list[Sample]:
        """The newest iteration of these states that a rank of every stage kept whole, by stage; empty for none."""
        by_stage: dict[int, dict[int, Sample]] = {}
        for rank in sorted(self.records, reverse=True):  # of several ranks in a stage the first is shown
            record = self.records[rank]
            if record.placement.replica == replica:
                kept = {sample.number: sample for sample in record.samples if sample.state in states}
                by_stage[record.placement.stage] = kept
        if not by_stage or sorted(by_stage) != list(range(self.stages)):
            return []
        common = set.intersection(*(set(kept) for kept in by_stage.values()))
        return [by_stage[stage][max(common)] for stage in range(self.stages)] if common else []

    def samples_per_iteration(self) -> int | None:
        """Samples in an iteration, where the framework has told them, or its microbatch size."""
        record = self.records.get(0)
        if record is None:
            return None
        told = record.header.facts.get("samples per iteration", "")
        if told.isdecimal() and int(told):
            return int(told)
        if self.plan is None:
            return None
        size = record.header.facts.get("microbatch size", "")
        replicas = {one.placement.replica for one in self.records.values()}
        complete = len(self.records) == record.placement.world_size
        return int(size) * self.plan.microbatches * len(replicas) if size.isdigit() and complete else None


def load_folder(path: Path, now_s: float | None = None) -> JobFolder:
    """Read an output folder.

    Args:
        path: of the folder.
        now_s: Unix time; a job that says it runs and has been quiet for long has probably died.

    Raises:
        ReportError: there is no such folder, it is of something else, or a file in it is damaged.
    """
    if not path.is_dir():
        raise ReportError(f"{path}: is no folder; give a job's output folder (perseus.output_dir)")
    if not any((path / name).exists() for name in _KNOWN):
        raise ReportError(f"{path}: is no output folder of perseus: none of {', '.join(_KNOWN)} is there")
    folder = JobFolder(path)
    _read_records(folder)
    started_s = max((record.header.started_s for record in folder.records.values()), default=0.0)
    folder.summary = _read(folder, SUMMARY_FILE, started_s, load_summary, "figures of the whole job")
    folder.plan = _read(
        folder, "plan.json", started_s, load_plan, f"there is no plan{folder.yet}: no timeline, no frontier"
    )
    folder.streams = _read(folder, "schedule.json", started_s, load_streams, "the schedule's dependencies")
    # Of a plan made since; where it is missing, a report computes it.
    folder.frontier = _read(folder, FRONTIER_FILE, started_s, load_curve, "")
    # A kept profile is older than the run that uses it.
    folder.profile = _read(folder, "profile.csv", 0.0, load_profile, "profile curves and frontier")
    kept = _read(folder, "profile.json", 0.0, lambda file: read_survey(file.parent), "the frontier")
    folder.survey = None if kept is None else kept[0]
    _read_schedules(folder, started_s)
    events, torn = _read(folder, EVENTS_FILE, 0.0, read_events, "") or ([], 0)
    folder.events = [event for event in events if event["time"] >= started_s]
    if torn:
        folder.missing.append(
            f"{torn} lines of events.jsonl are no events (a run was killed while it wrote) and left out"
        )
    _check_profile(folder)
    _find_missing(folder, time.time() if now_s is None else now_s)
    return folder


def _read(folder: JobFolder, name: str, started_s: float, read: Callable[[Path], ReadT], lacking: str) -> ReadT | None:
    path = folder.path / name
    if not path.exists():
        if lacking:
            folder.missing.append(f"{name} is not there: {lacking}")
        return None
    if not path.is_file():  # somebody's pipe would keep us waiting
        raise ReportError(f"{path}: is no file; remove it")
    written_s = path.stat().st_mtime
    if written_s < started_s - 1:
        folder.missing.append(f"{name} is of an earlier run and left out: {lacking}")
        return None
    folder.written_s = max(folder.written_s, written_s)
    try:
        return read(path)
    except PerseusError as error:
        text = str(error)
        raise ReportError(text if text.startswith(str(path)) else f"{path}: {text}") from error


def _read_schedules(folder: JobFolder, started_s: float) -> None:
    for path in sorted((folder.path / FOLDER / SCHEDULES).glob("*.json")):
        name = str(path.relative_to(folder.path))
        # Nothing is said of those that an earlier run has left.
        streams = _read(folder, name, started_s, load_streams, "") if path.stat().st_mtime >= started_s - 1 else None
        if streams is not None:
            folder.schedules[unquote(path.stem)] = streams
    if folder.plan is not None:  # schedule.json is of the one that ran last, which may be another
        folder.streams = folder.schedules.get(folder.plan.schedule, folder.streams)


def _check_profile(folder: JobFolder) -> None:
    """Leave out a profile that is not the plan's: of another model, or of an earlier run."""
    plan, profile, graph = folder.plan, folder.profile, folder.graph()
    if plan is None or profile is None:
        return
    planned = {(p.instruction.stage, p.instruction.kind) for stage in plan.stages for p in stage}
    scale: float | None = 1.0
    if not planned <= set(profile.table):
        scale = None
    elif graph is not None and folder.survey is not None:
        scale = scale_to(plan, graph, folder.survey)
    elif graph is not None and full_clocks(graph, profile, 0.0).time_s > 1.02 * plan.baseline_time_s:
        scale = None  # without the constant-time work it can only be shorter
    if scale is None:
        folder.profile = folder.survey = None
        folder.missing.append(
            "profile.csv is not the profile that plan.json was made on (another model, or an earlier run) and left "
            "out: profile curves, full clocks in the timeline, energies per instruction"
        )
    else:
        folder.profile_scale = scale


def _read_records(folder: JobFolder) -> None:
    ranks = []
    for file in (folder.path / FOLDER).glob("rank-*.jsonl"):
        number = file.name.removeprefix("rank-").removesuffix(".jsonl")
        if number.isdigit() and file.is_file():
            ranks.append(int(number))
            folder.written_s = max(folder.written_s, file.stat().st_mtime)
    records = {rank: load_record(folder.path, rank) for rank in sorted(ranks)}
    newest = max(records.values(), key=lambda record: record.header.started_s, default=None)
    for rank, record in records.items():
        assert newest is not None  # there is a record
        if _same_run(record, newest):
            folder.records[rank] = record
        else:
            folder.missing.append(f"the record of rank {rank} is of an earlier run and left out")


def _same_run(record: RankRecord, newest: RankRecord) -> bool:
    """Ranks start together, within what importing takes."""
    same = record.placement.world_size == newest.placement.world_size
    return same and newest.header.started_s - record.header.started_s < 600


def _find_missing(folder: JobFolder, now_s: float) -> None:
    absent = sorted(set(range(folder.world_size)) - set(folder.records))
    if not folder.records:
        folder.missing.append(f"{FOLDER}/ is not there: iterations over training, what ran, clocks read back")
    elif absent:
        folder.missing.append(
            f"{len(absent)} of {folder.world_size} ranks have no record here (first: rank {absent[0]}): they wrote to "
            "another machine's folder, or not at all; the job's energy over training is not known"
        )
    cut = [rank for rank, record in folder.records.items() if record.cut]
    if cut:
        folder.missing.append(f"the record of rank {cut[0]} ends in the middle of a line: the job was killed")
    if folder.plan is not None and folder.streams is not None and folder.graph() is None:
        folder.missing.append("plan.json is for another schedule than the one that ran last: no critical path")
    running = folder.summary is None or folder.summary.state == "running"
    if running and now_s - folder.written_s > _QUIET_S:
        minutes = (now_s - folder.written_s) / 60
        folder.missing.append(
            f"the job did not say that it has ended, and wrote nothing for {minutes:,.0f} minutes: it has probably died"
        )


def state_of(folder: JobFolder) -> str:
    """What the job is doing: "finished", "crashed", "running" or "started"."""
    if folder.summary is None:
        return "started"
    return folder.summary.state
