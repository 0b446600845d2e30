"""A straggler in a real job: how fast it is answered, what that costs in time and saves in energy.

As one process it times planning for a straggler, through the planner's own process:

    python benchmarks/straggler_answer.py

Under torchrun it trains a real DeepSpeed job with data-parallel pipelines on emulated GPUs. In the middle the last
stage's GPU of the last replica becomes slower. It is either reported (some iterations later, so that there is something
to compare with) or left to be detected; then it recovers.

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 8 benchmarks/straggler_answer.py --stages 4 --by report
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 8 benchmarks/straggler_answer.py --stages 4 --by detection
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from perseus_plugin.gpus.emulated.physics import A100, load_class
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.planner_process import PlannerProcess
from perseus_plugin.planning.process import PaceRequest, PlanRequest, plan_for
from perseus_plugin.profiling.profile import Measurement, Profile

SLOWDOWN = 1.25
SLOW_AT, REPORT_AT, RECOVER_AT, STEPS = 36, 50, 70, 86
CLOCKS_MHZ = (1410, 1260, 1110, 960, 810)


# Planning.


def emulated_profile(stages: int, clocks: int) -> Profile:
    """Stages that differ by up to 10 %, on the emulated A100."""
    rng = random.Random(0)
    rows = []
    for stage in range(stages):
        size = 1 + 0.1 * rng.random()
        for kind, full_s in (("forward", 0.03), ("backward", 0.06)):
            for clock in A100.clocks_mhz()[:: max(1, 38 // clocks)][:clocks]:
                time_s = size * full_s * A100.stretch(load_class(kind), clock)
                rows.append((stage, kind, Measurement(clock, time_s, time_s * A100.power_w(load_class(kind), clock))))
    return Profile.from_rows(rows)


def time_planning(repeats: int) -> None:
    """Print how long the planner's process takes to answer."""
    planner = PlannerProcess()
    print("| stages x microbatches | replicas | plans | seconds: median, most |")
    print("|---|---|---|---|")
    for stages, microbatches in ((4, 32), (8, 32), (8, 96)):
        profile = emulated_profile(stages, 8)
        streams = one_f_one_b(stages, microbatches)
        request = PlanRequest("1f1b", streams, {}, profile, [A100.blocking_w] * stages, margin=0.01)
        plan = plan_for(request)
        clocks = tuple(tuple(plan.clocks_mhz(stage)) for stage in range(stages))
        even = (1.0,) * stages
        slow = (*even[:-1], SLOWDOWN)
        for name, variants in (("several", (even, slow)), ("one", (slow,))):
            seconds = []
            for _ in range(repeats):
                begin_s = time.perf_counter()
                planner.submit(
                    PlanRequest(
                        "1f1b",
                        streams,
                        {},
                        profile,
                        [A100.blocking_w] * stages,
                        margin=0.01,
                        pace=PaceRequest(variants, clocks),
                    )
                )
                while (answer := planner.poll()) is None:
                    time.sleep(0.001)
                seconds.append(time.perf_counter() - begin_s)
                assert answer.pace is not None, answer.error
            print(
                f"| {stages} x {microbatches} | {name} | {len(variants)} | "
                f"{statistics.median(seconds):.2f}, {max(seconds):.2f} |",
                flush=True,
            )
    planner.close()


# A real job.


