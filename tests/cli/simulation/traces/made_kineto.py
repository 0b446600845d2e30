"""Traces of PyTorch's profiler of jobs that are made up, as each framework's have them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np

from perseus_plugin.iteration.actions import Action, Step, streams_of_steps, written
from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import BACKWARD, Instruction
from perseus_plugin.iteration.schedules import SCHEDULES, interleaved_1f1b
from tests.cli.simulation.traces.made import Duration

Framework = Literal["deepspeed", "megatron", "pytorch"]
FRAMES = {
    "deepspeed": ("/x/deepspeed/runtime/pipe/engine.py", "_exec_schedule", "_exec_forward_pass", "_exec_backward_pass"),
    "megatron": (
        "megatron/core/pipeline_parallel/schedules.py",
        "forward_backward_pipelining_without_interleaving",
        "forward_step",
        "backward_step",
    ),
    "pytorch": ("torch/distributed/pipelining/", "_step_microbatches", "forward_one_chunk", "backward_one_chunk"),
}
ZERO_US = 4.8e12  # traces count from when the machine was started
GAP_S = 0.05  # from one iteration to the next


def event(category: str, name: str, start_s: float, time_s: float, tid: int = 1, **args: Any) -> dict[str, Any]:
    times = {"ts": ZERO_US + 1e6 * start_s, "dur": 1e6 * time_s}
    return {"ph": "X", "cat": category, "name": name, "pid": 7, "tid": tid, **times, "args": args}


def write_trace(path: Path, events: list[dict[str, Any]], rank: int | None) -> Path:
    """Write it, packed where the name says so."""
    trace: dict[str, Any] = {"schemaVersion": 1, "traceEvents": [{"ph": "M", "name": "process_name"}, *events]}
    if rank is not None:
        trace["distributedInfo"] = {"backend": "nccl", "rank": rank}
    data = json.dumps(trace).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def times_of(
    graph: PipelineGraph, duration: Duration, steps: int, replica: int
) -> Iterator[tuple[int, dict[Instruction, tuple[float, float]]]]:
    """Of each step start and duration of each instruction."""
    now_s = 1.0
    for step in range(steps):
        took = [
            0.0 if i is None else duration(step, replica, i.stage, i.kind, i.microbatch) for i in graph.instructions
        ]
        start_s, finish_s = graph.times(np.array(took))
        yield (
            step,
            {
                i: (now_s + float(start_s[node]), took[node])
                for node, i in enumerate(graph.instructions)
                if i is not None
            },
        )
        now_s += float(finish_s.max()) + GAP_S


def traces_with_stacks(
    folder: Path,
    framework: Framework,
    duration: Duration,
    *,
    stages: int = 2,
    microbatches: int = 4,
    steps: int = 4,
    replicas: int = 1,
    on_gpu: bool = False,
    schedule: str = "1f1b",
    chunks: int = 1,
) -> list[Path]:
    """One file per rank of a job whose frames tell what ran; ranks are numbered stage by stage.

    Of several `chunks` per stage the schedule is interleaved 1F1B.
    """
    streams = (
        interleaved_1f1b(stages, microbatches, chunks) if chunks > 1 else SCHEDULES[schedule](stages, microbatches)
    )
    graph = build_graph(streams)
    file, around, forward, backward = FRAMES[framework]
    files = (f"{file}schedules.py", f"{file}stage.py") if framework == "pytorch" else (file, file)
    paths = []
    for stage in range(stages):
        for replica in range(replicas):
            events: list[dict[str, Any]] = []
            rank = stage * replicas + replica
            for _, ran in times_of(graph, duration, steps, replica):
                own = {i: times for i, times in ran.items() if i.stage == stage}
                begin_s = min(since for since, _ in ran.values()) - 0.001
                end_s = max(since + took for since, took in ran.values()) + 0.001
                events.append(event("python_function", f"{files[0]}(10): {around}", begin_s, end_s - begin_s))
                for number, (i, (since_s, took_s)) in enumerate(own.items()):
                    name = f"{files[1]}({20 + number}): {backward if i.kind == BACKWARD else forward}"
                    # The CPU runs ahead of a GPU, and waits for what it receives.
                    early_s = begin_s + 1e-5 * number if on_gpu else since_s - 2e-6
                    within_s = 9e-6 if on_gpu else took_s
                    events.append(event("python_function", name, early_s, within_s))
                    if on_gpu:
                        for place, (kernel, share) in enumerate(
                            (("gemm", 0.25), ("ncclDevKernel", 2.0), ("gemm", 0.25))
                        ):
                            which = len(events)
                            at_s = since_s + (0.75 * took_s if place == 2 else 0.0)
                            events.append(
                                event("cuda_runtime", "cudaLaunchKernel", early_s + 1e-6, 1e-6, correlation=which)
                            )
                            events.append(event("kernel", kernel, at_s, share * took_s, tid=99, correlation=which))
                    else:
                        events.append(event("cpu_op", "c10d::recv_", since_s - 1e-6, 5e-7))
                        events.append(event("cpu_op", "aten::mm", since_s, took_s))
            path = folder / f"rank{rank}.json.gz"
            paths.append(write_trace(path, events, rank if framework != "deepspeed" else None))
    return paths


def lists_of(stages: int, microbatches: int) -> list[list[Step]]:
    """A zero-bubble schedule for two stages per rank, as its ranks' actions: halves of a V."""
    lists: list[list[Step]] = []
    last = 2 * stages - 1
    for rank in range(stages):
        steps: list[Step] = []
        for m in range(microbatches):
            for stage in (rank, last - rank):
                steps.append((Action(stage, "F", m),))
        for m in range(microbatches):
            for stage in (last - rank, rank):
                steps += [(Action(stage, "I", m),), (Action(stage, "W", m),)]
        lists.append(steps)
    return lists


def annotated_traces(
    folder: Path, duration: Duration, *, stages: int = 2, microbatches: int = 4, sharded: bool = False
) -> list[Path]:
    """One file per rank of a schedule whose actions are annotated; `sharded`: parameters are gathered for each."""
    lists = lists_of(stages, microbatches)
    graph = build_graph(streams_of_steps(lists))
    paths = []
    for rank, steps in enumerate(lists):
        events: list[dict[str, Any]] = []
        for _, ran in times_of(graph, duration, 3, 0):
            own = iter(sorted((times, i) for i, times in ran.items() if i.stage == rank))
            now_s = 0.0
            for step in steps:
                if step[0] == Action(0, "I", step[0].microbatch):
                    events.append(event("user_annotation", f"PP:{written(step)}", now_s, 1e-7))
                    continue
                (since_s, took_s), _ = next(own)
                events.append(event("user_annotation", f"PP:{written(step)}", since_s, took_s))
                events.append(event("cpu_op", "aten::mm", since_s, took_s))
                now_s = since_s + took_s
                if sharded:
                    stage = step[0].stage
                    events.append(event("user_annotation", f"PP:{stage}UNSHARD", since_s - 2e-6, 1e-6))
                    events.append(event("user_annotation", f"PP:{stage}RESHARD", now_s - 1e-6, 5e-7))
        paths.append(write_trace(folder / f"rank{rank}.json", events, rank))
    return paths
