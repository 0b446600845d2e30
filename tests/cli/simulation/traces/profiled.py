"""Real traces for the tests: small jobs of two ranks under PyTorch's profiler, on the CPU, and a slice of each kept.

Run `torchrun --nproc-per-node 2 -m tests.cli.simulation.traces.profiled WHAT FOLDER` to make them anew, with WHAT one
of deepspeed, megatron, 1f1b, gpipe, interleaved, zbv. A slice has what tells instructions, and operators that follow
each other as one; names of folders are cut.
"""

from __future__ import annotations

import bisect
import gzip
import json
import os
import re
import runpy
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from perseus_plugin.files import read_unpacked

STEPS, WARM_UP, MICROBATCHES = 4, 2, 4
_ROOT = Path(__file__).parents[4]
_COMMUNICATES = re.compile(r"c10d::|gloo:|record_param_comms")
_FRAMES = re.compile(
    r".*(deepspeed/runtime/pipe/engine\.py\(\d+\): (_exec_schedule|_exec_\w+_pass)"
    r"|megatron/core/pipeline_parallel/schedules\.py\(\d+\): ((for|back)ward_step\b|forward_backward_pipelining_\w+)"
    r"|torch/distributed/pipelining/\w+\.py\(\d+\): (_step_microbatches|\w+_one_chunk))"
)


def sliced(trace: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a trace; operators one after the other between the same instructions' ends become one."""
    markers, operators = [], []
    until_us: dict[Any, float] = {}
    events = sorted((e for e in trace["traceEvents"] if e.get("ph") == "X"), key=lambda e: float(e["ts"]))
    zero_us = float(events[0]["ts"]) - 1000
    for event in events:
        category, name = event.get("cat"), event["name"]
        start_us, time_us = float(event["ts"]) - zero_us, float(event["dur"])
        if category == "cpu_op":
            if start_us >= until_us.get(event.get("tid"), 0.0):  # else it is within another operator
                until_us[event.get("tid")] = start_us + time_us
                operators.append([name if _COMMUNICATES.search(name) else "aten", start_us, start_us + time_us])
        elif category == "user_annotation":
            markers.append([category, name, start_us, start_us + time_us])
        elif category == "python_function" and (frame := _FRAMES.match(name)):
            markers.append([category, frame[1], start_us, start_us + time_us])
    ends_us = sorted(edge for _, _, *edges in markers for edge in edges)
    merged: list[list[Any]] = []
    for name, start_us, end_us in operators:
        before = merged[-1] if merged else None
        if (
            before is not None
            and name == before[1] == "aten"
            and bisect.bisect(ends_us, before[2]) == bisect.bisect(ends_us, start_us)
        ):
            before[3] = max(before[3], end_us)
        else:
            merged.append(["cpu_op", name, start_us, end_us])
    kept = [
        {"ph": "X", "cat": category, "name": name, "ts": round(since_us, 1), "dur": round(until_us - since_us, 1)}
        for category, name, since_us, until_us in (*markers, *merged)
    ]
    return {"distributedInfo": {"rank": trace["distributedInfo"]["rank"]}, "traceEvents": kept}


def deepspeed_steps() -> Callable[[], Any]:
    """A step of DeepSpeed's pipeline engine."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    sys.path.insert(0, str(_ROOT / "examples" / "deepspeed_gpt"))
    import deepspeed
    from deepspeed.pipe import PipelineModule
    from model import gpt_layers, loss_fn

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    import torch

    module = PipelineModule(
        layers=gpt_layers(blocks=6, width=64, heads=4, vocabulary=256, length=32),
        num_stages=2,
        loss_fn=loss_fn,
        partition_method="uniform",
    )
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": MICROBATCHES,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True}},
    }
    engine, *_ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)

    def batches() -> Iterator[Any]:
        while True:
            tokens = torch.randint(256, (2, 33))
            yield tokens[:, :-1], tokens[:, 1:]

    data = batches()
    return lambda: engine.train_batch(data)


def pytorch_steps(name: str) -> Callable[[], Any]:
    """A step of one of PyTorch's schedules."""
    sys.path.insert(0, str(_ROOT / "examples" / "torch_pipelining"))
    import torch
    import torch.distributed as dist
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import PipelineScheduleSingle, get_schedule_class
    from train import LENGTH, V_SHAPED, VOCABULARY, loss_of, part_of_model

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    kind = get_schedule_class(name)
    single = issubclass(kind, PipelineScheduleSingle)
    # So many stages that PyTorch gathers the parameters of some of them several times.
    in_all = ranks if single else 2 * ranks if name in V_SHAPED else 4 * ranks
    numbers = [rank, in_all - 1 - rank] if name in V_SHAPED else list(range(rank, in_all, ranks))
    stages = [PipelineStage(part_of_model(n, in_all), n, in_all, torch.device("cpu")) for n in numbers]
    given: Any = stages[0] if single else stages
    schedule: Any = kind(given, MICROBATCHES, loss_fn=loss_of)

    def step() -> None:
        tokens = torch.randint(VOCABULARY, (2 * MICROBATCHES, LENGTH + 1))
        inputs = (tokens[:, :-1],) if 0 in numbers else ()
        targets = {"target": tokens[:, 1:].contiguous(), "losses": []} if in_all - 1 in numbers else {}
        schedule.step(*inputs, **targets)

    return step


def profiled_by_megatron(scratch: Path) -> Path:
    """Run a job of Megatron's with its own flags for PyTorch's profiler; the trace that it writes."""
    from tests.megatron_support.flags import flags

    script = _ROOT / "tests" / "megatron_support" / "pretrain_gpt.py"
    first = WARM_UP + 1
    sys.argv = [
        str(script),
        *flags(
            2,
            MICROBATCHES,
            train_iters=first + STEPS,
            profile=True,
            use_pytorch_profiler=True,
            pytorch_profiler_collect_callstack=True,
            profile_step_start=first,
            profile_step_end=first + STEPS,
            tensorboard_dir=scratch / "tensorboard",
        ),
    ]
    runpy.run_path(str(script), run_name="__main__")
    return scratch / "torch_profile" / f"rank-{os.environ['RANK']}.json.gz"


def keep(whole: Path, folder: Path, what: str) -> None:
    """Write the slice of this rank's trace."""
    data = json.dumps(sliced(json.loads(read_unpacked(whole, 2**30))), separators=(",", ":")).encode()
    (folder / f"{what}-rank{os.environ['RANK']}.json.gz").write_bytes(gzip.compress(data, mtime=0))


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "megatron":
        with tempfile.TemporaryDirectory() as scratch:
            keep(profiled_by_megatron(Path(scratch)), folder, what)
        return
    import torch
    from torch.profiler import ProfilerActivity, profile

    torch.set_num_threads(1)
    names = {"1f1b": "1F1B", "gpipe": "GPipe", "interleaved": "Interleaved1F1B", "zbv": "ZBVZeroBubble"}
    step = deepspeed_steps() if what == "deepspeed" else pytorch_steps(names[what])
    for _ in range(WARM_UP):
        step()
    with profile(activities=[ProfilerActivity.CPU], with_stack=what in ("deepspeed", "1f1b")) as profiler:
        for _ in range(STEPS):
            step()
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(whole))
        keep(whole, folder, what)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
