"""Saving and distance to the bound on the published profiles, beside the published figures.

    python benchmarks/planner_quality.py DATA [--effort normal] [--microbatches 96] [--limits]
    python benchmarks/planner_quality.py --model examples/simulate/gpt3-175b.yaml [--effort normal] [--microbatches 96]

DATA holds the profiles and `published.csv`; with a model's description the profiles are those of `perseus simulate`.
Zero slowdown: least energy at the iteration time of full clocks. At 1.2 times that, something else makes the iteration
that long in any case, and both sides wait for it at blocking power.
"""

from __future__ import annotations

import argparse
import csv
import time
from pathlib import Path

from perseus_plugin.cli.simulation.description import (
    PEAK_FLOPS,
    even_split,
    gpu_named,
    load_description,
    modelled_profile,
)
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.planning.targets import Effort
from perseus_plugin.profiling.profile import load_profile

BLOCKING_W = {"a100_sxm": 83.64, "a40": 70.38}
SCALE = 10.0


def planner_for(data: Path, gpu: str, microbatches: int) -> Planner:
    """8 stages of GPT-3 175B on one of the two GPUs."""
    profile = load_profile(data / f"gpt3-175b-{gpu}.csv").scaled(SCALE)
    return Planner(
        build_graph(one_f_one_b(8, microbatches)), profile, blocking_power_w=BLOCKING_W[gpu], schedule="1f1b"
    )


def quality(data: Path, effort: Effort, sizes: list[int]) -> None:
    """The table of savings and gaps."""
    print(f"effort {effort}; savings in percent, published ones in brackets; excess is over the deadline")
    print("gpu       mb   time s   excess us   saving           gap      at 1.2x saving   gap")
    with (data / "published.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        if sizes and int(row["microbatches"]) not in sizes:
            continue
        planner = planner_for(data, row["gpu"], int(row["microbatches"]))
        begin = time.perf_counter()
        plan = planner.plan(Target.slowdown(), effort=effort)
        seconds = time.perf_counter() - begin
        slow = planner.plan(Target.straggler(1.2 * plan.baseline_time_s), effort=effort)
        excess_us = 1e6 * (plan.iteration_time_s - plan.baseline_time_s)
        published, published_slow = row["perseus_saving_percent"], row["perseus_saving_at_1_2x_percent"]
        print(
            f"{row['gpu']:8} {row['microbatches']:>3}  {seconds:7.2f}  {excess_us:10.4f}   "
            f"{100 * plan.saving:6.3f} ({published:>4})  {plan.gap:7.3%}  "
            f"{100 * slow.saving:6.3f} ({published_slow:>4})  {slow.gap:7.3%}",
            flush=True,
        )


def generated(description: Path, effort: Effort, sizes: list[int]) -> None:
    """The table for profiles of the project's own model, on every GPU of its catalogue."""
    model = load_description(description)
    split = model.own_split or even_split(model.layers, model.stages or 8)
    print(f"effort {effort}; {description.name}, {len(split)} stages, modelled profiles")
    print("gpu       mb   time s   excess us   saving      gap      at 1.2x saving   gap")
    for gpu in PEAK_FLOPS:
        profile = modelled_profile(model, split, gpu, ("forward", "backward"))
        for microbatches in sizes or [12, 24, 48, 96]:
            graph = build_graph(one_f_one_b(len(split), microbatches))
            planner = Planner(graph, profile, blocking_power_w=gpu_named(gpu).blocking_w, schedule="1f1b")
            begin = time.perf_counter()
            plan = planner.plan(Target.slowdown(), effort=effort)
            seconds = time.perf_counter() - begin
            slow = planner.plan(Target.straggler(1.2 * plan.baseline_time_s), effort=effort)
            excess_us = 1e6 * (plan.iteration_time_s - plan.baseline_time_s)
            print(
                f"{gpu:8} {microbatches:>3}  {seconds:7.2f}  {excess_us:10.4f}   {100 * plan.saving:6.3f}  "
                f"{plan.gap:7.3%}  {100 * slow.saving:6.3f}  {slow.gap:7.3%}",
                flush=True,
            )


def limits(data: Path, effort: Effort) -> None:
    """What limits on clock changes cost: A100, 24 microbatches, zero slowdown."""
    planner = planner_for(data, "a100_sxm", 24)
    free = planner.plan(Target.slowdown(), effort=effort)
    print(f"effort {effort}; A100, 24 microbatches, zero slowdown; unlimited saving {free.saving:.3%}")
    print("limit                 time s   saving   at most   share of unlimited   changes per stage")
    for name, limit in (
        ("8 changes", ChangeLimits(8)),
        ("4 changes", ChangeLimits(4)),
        ("2 changes", ChangeLimits(2)),
        ("dwell 2 s", ChangeLimits(None, 2.0)),
        ("dwell 10 s", ChangeLimits(None, 10.0)),
    ):
        begin = time.perf_counter()
        plan = planner.plan(Target.slowdown(), limit, effort)
        seconds = time.perf_counter() - begin
        most = 1 - plan.energy_lower_bound_j / plan.baseline_energy_j
        changes = [plan.clock_changes(stage) for stage in range(len(plan.stages))]
        print(
            f"{name:20}  {seconds:6.2f}  {plan.saving:7.3%}   {most:7.3%}   {plan.saving / free.saving:18.1%}   "
            f"{changes}",
            flush=True,
        )


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", help="folder with the published profiles")
    parser.add_argument("--model", type=Path, help="model description, instead of published profiles")
    parser.add_argument("--effort", choices=["quick", "normal", "thorough"], default="normal")
    parser.add_argument("--microbatches", type=int, action="append", default=[], help="only these")
    parser.add_argument("--limits", action="store_true", help="limits on clock changes instead")
    arguments = parser.parse_args()
    if arguments.model is not None:
        generated(arguments.model, arguments.effort, arguments.microbatches)
    elif arguments.data is None:
        parser.error("got neither DATA nor --model")
    elif arguments.limits:
        limits(arguments.data, arguments.effort)
    else:
        quality(arguments.data, arguments.effort, arguments.microbatches)


if __name__ == "__main__":
    main()
