"""Traces of PyTorch's profiler (Kineto): one JSON file per rank, packed by gzip or not.

Instructions are found by what stands in the trace of itself: the annotations of `torch.distributed.pipelining`
(`PP:0F1`; `Forward 0` and `Backward 0` of its GPipe), or else, where the profiler ran with `with_stack=True`, the
functions in which DeepSpeed, Megatron and PyTorch's 1F1B run one instruction. An instruction takes from the first to
the last kernel that is launched within it, or operator where no GPU is in the trace; communication does not count.

Where a rank sits follows from what it runs: from the stages in its annotations, or, in 1F1B, from the forwards that it
runs ahead. Other orders need the number of stages; ranks are then taken to be numbered as DeepSpeed and Megatron do,
the first stage of all pipelines first.
"""

from __future__ import annotations

import bisect
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseus_plugin.cli.simulation.traces.traced import LEAST_IN_ORDER, GivenSchedule, Ran, TracedJob, traced_job
from perseus_plugin.errors import ConfigError, ScheduleError, shown
from perseus_plugin.files import parse_json, read_unpacked
from perseus_plugin.iteration.actions import (
    KIND_OF,
    Action,
    Step,
    parsed,
    pytorch_1f1b,
    pytorch_gpipe,
    streams_of_steps,
)
from perseus_plugin.iteration.bounds import MOST_COUNT, number
from perseus_plugin.iteration.instructions import BACKWARD, FORWARD, Compute, StageStream, of_chunk, of_pair
from perseus_plugin.iteration.schedules import OF_CHUNKS
from perseus_plugin.planning.solvers import keeping_the_interpreter

ENDINGS = (".json", ".json.gz")
_MOST_BYTES = 2**30
_MOST_FILES = 10_000
_MOST_US = 1e18  # since 1970 in microseconds: thirty thousand years

_ANNOTATED = re.compile(r"PP:(.+)")
_NUMBERED = re.compile(r"(Forward|Backward) (\d{1,9})")
_FRAME = re.compile(r"(.*)\(\d+\): (\w+)")
_FRAMES = {
    ("deepspeed/runtime/pipe/engine.py", "_exec_forward_pass"): FORWARD,
    ("deepspeed/runtime/pipe/engine.py", "_exec_backward_pass"): BACKWARD,
    ("megatron/core/pipeline_parallel/schedules.py", "forward_step"): FORWARD,
    ("megatron/core/pipeline_parallel/schedules.py", "backward_step"): BACKWARD,
    ("torch/distributed/pipelining/stage.py", "forward_one_chunk"): FORWARD,
    ("torch/distributed/pipelining/stage.py", "backward_one_chunk"): BACKWARD,
}
"""Functions that run one instruction each."""
_ITERATIONS = {
    ("deepspeed/runtime/pipe/engine.py", "_exec_schedule"),
    ("megatron/core/pipeline_parallel/schedules.py", "forward_backward_pipelining_without_interleaving"),
    ("megatron/core/pipeline_parallel/schedules.py", "forward_backward_pipelining_with_interleaving"),
    ("torch/distributed/pipelining/schedules.py", "_step_microbatches"),
}
"""Functions that run all of an iteration's."""
_PYTORCH = "torch/distributed/pipelining/stage.py"
_COMMUNICATION = ("nccl", "c10d::", "gloo:", "record_param_comms", "rccl", "mscclpp")
_LAUNCHES = {"cuda_runtime", "cuda_driver"}