def train(arguments: argparse.Namespace) -> None:
    """Train, let the straggler come and go, and print what happened."""
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule

    import perseus_plugin
    from perseus_plugin.gpus.emulated.device import EmulatedGpu

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "deepspeed_gpt"))
    from data import microbatches, standard_library_text
    from model import gpt_layers, loss_fn

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    torch.set_num_threads(1)
    torch.manual_seed(1)
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    layers = gpt_layers(blocks=2 * arguments.stages, width=32, heads=2, vocabulary=256, length=32)
    module = PipelineModule(layers=layers, num_stages=arguments.stages, loss_fn=loss_fn, partition_method="uniform")
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": arguments.microbatches,
        "steps_per_print": 100000,
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "torch_adam": True}},
    }
    engine, _, _, _ = deepspeed.initialize(model=module, model_parameters=module.parameters(), config=config)
    folders: list[str] = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folders)
    out = Path(folders[0])
    forward_s = [arguments.forward_s * (1 + 0.05 * stage) for stage in range(arguments.stages)]
    block: dict[str, Any] = {
        "output_dir": str(out),
        "profiling": {"warmup_steps": 2, "clocks_mhz": list(CLOCKS_MHZ), "steps_per_clock": 2, "rounds": 1},
        "gpu": {"backend": "emulated"},
        "emulation": {"forward_time_s": forward_s, "backward_time_s": [2 * t for t in forward_s]},
        "watch": {"tolerance": 0.5},
        "stragglers": {"detect": arguments.by == "detection", "min_interval_s": 2.0},
    }
    block["profiling"]["max_relative_error"] = 1.0
    perseus_plugin.enable(engine, block)
    data = microbatches(standard_library_text(), length=32, batch=1, seed=1, replica=engine.grid.get_data_parallel_id())
    gpu = EmulatedGpu(out / "emulated_gpus" / f"rank{rank}")
    slow_rank = ranks - 1
    began_s, energy_j, reported_s = [], [], 0.0
    for step in range(STEPS):
        if rank == slow_rank:
            if step in (SLOW_AT, RECOVER_AT):
                gpu.set_slowdown(SLOWDOWN if step == SLOW_AT else 1.0)
            if arguments.by == "report" and step in (REPORT_AT, RECOVER_AT):
                factor = SLOWDOWN if step == REPORT_AT else 1.0
                reported_s = reported_s or time.monotonic()
                perseus_plugin.report_straggler(rank=slow_rank, slowdown=factor)
        began_s.append(time.monotonic())
        energy_j.append(gpu.exact_energy_j())
        engine.train_batch(data)
    mine = {
        "began_s": began_s,
        "energy_j": energy_j,
        "reported_s": reported_s,
        "replica": int(engine.grid.get_data_parallel_id()),
        "requests": [(event.time_s, event.mhz) for event in gpu.events() if event.mhz],
    }
    everyone: list[Any] = [None] * ranks
    torch.distributed.all_gather_object(everyone, mine)
    if rank == 0:
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        tell(everyone, events, slow_rank, arguments)


def tell(everyone: list[dict[str, Any]], events: list[dict[str, Any]], slow_rank: int, arguments: Any) -> None:
    """Print the tables."""
    switches = [event["iteration"] for event in events if event["event"] == "switch"]
    answered, back = switches[0], switches[-1]
    phases = {
        "normal": range(SLOW_AT - 10, SLOW_AT),
        "slow, not answered": range(SLOW_AT + 1, answered - 1),
        "slow, answered": range(answered + 1, RECOVER_AT),
        "recovered": range(back + 1, STEPS - 1),
    }
    slow_replica = everyone[slow_rank]["replica"]
    began_s = everyone[0]["began_s"]
    rows: dict[str, list[float]] = {"iteration time, s": [], "fast replicas, J": [], "slow replica, J": []}
    for numbers in phases.values():
        rows["iteration time, s"].append(statistics.median(began_s[i + 1] - began_s[i] for i in numbers))
        for name, wanted in (("fast replicas, J", False), ("slow replica, J", True)):
            kept = [e["energy_j"] for e in everyone if (e["replica"] == slow_replica) == wanted]
            rows[name].append(statistics.median(sum(e[i + 1] - e[i] for e in kept) for i in numbers))
    stages, ranks = arguments.stages, len(everyone)
    print(f"{ranks} ranks: {stages} stages x {ranks // stages} replicas, emulated GPUs; by {arguments.by}")
    print("| median per iteration | " + " | ".join(phases) + " |")
    print("|---|" + "---|" * len(phases))
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{value:.4g}" for value in values) + " |")
    times, energies = rows["iteration time, s"], rows["fast replicas, J"]
    print(f"iteration time answered against not answered: {100 * (times[2] / times[1] - 1):+.2f} %")
    print(f"energy of the fast replicas answered against not answered: {100 * (energies[2] / energies[1] - 1):+.2f} %")
    first = REPORT_AT if arguments.by == "report" else SLOW_AT
    print(f"all ranks switched {answered - first} iterations after the first one that began after the cause was there")
    print(f"all ranks were back {back - RECOVER_AT} iterations after the first one that began after it had gone")
    if arguments.by == "report":
        at_s = everyone[slow_rank]["reported_s"]
        waits = []
        for of_rank in everyone:
            if of_rank["replica"] != slow_replica:
                known = {mhz for t, mhz in of_rank["requests"] if began_s[REPORT_AT - 8] < t < at_s}
                new = [t for t, mhz in of_rank["requests"] if t > at_s and mhz not in known]
                waits += [min(new) - at_s] if new else []
        print(
            f"report to the first request of a clock not used before: {min(waits):.3f} s "
            f"({min(waits) / times[1]:.2f} iterations)"
        )
    replan = next(event for event in events if event["event"] == "replan")
    print(f"planned in {replan['planning_time_s']:.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="of planning")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--microbatches", type=int, default=8)
    parser.add_argument("--forward-s", type=float, default=0.03, help="emulated time of a forward of stage 0")
    parser.add_argument("--by", choices=["report", "detection"], default="report")
    arguments = parser.parse_args()
    if "RANK" in os.environ:
        train(arguments)
    else:
        time_planning(arguments.repeats)


if __name__ == "__main__":
    main()
