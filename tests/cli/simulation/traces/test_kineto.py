"""Traces of PyTorch's profiler: what is read of them, and what is refused."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from plotly.offline import get_plotlyjs

from perseus_plugin.cli.simulation.traces.findings import explained
from perseus_plugin.cli.simulation.traces.kineto import load_traces
from perseus_plugin.cli.simulation.traces.traced import GivenSchedule, TracedJob
from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.schedules import OF_CHUNKS, SCHEDULES
from tests.cli.commands import Perseus
from tests.cli.simulation.traces.made import Duration, uneven
from tests.cli.simulation.traces.made_kineto import (
    GAP_S,
    Framework,
    annotated_traces,
    event,
    traces_with_stacks,
    write_trace,
)

KEPT = Path(__file__).parents[3] / "data" / "profiler-traces"


def assert_durations(job: TracedJob, duration: Duration) -> None:
    for node, one in enumerate(job.graph.instructions):
        if one is None:
            continue
        for step in range(len(job.steps)):
            for replica in range(len(job.replicas)):
                wanted = duration(step, replica, one.stage, one.kind, one.microbatch)
                # A trace holds microseconds since the machine was started, of which a float keeps thousandths.
                assert job.durations_s[step, replica, node] == pytest.approx(wanted, abs=1e-8)


@pytest.mark.parametrize("on_gpu", [False, True], ids=["operators", "kernels"])
@pytest.mark.parametrize("framework", get_args(Framework))
def test_frames_tell_what_ran(tmp_path: Path, framework: Framework, on_gpu: bool) -> None:
    paths = traces_with_stacks(tmp_path, framework, uneven, stages=4, microbatches=6, replicas=2, on_gpu=on_gpu)
    job = load_traces(paths[::-1])
    assert job.schedule == ("PyTorch's 1F1B" if framework == "pytorch" else "1f1b")
    assert (job.stages, job.microbatches, job.replicas, job.in_order) == (4, 6, (0, 1), 1.0)
    assert job.steps == (0, 1, 2, 3)
    assert_durations(job, uneven)
    explains = explained(job)
    assert explains.end_s == pytest.approx(GAP_S, rel=0.02)
    assert explains.error_worst < 0.002


@pytest.mark.parametrize("sharded", [False, True])
def test_annotations_tell_schedule_and_stages(tmp_path: Path, sharded: bool) -> None:
    def split(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
        return 0.05 * (1 + stage) + 0.01 * step + (0.02 if kind.startswith("forward") else 0.0)

    job = load_traces(annotated_traces(tmp_path, split, sharded=sharded))
    assert (job.schedule, job.stages, job.microbatches) == ("PyTorch's actions", 2, 4)
    assert (job.steps, job.left_out, job.in_order) == ((0, 1, 2), (), 1.0)
    kinds = {kind for stage, kind in job.classes if stage == 0}
    assert kinds == {"forward", "forward_1", "weight_backward", "weight_backward_1", "input_backward_1"}
    assert_durations(job, split)


def test_numbered_annotations_are_pytorchs_gpipe_and_need_the_number_of_stages(tmp_path: Path) -> None:
    paths = []
    for rank in range(2):
        events: list[dict[str, Any]] = []
        for step in range(2):
            for part, kind in enumerate(("Forward", "Backward")):
                for m in range(3):
                    since_s = 1 + step + 0.4 * part + 0.1 * m
                    events.append(event("user_annotation", f"{kind} {m}", since_s - 0.04, 0.09))
                    events.append(event("cpu_op", "aten::mm", since_s, 0.05))
        paths.append(write_trace(tmp_path / f"r{rank}.json", events, rank))
    with pytest.raises(ConfigError, match="--stages: missing; the 2 traces do not tell"):
        load_traces(paths)
    with pytest.raises(ConfigError, match="--stages: got 3; allowed: a number that divides the 2 traces"):
        load_traces(paths, stages=3)
    job = load_traces(paths, stages=2)
    assert (job.schedule, job.stages, job.microbatches, job.steps) == ("PyTorch's GPipe", 2, 3, (0, 1))
    assert np.allclose(job.durations_s[:, :, ~job.graph.is_constant], 0.05)


def test_a_schedule_that_is_given_says_which_microbatch_is_which(tmp_path: Path) -> None:
    def by_microbatch(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
        return 0.01 * (1 + microbatch)

    paths = traces_with_stacks(tmp_path, "megatron", by_microbatch, schedule="gpipe", microbatches=3)
    job = load_traces(paths, GivenSchedule("gpipe", SCHEDULES["gpipe"]), stages=2)
    assert_durations(job, by_microbatch)


def test_functions_of_an_interleaved_schedule_need_its_number_of_chunks(tmp_path: Path) -> None:
    def by_microbatch(step: int, replica: int, stage: int, kind: str, microbatch: int) -> float:
        return 0.01 * (1 + microbatch)

    paths = traces_with_stacks(tmp_path, "megatron", by_microbatch, chunks=4)
    given = GivenSchedule("interleaved-1f1b", SCHEDULES["interleaved-1f1b"], OF_CHUNKS["interleaved-1f1b"])
    job = load_traces(paths, given, stages=2, chunks=4)
    assert (job.microbatches, job.in_order) == (4, 1.0)
    assert {one.chunk for one in job.graph.instructions if one is not None} == {0, 1, 2, 3}
    assert_durations(job, by_microbatch)
    # Two chunks, as the schedule has if nothing is said, divide the forwards as well.
    wrong = "--schedule: got interleaved-1f1b of 2 chunks; 0% of the iterations .* allowed: .* --chunks"
    for chunks in (None, 2):
        with pytest.raises(ConfigError, match=wrong):
            load_traces(paths, given, stages=2, chunks=chunks)
    with pytest.raises(ConfigError, match="got 16 forwards in an iteration; allowed: a multiple of the 3 chunks"):
        load_traces(paths, given, stages=2, chunks=3)
    with pytest.raises(ConfigError, match=r"--chunks: got 4; .* allowed: with --schedule interleaved-1f1b or"):
        load_traces(paths, None, stages=2, chunks=4)


def test_annotations_say_how_many_chunks_there_are(tmp_path: Path) -> None:
    paths = annotated_traces(tmp_path, uneven)
    assert load_traces(paths, chunks=2).microbatches == 4
    with pytest.raises(ConfigError, match=r"--chunks: got 4; allowed: 2, as rank0\.json and 1 more has"):
        load_traces(paths, chunks=4)


def test_evaluation_and_what_is_cut_off_do_not_count(tmp_path: Path) -> None:
    paths = traces_with_stacks(tmp_path, "deepspeed", uneven)
    for path in paths:
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        file = "/x/deepspeed/runtime/pipe/engine.py"
        events.append(event("python_function", f"{file}(10): _exec_schedule", 90.0, 1.0))
        for number in range(3):
            since_s = 90.1 + 0.1 * number
            events.append(event("python_function", f"{file}(20): _exec_forward_pass", since_s, 0.05))
            events.append(event("cpu_op", "aten::mm", since_s, 0.05))
        write_trace(path, events[1:], None)
    assert load_traces(paths).steps == (0, 1, 2, 3)


def test_the_command_takes_them(perseus: Perseus, tmp_path: Path) -> None:
    paths = traces_with_stacks(tmp_path, "megatron", uneven, replicas=2, on_gpu=True)
    out = tmp_path / "out.json.txt"
    done = perseus("simulate", *paths, "-o", out.with_suffix(".json"), "--html", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    for text in (
        "intrinsic bloat",
        "static plan saves",
        "figure-timeline",
        "full clocks, replica 0",
        "static plan, replica",
    ):
        assert text in page, text
    assert not re.search(r'(src|href)="(?!data:|#)', page.replace(get_plotlyjs(), "")), "it needs another file"
    assert "rank0.json.gz and 3 more: 1f1b, 2 stages, 4 microbatches, 2 replicas, 4 steps" in done.stdout
    assert json.loads(out.with_suffix(".json").read_text())["bloat"]["intrinsic"]["mean"] > 0.05


def test_traces_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    paths = traces_with_stacks(tmp_path, "megatron", uneven, replicas=2)
    with pytest.raises(ConfigError, match=r"rank0\.json\.gz: got rank 0 a second time"):
        load_traces([paths[0], paths[0]])
    with pytest.raises(ConfigError, match="as many of each stage"):
        load_traces(paths[:3])
    (tmp_path / "other").mkdir()
    other = traces_with_stacks(tmp_path / "other", "deepspeed", uneven)
    with pytest.raises(ConfigError, match="those of one job"):
        load_traces([paths[0], other[1]])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "traceEvents: missing; allowed: a trace that PyTorch's profiler exported"),
        ('{"traceEvents": 3}', "traceEvents: missing"),
        ("no json", "cannot be read"),
        ("[" * 100_000, "nested more than"),
        ('{"traceEvents": []}', "got no training iteration; allowed: a trace with whole iterations"),
        ('{"traceEvents": [3]}', r"traceEvents\[0\]: got 3; allowed: an object"),
        ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "ts": "now"}]}', r'traceEvents\[0\]\.ts: got "now"'),
        ('{"traceEvents": [{"ph": "X", "cat": "cpu_op", "ts": 1, "dur": NaN}]}', r"traceEvents\[0\]\.dur: got nan"),
        (
            '{"traceEvents": [{"ph": "X", "cat": "user_annotation", "name": "PP:0X1", "ts": 1}]}',
            "annotation PP:0X1: got '0X1'; allowed: what PyTorch's schedules write",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "rank0.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as refused:
        load_traces([path])
    assert str(refused.value).startswith(str(path))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("what", "schedule", "stages", "kinds"),
    [
        ("deepspeed", "1f1b", None, {"forward", "backward"}),
        ("megatron", "1f1b", None, {"forward", "backward"}),
        ("1f1b", "PyTorch's 1F1B", None, {"forward", "backward"}),
        ("gpipe", "PyTorch's GPipe", 2, {"forward", "backward"}),
        ("interleaved", "PyTorch's actions", None, {"forward", "forward_3", "backward", "backward_3"}),
        ("zbv", "PyTorch's actions", None, {"forward", "forward_1", "input_backward", "weight_backward"}),
    ],
)
def test_traces_of_real_jobs_are_read(what: str, schedule: str, stages: int | None, kinds: set[str]) -> None:
    """Two ranks each, on a busy CPU, so that durations vary; `profiled.py` has made them."""
    job = load_traces([KEPT / f"{what}-rank{rank}.json.gz" for rank in (1, 0)], stages=stages)
    assert (job.schedule, job.stages, job.microbatches) == (schedule, 2, 4)
    assert (job.replicas, len(job.steps), job.left_out, job.in_order) == ((0,), 4, (), 1.0)
    assert kinds <= {kind for _, kind in job.classes}
    took_s = job.durations_s[:, :, ~job.graph.is_constant]
    assert (took_s > 1e-4).all()
    timed = np.isfinite(job.times_s)
    assert timed.tolist() == [True, True, True, False]
    # Work and what is waited for make up the iteration: no stage works longer than that.
    for nodes in job.graph.stage_nodes:
        assert (job.durations_s[timed, 0][:, nodes].sum(axis=1) < job.times_s[timed]).all()
    assert explained(job).error_mean < 0.1