@dataclass(frozen=True, slots=True)
class _Span:
    """Something in a trace, in microseconds."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class _Marker:
    """An instruction as the trace names it.

    Attributes:
        step: PyTorch's actions; empty where the trace does not name them.
        kind: of the instruction; empty for an action that is none.
        microbatch: -1 where the trace does not tell.
        span: in which it is run by the CPU.
    """

    step: Step
    kind: str
    microbatch: int
    span: _Span


@dataclass(frozen=True)
class _Rank:
    """What one file holds.

    Attributes:
        path, rank: which.
        family: what the markers were found by: "PP", "GPipe", or the file of the functions.
        iterations: of each its markers, and what their work took: start and end in seconds.
    """

    path: Path
    rank: int
    family: str
    iterations: Sequence[Sequence[tuple[_Marker, tuple[float, float]]]]

    @property
    def ahead(self) -> int:
        """Forwards before the first backward."""
        kinds = [marker.kind for marker, _ in self.iterations[0]]
        return kinds.index(BACKWARD) if BACKWARD in kinds else len(kinds)


def load_traces(
    paths: Sequence[Path],
    given: GivenSchedule | None = None,
    stages: int | None = None,
    chunks: int | None = None,
) -> TracedJob:
    """Read the traces of all ranks of a job, one file each.

    Args:
        paths: of the files.
        given: the schedule; None: as the trace has it.
        stages: of the pipeline; None: as the trace tells.
        chunks: model chunks per stage; None: as the trace tells, or else as the schedule usually has.

    Raises:
        ConfigError: naming the file and what is wrong.
    """
    if len(paths) > _MOST_FILES:
        raise ConfigError(f"got {len(paths)} traces; allowed: {_MOST_FILES} at most")
    ranks = [_rank(path, place) for place, path in enumerate(paths)]
    for attribute in ("family", "rank"):
        values = [getattr(one, attribute) for one in ranks]
        if attribute == "family" and len(set(values)) > 1:
            raise ConfigError(f"got traces of {' and '.join(sorted(set(values)))}; allowed: those of one job")
        if attribute == "rank" and len(set(values)) < len(values):
            twice = next(one for one in ranks if values.count(one.rank) > 1)
            raise ConfigError(f"{twice.path}: got rank {twice.rank} a second time; allowed: one trace of each rank")
    ranks.sort(key=lambda one: one.rank)
    name = paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more"
    if ranks[0].family == "PP":
        places = _places_by_stages(ranks)
        given = given or _as_run(ranks, places)
    else:
        places = _places_by_order(ranks, stages)
        if given is None and ranks[0].family == "GPipe":
            given = GivenSchedule("PyTorch's GPipe", pytorch_gpipe)
        elif given is None and ranks[0].family == _PYTORCH:
            given = GivenSchedule("PyTorch's 1F1B", pytorch_1f1b)
    by_order_alone = any(ranks[0].family == of_file for of_file, _ in _FRAMES)
    if by_order_alone and chunks is not None and (given is None or given.of_chunks is None):
        raise ConfigError(
            f"--chunks: got {chunks}; functions do not tell chunks; allowed: with --schedule {' or '.join(OF_CHUNKS)}"
        )
    iterations: dict[tuple[int, int], dict[int, list[Ran]]] = defaultdict(dict)
    times_s: dict[int, float] = {}
    for one in ranks:
        stage, replica = places[one.rank]
        begins_s = [min(since_s for _, (since_s, _) in markers) for markers in one.iterations]
        for step, markers in enumerate(one.iterations):
            ran = _ran(one, markers, given, stage, 1 + max(stage for stage, _ in places.values()), chunks)
            iterations[step, replica][stage] = ran
            if step + 1 < len(begins_s):  # what comes after the last one is not in the trace
                times_s[step] = max(times_s.get(step, 0.0), begins_s[step + 1] - begins_s[step])
    job = traced_job(name, iterations, times_s, given, chunks)
    if by_order_alone and given is not None and job.in_order < LEAST_IN_ORDER:
        of, hint = "", ""
        if given.of_chunks is not None:
            of, hint = f" of {_chunks(job.streams)} chunks", ", with its number of --chunks"
        raise ConfigError(
            f"--schedule: got {given.name}{of}; {job.in_order:.0%} of the iterations of {name} ran in this order, by "
            f"which alone functions tell microbatches; allowed: the schedule that ran{hint}"
        )
    return job


def _rank(path: Path, place: int) -> _Rank:
    """Read one file."""
    try:
        data = read_unpacked(path, _MOST_BYTES)
        with keeping_the_interpreter():
            trace = parse_json(data, _MOST_BYTES)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list):
        raise ConfigError(f"{path}: traceEvents: missing; allowed: a trace that PyTorch's profiler exported")
    try:
        by_category = _by_category(events)
        family, markers, around = _markers(by_category)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from None
    work = _Work(by_category)
    iterations = []
    for of_iteration in _iterations(markers, around):
        timed = [(one, work.within(one.span)) for one in of_iteration]
        if {part for one, _ in timed for part in (FORWARD, BACKWARD) if part in one.kind} == {FORWARD, BACKWARD}:
            iterations.append(timed)  # else it evaluates, or the trace begins or ends within it
    if not iterations:
        raise ConfigError(
            f"{path}: got no training iteration; allowed: a trace with whole iterations that has annotations of "
            "torch.distributed.pipelining, or was made with with_stack=True under DeepSpeed, Megatron or PyTorch's 1F1B"
        )
    info = trace.get("distributedInfo")
    rank = info.get("rank") if isinstance(info, dict) else None
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank <= MOST_COUNT:
        numbers = re.findall(r"\d{1,9}", path.name.partition(".json")[0])
        rank = int(numbers[-1]) if numbers else place
    return _Rank(path, rank, family, iterations)


def _by_category(events: Sequence[Any]) -> dict[str, list[tuple[_Span, dict[str, Any]]]]:
    """Complete events that count here, by category, each with its arguments.

    Raises:
        ValueError: one of them is not as it has to be.
    """
    wanted = {"user_annotation", "python_function", "cpu_op", "kernel", *_LAUNCHES}
    found: dict[str, list[tuple[_Span, dict[str, Any]]]] = defaultdict(list)
    for place, event in enumerate(events):
        if not isinstance(event, dict):
            raise ValueError(f"traceEvents[{place}]: got {shown(event)}; allowed: an object")
        category, name = event.get("cat"), event.get("name")
        if event.get("ph") != "X" or not isinstance(category, str) or category not in wanted:
            continue
        start_us = number(event.get("ts", 0), 0, _MOST_US, f"traceEvents[{place}].ts")
        time_us = number(event.get("dur", 0), 0, _MOST_US, f"traceEvents[{place}].dur")
        arguments = event.get("args")
        span = _Span(name if isinstance(name, str) else "", start_us, start_us + time_us)
        found[category].append((span, arguments if isinstance(arguments, dict) else {}))
    return found


def _markers(
    by_category: dict[str, list[tuple[_Span, dict[str, Any]]]],
) -> tuple[str, list[_Marker], list[_Span]]:
    """What the markers are found by, they, and what encloses iterations, each in the order of time."""
    annotated, numbered = [], []
    for span, _ in by_category.get("user_annotation", ()):
        if found := _ANNOTATED.fullmatch(span.name):
            annotated.append(_annotated(found[1], span))
        elif found := _NUMBERED.fullmatch(span.name):
            numbered.append(_Marker((), found[1].lower(), int(found[2]), span))
    frames: dict[str, list[_Marker]] = defaultdict(list)
    around = []
    for span, _ in by_category.get("python_function", ()):
        frame = _FRAME.fullmatch(span.name)
        if frame is None:
            continue
        for of_file, function in (*_FRAMES, *_ITERATIONS):
            if frame[2] == function and frame[1].endswith(of_file):
                if (of_file, function) in _ITERATIONS:
                    around.append(span)
                else:
                    frames[of_file].append(_Marker((), _FRAMES[of_file, function], -1, span))
    family, markers = next(
        ((name, found) for name, found in (("PP", annotated), ("GPipe", numbered), *frames.items()) if found), ("", [])
    )
    return family, sorted(markers, key=lambda one: one.span.start_us), sorted(around, key=lambda one: one.start_us)


def _annotated(text: str, span: _Span) -> _Marker:
    """An annotation of a schedule of several stages per rank; an action that is no instruction has no kind."""
    try:
        step = parsed(text)
    except ScheduleError as error:
        raise ValueError(f"annotation PP:{text[:80]}: {error}") from None
    computes = [action for action in step if action.type in KIND_OF]
    kind = KIND_OF[computes[0].type] if computes else ""
    return _Marker(step, of_pair(*(KIND_OF[one.type] for one in computes)) if len(computes) > 1 else kind, -1, span)


def _iterations(markers: Sequence[_Marker], around: Sequence[_Span]) -> Iterator[list[_Marker]]:
    """The markers of each iteration: those within a function that runs one, or else until one comes again."""
    if around:
        outer: list[_Span] = []
        for span in around:
            if not outer or span.start_us >= outer[-1].end_us:
                outer.append(span)
        starts_us = [marker.span.start_us for marker in markers]
        for span in outer:
            low, high = (bisect.bisect_left(starts_us, edge) for edge in (span.start_us, span.end_us))
            yield list(markers[low:high])
        return
    seen: set[object] = set()
    current: list[_Marker] = []
    for marker in markers:
        what = marker.step or (marker.kind, marker.microbatch)
        # Of functions alone nothing says where an iteration ends. Parameters may be gathered several times in one.
        if what in seen and max((marker.microbatch, *(action.microbatch for action in marker.step))) >= 0:
            yield current
            seen, current = set(), []
        seen.add(what)
        current.append(marker)
    yield current


class _Work:
    """What is computed, by when the CPU asked for it."""

    def __init__(self, by_category: dict[str, list[tuple[_Span, dict[str, Any]]]]) -> None:
        kernels = {
            args["correlation"]: span
            for span, args in by_category.get("kernel", ())
            if isinstance(args.get("correlation"), int) and not _communicates(span.name)
        }
        if kernels:
            asked = [
                (span.start_us, kernels[args["correlation"]])
                for category in sorted(_LAUNCHES)
                for span, args in by_category.get(category, ())
                if isinstance(args.get("correlation"), int) and args["correlation"] in kernels
            ]
        else:
            operators = [span for span, _ in by_category.get("cpu_op", ()) if not _communicates(span.name)]
            asked = [(span.start_us, span) for span in operators]
        asked.sort(key=lambda one: one[0])
        self._asked_us = [since_us for since_us, _ in asked]
        self._spans = [span for _, span in asked]

    def within(self, marker: _Span) -> tuple[float, float]:
        """From when to when, in seconds, what is asked for within a marker is computed; nothing: at its begin."""
        low, high = (bisect.bisect_left(self._asked_us, edge) for edge in (marker.start_us, marker.end_us))
        spans = self._spans[low:high]
        if not spans:
            return marker.start_us / 1e6, marker.start_us / 1e6
        return min(one.start_us for one in spans) / 1e6, max(one.end_us for one in spans) / 1e6


def _communicates(name: str) -> bool:
    return any(part in name.lower() for part in _COMMUNICATION)


def _own_stages(one: _Rank) -> tuple[int, ...]:
    return tuple(sorted({action.stage for marker, _ in one.iterations[0] for action in marker.step}))


def _places_by_stages(ranks: Sequence[_Rank]) -> dict[int, tuple[int, int]]:
    """Stage (of ranks) and replica by rank, from the model's stages that each runs."""
    order = sorted({_own_stages(one) for one in ranks})
    return _in_replicas(ranks, {one.rank: order.index(_own_stages(one)) for one in ranks})


