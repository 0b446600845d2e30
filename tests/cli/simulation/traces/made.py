"""Tables of operations of jobs that are made up: a schedule run with durations that are given."""

from __future__ import annotations

import csv
import gzip
import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import SCHEDULES, interleaved_1f1b

Duration = Callable[[int, int, int, str, int], float]
"""Of step, replica, stage, kind and microbatch, seconds."""

COLUMNS = ("dp_rank", "stage", "rank", "step", "optype", "start_ts", "duration", "mc", "mb_id")


def rows_of(
    duration: Duration,
    *,
    stages: int = 2,
    microbatches: int = 4,
    steps: int = 6,
    replicas: int = 2,
    schedule: str = "1f1b",
    chunk_times: Sequence[float] = (),
    transfer_s: float = 0.0,
    end_s: float = 0.0,
) -> list[dict[str, str | int | float]]:
    """Rows of a table; every step begins with a gather of parameters that takes no time and ends with an optimizer.

    With `chunk_times` the schedule is interleaved 1F1B; they say how many times as long each model chunk takes.
    """
    if chunk_times:
        streams = interleaved_1f1b(stages, microbatches, len(chunk_times))
    else:
        streams = SCHEDULES[schedule](stages, microbatches)
    graph = build_graph(streams, latency_s=transfer_s)
    rows: list[dict[str, str | int | float]] = []
    for step in range(steps):
        ends = []
        for replica in range(replicas):
            took = [
                0.0
                if one is None
                else duration(step, replica, one.stage, one.kind, one.microbatch)
                * (chunk_times[one.chunk] if chunk_times else 1.0)
                for one in graph.instructions
            ]
            start_s, finish_s = graph.times(np.array(took))
            ends.append(float(finish_s.max()))
            for one, since_s, time_s in zip(graph.instructions, start_s.tolist(), took, strict=True):
                assert one is not None  # the textbook schedules have no constant-time work
                rows.append(
                    {
                        "dp_rank": replica,
                        "stage": one.stage,
                        "rank": replica * stages + one.stage,
                        "step": step,
                        "optype": f"{one.kind}-compute",
                        "start_ts": since_s,
                        "duration": time_s,
                        "mc": one.chunk,
                        "mb_id": one.microbatch,
                    }
                )
        other = {"dp_rank": 0, "stage": 0, "rank": 0, "step": step, "mc": -1, "mb_id": -1}
        rows.append({**other, "optype": "params-all-gather", "start_ts": 0.0, "duration": 0.0})
        rows.append({**other, "optype": "optimizer", "start_ts": max(ends), "duration": end_s})
    return rows


def write_table(path: Path, rows: list[dict[str, str | int | float]]) -> Path:
    """Write it, packed where the name says so."""
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    data = out.getvalue().encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def uneven(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
    """Stage 1 takes half as much again; a backward twice a forward; steps differ a little."""
    return 0.1 * (2 if kind == "backward" else 1) * (1.5 if stage == 1 else 1.0) * (1 + 0.01 * ((step + replica) % 3))
