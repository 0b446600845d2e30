"""A running job's plan, made quickly and then refined beside the job: saving and gap over time.

    python benchmarks/refined_plans.py DATA [--microbatches 24 --microbatches 96] [--margin 0.01] [--refine-s 60]

DATA holds the published profiles of GPT-3 175B, 8 stages. The job's instructions vary by 0.03 %. As in a job, the
quick plan is replayed over twelve of them before it is followed, and what refining finds has to be better there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.replayed import InForce, Samples
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.options import build_problem
from perseus_plugin.planning.planner_process import PlannerProcess
from perseus_plugin.planning.request import PlanAnswer, PlanRequest
from perseus_plugin.profiling.profile import load_profile

BLOCKING_W = {"a100_sxm": 83.64, "a40": 70.38}
STAGES, ITERATIONS, SPREAD = 8, 12, 0.0003


def request_for(data: Path, gpu: str, microbatches: int, margin: float) -> PlanRequest:
    """What a job asks its planner for."""
    profile = load_profile(data / f"gpt3-175b-{gpu}.csv").scaled(10)
    streams = one_f_one_b(STAGES, microbatches)
    problem = build_problem(build_graph(streams), profile, BLOCKING_W[gpu])
    random = np.random.default_rng(0)
    iterations = []
    for _ in range(ITERATIONS):
        durations_s = problem.full_clock_s * np.exp(SPREAD * random.standard_normal(len(problem.graph)))
        iterations.append((tuple(tuple(durations_s[nodes].tolist()) for nodes in problem.graph.stage_nodes),))
    return PlanRequest(
        "1f1b",
        streams,
        {},
        profile,
        [BLOCKING_W[gpu]] * STAGES,
        margin=margin,
        samples=Samples(tuple(iterations)),
        catch_up=False,
    )


def asked(planner: PlannerProcess, request: PlanRequest) -> PlanAnswer:
    """The planner's answer."""
    planner.submit(request)
    while (answer := planner.poll()) is None:
        time.sleep(0.05)
    return answer


def told(name: str, answer: PlanAnswer, of: Sequence[str]) -> None:
    """One line of the table."""
    plan, replayed = answer.plan, answer.replayed
    assert replayed is not None  # there were samples
    found = "stays" if plan is None else f"{plan.saving:7.3%}  {plan.gap:7.3%}"
    print(f"{' '.join(of)} {name:8} {answer.planning_time_s:6.1f} s  {replayed.saving_mean:7.3%}  {found}", flush=True)


def main() -> None:
    """Parse the command line, plan and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--microbatches", type=int, action="append", default=[])
    parser.add_argument("--margin", type=float, default=0.0, help="the job's least one")
    parser.add_argument("--refine-s", type=float, default=60.0)
    arguments = parser.parse_args()
    print("job               planned in  replayed saving  planned saving, gap")
    for gpu in BLOCKING_W:
        for microbatches in arguments.microbatches or [24, 96]:
            request = request_for(arguments.data, gpu, microbatches, arguments.margin)
            planner, refiner = PlannerProcess(), PlannerProcess(pauses_s=(), ahead=False)
            quick = asked(planner, request)
            of = (f"{gpu:8}", f"{microbatches:3}")
            told("quick", quick, of)
            assert quick.plan is not None  # there is one
            assert quick.replayed is not None
            clocks = tuple(tuple(quick.plan.clocks_mhz(stage)) for stage in range(STAGES))
            in_force = InForce(clocks, quick.catch_up, quick.replayed.margin, 0.0, quick.plan.wait_clocks_mhz)
            more = replace(request, effort="normal", in_force=in_force, refine_s=arguments.refine_s)
            told("refined", asked(refiner, more), of)
            planner.close()
            refiner.close()


if __name__ == "__main__":
    main()