def _places_by_order(ranks: Sequence[_Rank], stages: int | None) -> dict[int, tuple[int, int]]:
    """The same from the forwards that each rank runs ahead, or from the ranks' numbers."""
    if stages is not None:
        each, left = divmod(len(ranks), stages)
        if stages < 1 or left or not each:
            raise ConfigError(f"--stages: got {stages}; allowed: a number that divides the {len(ranks)} traces")
        return _in_replicas(ranks, {one.rank: place // each for place, one in enumerate(ranks)})
    ahead = sorted({one.ahead for one in ranks}, reverse=True)
    if ahead != list(range(len(ahead), 0, -1)):
        raise ConfigError(
            f"--stages: missing; the {len(ranks)} traces do not tell which stage they are of (forwards before the "
            f"first backward: {', '.join(map(str, ahead[:8]))}); allowed: the number of stages of the pipeline"
        )
    return _in_replicas(ranks, {one.rank: ahead.index(one.ahead) for one in ranks})


def _in_replicas(ranks: Sequence[_Rank], stage_of: dict[int, int]) -> dict[int, tuple[int, int]]:
    """Number the replicas of each stage by rank."""
    members: dict[int, list[int]] = defaultdict(list)
    for one in ranks:
        members[stage_of[one.rank]].append(one.rank)
    sizes = {stage: len(of_stage) for stage, of_stage in members.items()}
    if len(set(sizes.values())) > 1:
        raise ConfigError(f"got {sizes} traces by stage; allowed: traces of all ranks, as many of each stage")
    return {rank: (stage, replica) for stage, of in members.items() for replica, rank in enumerate(of)}


def _as_run(ranks: Sequence[_Rank], places: dict[int, tuple[int, int]]) -> GivenSchedule:
    """The schedule of annotated actions, which are all that the ranks run."""
    first = sorted((one for one in ranks if places[one.rank][1] == 0), key=lambda one: places[one.rank])
    # The longest one is whole, and has all microbatches.
    steps = [[marker.step for marker, _ in max(one.iterations, key=len)] for one in first]
    return GivenSchedule("PyTorch's actions", lambda stages, microbatches: streams_of_steps(steps, pairs_as_one=True))


def _ran(
    one: _Rank,
    markers: Sequence[tuple[_Marker, tuple[float, float]]],
    given: GivenSchedule | None,
    stage: int,
    stages: int,
    chunks: int | None,
) -> list[Ran]:
    """The instructions of an iteration of a rank."""
    if one.family == "PP":
        chunk_of = {number: chunk for chunk, number in enumerate(_own_stages(one))}
        return [
            Ran(*_instruction(marker.step, chunk_of), since_s, until_s - since_s)
            for marker, (since_s, until_s) in markers
            if marker.kind
        ]
    if one.family == "GPipe":
        return [
            Ran(marker.kind, marker.microbatch, 0, since_s, until_s - since_s) for marker, (since_s, until_s) in markers
        ]
    # The k-th forward is that of microbatch k, and so are backwards, unless the schedule has it otherwise.
    forwards = sum(marker.kind == FORWARD for marker, _ in markers)
    wanted: dict[str, Iterator[tuple[int, int]]] = {}
    for kind in (FORWARD, BACKWARD):
        wanted[kind] = iter([(m, 0) for m in range(len(markers))])
        if given is not None:
            in_each = _chunks(given.streams(stages, forwards, chunks))
            if forwards % in_each:
                raise ConfigError(
                    f"{one.path}: got {forwards} forwards in an iteration; allowed: a multiple of the {in_each} chunks "
                    f"of --schedule {given.name}"
                )
            streams = given.streams(stages, forwards // in_each, chunks)
            own = streams[stage] if stage < len(streams) else ()
            wanted[kind] = iter(
                [(op.microbatch, op.chunk) for op in own if isinstance(op, Compute) and op.kind.startswith(kind)]
            )
    ran = []
    for marker, (since_s, until_s) in markers:
        microbatch, chunk = next(wanted[marker.kind], (-1, 0))
        if microbatch < 0:
            raise ConfigError(
                f"{one.path}: got more of {marker.kind} than stage {stage} has; allowed: another --schedule"
            )
        ran.append(Ran(marker.kind, microbatch, chunk, since_s, until_s - since_s))
    return ran


def _chunks(streams: Sequence[StageStream]) -> int:
    """Model chunks per stage."""
    return 1 + max((op.chunk for stream in streams for op in stream if isinstance(op, Compute)), default=0)


def _instruction(step: Step, chunk_of: dict[int, int]) -> tuple[str, int, int]:
    """Kind, microbatch and chunk, as `streams_of_steps` names them, a single one's kind without its chunk."""
    computes: list[Action] = [action for action in step if action.type in KIND_OF]
    first = computes[0]
    chunk = chunk_of[first.stage]
    if len(computes) == 1:
        return KIND_OF[first.type], first.microbatch, chunk
    kinds = [of_chunk(KIND_OF[one.type], chunk_of[one.stage]) for one in computes]
    return of_pair(*kinds), first.microbatch, chunk
