"""What waiting at lower clocks saves: the same iteration time planned with and without, on an A100's waiting power.

    python benchmarks/waiting_clocks.py [PROFILE.csv] [--switch-latency 0.01] [--effort quick]

Instructions and waiting are those of the emulated A100, whose waiting power follows the clock as measured; with a
profile (8 stages of GPT-3 175B, say) its instructions are as published, and only the waiting is the emulation's. The
baseline waits at full clocks. "left alone" is a plan whose GPUs wait at the clocks of the instructions beside.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from time import process_time

from perseus_plugin.cli.job import SWITCH_LATENCY_S
from perseus_plugin.gpus.emulated.physics import A100, WAITING, load_class
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.planner import ChangeLimits, Planner, Target
from perseus_plugin.planning.targets import Effort
from perseus_plugin.profiling.profile import Measurement, Profile, load_profile

LOWEST_MHZ = 855
SMALL_S = {"forward": (0.030, 0.030, 0.030, 0.042), "backward": (0.060, 0.060, 0.060, 0.084)}
"""Full-clock times of four stages whose last one is the longest, as `examples/megatron_gpt/cpu.yaml` has them."""
LARGE_S = {"forward": (0.080, *[0.083] * 6, 0.090), "backward": (0.160, *[0.166] * 6, 0.178)}


def emulated(times_s: Mapping[str, tuple[float, ...]]) -> Profile:
    """The emulated A100's profile of stages with these full-clock times."""
    return Profile.from_rows(
        (stage, kind, _row(kind, clock, seconds))
        for kind, per_stage in times_s.items()
        for stage, seconds in enumerate(per_stage)
        for clock in A100.clocks_mhz()
        if clock >= LOWEST_MHZ
    )


def _row(kind: str, clock: int, full_s: float) -> Measurement:
    load = load_class(kind)
    time_s = full_s * A100.stretch(load, clock)
    return Measurement(clock, time_s, A100.power_w(load, clock) * time_s, blocking_power_w=A100.power_w(WAITING, clock))


def with_waiting(profile: Profile) -> Profile:
    """The profile with the emulated A100's waiting power."""
    return Profile.from_rows(
        (stage, kind, replace(row, blocking_power_w=A100.power_w(WAITING, row.frequency_mhz)))
        for stage, kind, row in profile.rows()
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", type=Path, nargs="?")
    parser.add_argument("--switch-latency", type=float, default=SWITCH_LATENCY_S)
    parser.add_argument("--effort", choices=("quick", "normal", "thorough"), default="quick")
    parser.add_argument("--max-changes", type=int)
    given = parser.parse_args()
    effort: Effort = given.effort
    # In a job the shortest time between two changes is twice the latency.
    limits = ChangeLimits(given.max_changes, 2 * given.switch_latency)
    large = emulated(LARGE_S) if given.profile is None else with_waiting(load_profile(given.profile))
    jobs = [("4 x 8", emulated(SMALL_S), 4, 8)] if given.profile is None else []
    jobs += [(f"{large.stages} x {count}", large, large.stages, count) for count in (12, 96)]
    print("stages x mb  iteration of full clocks  left alone      gap  lowered waits      gap   points  waits  CPU")
    for name, profile, stages, count in jobs:
        graph = build_graph(one_f_one_b(stages, count))
        for stretch in (1.0, 1.2):
            plans, seconds = [], []
            for latency_s in (None, given.switch_latency):
                begin = process_time()
                planner = Planner(graph, profile, blocking_power_w=0.0, switch_latency_s=latency_s)
                target = Target.straggler(stretch * planner.problem.full_clock_time_s)
                plans.append(planner.plan(target if stretch > 1 else Target.slowdown(), limits, effort))
                seconds.append(process_time() - begin)
            alone, low = plans
            points, waits = 100 * (low.saving - alone.saving), sum(map(len, low.waits))
            print(
                f"{name:11}  {stretch:24.1f}  {alone.saving:10.3%}  {alone.gap:7.3%}  {low.saving:13.3%}  "
                f"{low.gap:7.3%}  {points:7.3f}  {waits:5}  {seconds[1] / seconds[0]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
