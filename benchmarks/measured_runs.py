"""Our graph, forecasts and plans held against runs that were measured on real GPUs.

    python benchmarks/measured_runs.py DATA [--only times|forecast|plans|baselines] [--power-limit W]

DATA is a folder with `runs.csv` and `instructions.csv.gz` in the format of `tests/data/measured-runs/README.md`. Each
question prints one table:

times       iteration time of every plan: the measured durations of its instructions in our graph
forecast    time and energy of plans of which nothing but the clocks is given, learnt from a few others
plans       our plan at the time of each plan that was run, both priced by one model that was learnt from all of them
baselines   what else was measured (EnvPipe, power limits), beside Perseus's measured plans at the same time or energy
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

sys.path.insert(0, str(Path(__file__).parent.parent))

from perseus_plugin.iteration.instructions import FORWARD
from perseus_plugin.planning.calibration import fitted
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.planner import Planner, Target
from perseus_plugin.profiling.profile import Measurement, Profile
from tests.measured_runs import LOAD, Row, Run, load_runs, of_clocks, smallest_with

LEARNT_FROM = 8
OFTEN = 16  # executions of a kind at a clock, from which it counts as run there
SWITCH_S = 0.01  # a clock change takes
NEAR = 0.05
SAME_TIME = 0.005  # shares within which times count as equal
FloatArray = npt.NDArray[np.float64]
Key = tuple[int, str]  # stage and kind


def transfer_of(full: Run) -> float:
    """How long a transfer takes, by the run at full clocks alone: its iteration time tells one number."""
    return smallest_with(full.graph_s, full.time_s, full.time_s)


def spread(errors: Sequence[float]) -> str:
    """Mean and largest size, in percent."""
    sizes = 100 * np.abs(errors)
    return f"{sizes.mean():.2f}, {sizes.max():.2f}"


# Iteration times.


def times(workloads: dict[str, list[Run]]) -> None:
    """Print the table of iteration times."""
    print("Iteration time from the measured durations, error in percent, mean and largest over the plans\n")
    print("| workload | plans | graph alone | and a constant | s | and a transfer | ms | both, from a few | ms, s |")
    print("|---|---|---|---|---|---|---|---|---|")
    for workload, runs in workloads.items():
        full, plans = of_clocks(runs)
        end_s, transfer_s = full.time_s - full.graph_s(), transfer_of(full)
        few_transfer_s, few_end_s = as_a_job_fits([full, *plans])
        cells = [spread([run.graph_s() / run.time_s - 1 for run in plans])]
        for transfer, end, numbers in (
            (0.0, end_s, f"{end_s:.2f}"),
            (transfer_s, 0.0, f"{1e3 * transfer_s:.1f}"),
            (few_transfer_s, few_end_s, f"{1e3 * few_transfer_s:.1f}, {few_end_s:.2f}"),
        ):
            cells += [spread([(run.graph_s(transfer) + end) / run.time_s - 1 for run in plans]), numbers]
        print(f"| {workload} | {len(plans)} | " + " | ".join(cells) + " |", flush=True)


def as_a_job_fits(runs: Sequence[Run]) -> tuple[float, float]:
    """Seconds of a transfer and those that there are once, from the times of a few runs."""
    few = spaced(runs)
    graphs = [run.graph(transfer_s=1.0) for run in few]
    durations_s = [run.durations_s(graph) + graph.constant_s for run, graph in zip(few, graphs, strict=True)]
    return fitted(graphs[0], np.array(durations_s).T, np.array([run.time_s for run in few]))


def spaced(runs: Sequence[Run]) -> list[Run]:
    """A few of them, the first and the last included."""
    return [runs[at] for at in sorted({round(at) for at in np.linspace(0, len(runs) - 1, LEARNT_FROM)})]


# Times and energies by the clock.


@dataclass(frozen=True)
class Fitted:
    """What was learnt from some runs.

    Attributes:
        at: per (stage, kind), clocks in MHz and mean times there.
        first: per (stage, kind), how long the iteration's first one takes, over the others.
        loads_s: per stage, its loads in order.
        power: what `parts` is multiplied by, see there.
        transfer_s: how long a transfer takes.
        power_limit_w: of the card.
    """

    at: dict[Key, tuple[FloatArray, FloatArray]]
    first: dict[Key, float]
    loads_s: tuple[tuple[float, ...], ...]
    power: FloatArray
    transfer_s: float
    power_limit_w: float = float("inf")

    def time_s(self, key: Key, frequency_mhz: float | Sequence[float]) -> FloatArray:
        """Of an instruction: between the clocks that were run."""
        clocks, means = self.at[key]
        return np.asarray(np.interp(frequency_mhz, clocks, means), dtype=np.float64)

    def speed(self, key: Key, frequency_mhz: float | Sequence[float]) -> FloatArray:
        """Against that at the highest clock."""
        speeds: FloatArray = self.at[key][1][-1] / self.time_s(key, frequency_mhz)
        return speeds

    def forecast(self, run: Run) -> Run:
        """The run with durations, and an iteration time, as its clocks say."""
        stages = []
        for stage, rows in enumerate(run.stages):
            seen: set[str] = set()
            loads = iter(self.loads_s[stage])
            told: list[Row] = []
            for row in rows:
                if row.kind == LOAD:
                    told.append(replace(row, time_s=next(loads)))
                    continue
                key = stage, row.kind
                factor = 1.0 if row.kind in seen else self.first[key]
                seen.add(row.kind)
                told.append(replace(row, time_s=factor * self.time_s(key, row.frequency_mhz).item()))
            stages.append(tuple(told))
        as_told = replace(run, stages=tuple(stages))
        return replace(as_told, time_s=as_told.graph_s(self.transfer_s))

    def parts(self, run: Run) -> FloatArray:
        """Per rank what its energy is linear in: shape (ranks, parts).

        Power while working is quadratic in the speed, and higher or lower by so much in each stage: in the speed, not
        the clock, as a GPU at its power limit is at neither the clock nor the power that a clock stands for. It is one
        curve for all kinds: every plan runs as many forwards as backwards, so that whole iterations cannot tell them
        apart. Power while waiting, transfers and loads included, is linear in the clock, which is that of the
        instruction before.
        """
        graph = run.graph(self.transfer_s)
        starts_s, finishes_s = graph.times(run.durations_s(graph))
        rows = []
        for stage, own in enumerate(run.compute):
            nodes = graph.stage_nodes[stage]
            nodes = nodes[~graph.is_constant[nodes]]
            clocks = np.array([row.frequency_mhz for row in own]) / 1000
            seconds = np.array([row.time_s for row in own])
            speeds = np.array([self.speed((stage, row.kind), row.frequency_mhz).item() for row in own])
            # What the graph lacks of the iteration is spent where the first instruction is waited for.
            waits_s = np.append(starts_s[nodes[1:]] - finishes_s[nodes[:-1]], run.time_s - finishes_s[nodes[-1]])
            waits_s[-1] += starts_s[nodes[0]]
            part = [float((seconds * speeds**power).sum()) for power in range(3)]
            part += [float(waits_s.sum()), float(waits_s @ clocks)]
            part += [float(seconds.sum()) if stage == other else 0.0 for other in range(1, len(run.compute))]
            rows.append(part)
        return np.array(rows)

    def working_w(self, key: Key, frequency_mhz: float) -> float:
        """Power of an instruction, at most the card's limit."""
        speeds = self.speed(key, frequency_mhz).item() ** np.arange(3)
        offset_w = self.power[4 + key[0]] if key[0] else 0.0
        return min(self.power_limit_w, float(self.power[:3] @ speeds + offset_w))

    def waiting_w(self, frequency_mhz: float) -> float:
        """Power of waiting, no less than none."""
        return max(0.0, float(self.power[3] + self.power[4] * frequency_mhz / 1000))

    def energy_j(self, run: Run) -> FloatArray:
        """By rank."""
        energy: FloatArray = self.parts(run) @ self.power
        return energy


def learnt(full: Run, plans: Sequence[Run]) -> Fitted:
    """Times by the clock, and power, from these runs."""
    runs = [full, *plans]
    steady: dict[Key, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    begins: dict[Key, list[tuple[int, float]]] = defaultdict(list)
    loads: dict[int, list[list[float]]] = defaultdict(list)
    for run in runs:
        for stage, rows in enumerate(run.stages):
            seen: set[str] = set()
            loads[stage].append([row.time_s for row in rows if row.kind == LOAD])
            for row in run.compute[stage]:
                if row.kind in seen:
                    steady[stage, row.kind][row.frequency_mhz].append(row.time_s)
                else:
                    begins[stage, row.kind].append((row.frequency_mhz, row.time_s))
                seen.add(row.kind)
    at = {
        key: (np.array(sorted(clocks), dtype=float), np.array([np.mean(clocks[clock]) for clock in sorted(clocks)]))
        for key, clocks in steady.items()
    }
    mean_loads = tuple(tuple(np.mean(loads[stage], axis=0).tolist()) for stage in sorted(loads))
    times_only = Fitted(at, {}, mean_loads, np.zeros(0), transfer_of(full))
    first = {
        key: float(np.mean([time_s / times_only.time_s(key, clock).item() for clock, time_s in seen]))
        for key, seen in begins.items()
    }
    parts = np.concatenate([times_only.parts(run) for run in runs])
    energy = np.concatenate([run.energy_j for run in runs])
    power = np.linalg.lstsq(parts / energy[:, None], np.ones(len(energy)), rcond=1e-10)[0]
    return replace(times_only, first=first, power=power)


def forecast(workloads: dict[str, list[Run]]) -> None:
    """Print the table of forecasts."""
    print(f"\nTime and energy of the other plans, learnt from {LEARNT_FROM}: error in percent, mean and largest\n")
    print("| workload | plans forecast | time | energy |")
    print("|---|---|---|---|")
    totals: list[tuple[float, float]] = []
    for workload, runs in workloads.items():
        full, plans = of_clocks(runs)
        plans = [full, *plans]
        if len(plans) <= LEARNT_FROM:
            continue
        few = spaced(plans)
        known = learnt(full, few[1:])
        errors = []
        for run in (run for run in plans if run not in few):
            told = known.forecast(run)
            errors.append((told.time_s / run.time_s - 1, float(known.energy_j(told).sum()) / run.total_j - 1))
        by_time, by_energy = zip(*errors, strict=True)
        totals.append((float(np.abs(by_time).mean()), float(np.abs(by_energy).mean())))
        print(f"| {workload} | {len(errors)} | {spread(by_time)} | {spread(by_energy)} |", flush=True)
    if totals:
        of_time, of_energy = 100 * np.mean(totals, axis=0)
        print(f"| mean of workloads | | {of_time:.2f} | {of_energy:.2f} |")


# Our plans.


@dataclass(frozen=True)
class Job:
    """A workload as the planner sees it.

    Attributes:
        known: what was learnt from all of its runs; the iteration's first instructions take as long as the others, as
            in a profile.
        full: the run at full clocks.
        profile: of what was learnt.
    """

    known: Fitted
    full: Run
    profile: Profile

    def planned(self, deadline_s: float, switch_latency_s: float | None) -> Plan:
        """Our plan for a time; where that is too short, our shortest. Without a latency clocks stay up in waits."""
        graph = self.known.forecast(self.full).graph(self.known.transfer_s)
        lowest_w = [self.profile.table[stage, FORWARD][-1].blocking_power_w for stage in range(len(self.full.stages))]
        planner = Planner(graph, self.profile, blocking_power_w=lowest_w, switch_latency_s=switch_latency_s)
        return planner.plan(Target.deadline(max(deadline_s, planner.relaxation.shortest_s)))


def job_of(runs: Sequence[Run], power_limit_w: float) -> Job:
    """What the planner is given: nothing above the card's power limit, and no clock at which a kind hardly ran.

    A profile has rows of all kinds at each clock. That of a kind which hardly ran at a clock is the one at the next
    higher clock at which it did, so that nothing is gained by choosing it.
    """
    full, plans = of_clocks(runs)
    known = replace(learnt(full, plans), power_limit_w=power_limit_w)
    known = replace(known, first=dict.fromkeys(known.first, 1.0))
    ran = Counter(
        ((stage, row.kind), row.frequency_mhz)
        for run in (full, *plans)
        for stage, rows in enumerate(run.compute)
        for row in rows
    )
    table: dict[Key, tuple[Measurement, ...]] = {}
    for stage in range(len(full.stages)):
        keys = [key for key in known.at if key[0] == stage]
        top_mhz = max(full.clocks_mhz)
        usable = {
            key: [clock for clock in known.at[key][0] if clock == top_mhz or ran[key, int(clock)] >= OFTEN]
            for key in keys
        }
        for key in keys:
            rows = []
            for clock in sorted(set().union(*usable.values())):
                at = next(one for one in usable[key] if one >= clock)
                time_s, waiting_w = known.time_s(key, at).item(), known.waiting_w(clock)
                energy_j = known.working_w(key, at) * time_s
                rows.append(Measurement(int(clock), time_s, energy_j, blocking_power_w=waiting_w))
            table[key] = tuple(rows)
    return Job(known, full, Profile(table))


def plans(workloads: dict[str, list[Run]], power_limit_w: float) -> None:
    """Print the table of our plans."""
    print("\nOur plan at the time of each plan that was run, both priced by one model: in percent, mean and worst\n")
    print("| workload | plans | energy | time | clocks up in waits | model's energy | and time | worse by more |")
    print("|---|---|---|---|---|---|---|---|")
    for workload, runs in workloads.items():
        job = job_of(runs, power_limit_w)
        energies, without, times_, of_energy, of_time = [], [], [], [], []
        for run in of_clocks(runs)[1]:
            theirs = job.known.forecast(run)
            theirs_j = float(job.known.energy_j(theirs).sum())
            ours, clocks_up = (job.planned(theirs.time_s, latency_s) for latency_s in (SWITCH_S, None))
            without.append(clocks_up.energy_j / theirs_j - 1)
            energies.append(ours.energy_j / theirs_j - 1)
            times_.append(ours.iteration_time_s / theirs.time_s - 1)
            of_energy.append(theirs_j / run.total_j - 1)
            of_time.append(theirs.time_s / run.time_s - 1)
        error = float(np.abs(of_energy).mean())
        worse = sum(energy > error for energy in energies)
        signed = [f"{100 * np.mean(x):+.2f}, {100 * np.max(x):+.2f}" for x in (energies, times_, without)]
        cells = [*signed, spread(of_energy), spread(of_time), str(worse)]
        print(f"| {workload} | {len(energies)} | " + " | ".join(cells) + " |", flush=True)


# Baselines.


def baselines(workloads: dict[str, list[Run]]) -> None:
    """Print the table of measured baselines."""
    print(f"\nMeasured baselines up to {100 * NEAR:.0f} % slower than full clocks, and Perseus's measured plans\n")
    print(
        "| workload | baseline | settings | their time | their energy | energy at their time | time at their energy |"
    )
    print("|---|---|---|---|---|---|---|")
    for workload, runs in workloads.items():
        full, plans_run = of_clocks(runs)
        frontier = [(1.0, 1.0), *((run.time_s / full.time_s, run.total_j / full.total_j) for run in plans_run)]
        swapped = [(energy, time) for time, energy in frontier]
        for system in sorted({run.system for run in runs if not run.stages}):
            points = settings([run for run in runs if run.system == system])
            near = [(time, energy) for time, energy in points if time <= 1 + NEAR]
            if not near:
                continue
            less_j = [least(frontier, max(time, 1.0) + SAME_TIME) - energy for time, energy in near]
            less_s = [least(swapped, energy) - time for time, energy in near if energy >= min(swapped)[0]]
            cells = [interval([time - 1 for time, _ in near]), interval([energy - 1 for _, energy in near])]
            cells += [interval(less_j), interval(less_s) if less_s else "none"]
            print(f"| {workload} | {system} | {len(near)} of {len(points)} | " + " | ".join(cells) + " |")


def settings(runs: Sequence[Run]) -> list[tuple[float, float]]:
    """Time and energy of a baseline's settings, against the same system's own run at full clocks.

    Power limits are those below the highest; what sets clocks has its full clocks in all runs but the last.
    """
    at_full, others = list(runs[:-1]), list(runs[-1:])
    if any(run.power_limits_w for run in runs):
        top_w = max(limit for run in runs for limit in run.power_limits_w)
        at_full = [run for run in runs if set(run.power_limits_w) == {top_w}]
        others = [run for run in runs if run not in at_full]
    if not at_full:
        return []
    reference = at_full[-1]
    return [(run.time_s / reference.time_s, run.total_j / reference.total_j) for run in others]


def least(points: Sequence[tuple[float, float]], at_most: float) -> float:
    """The least second figure of points whose first one is at most this, straight lines between them included."""
    best, before = float("inf"), (float("nan"), float("nan"))
    for first, second in sorted(points):
        if first > at_most:
            share = (at_most - before[0]) / (first - before[0])
            return min(best, before[1] + share * (second - before[1])) if best < float("inf") else second
        best, before = min(best, second), (first, second)
    return best


def interval(shares: Sequence[float]) -> str:
    """From the least to the largest, in percent."""
    low, high = 100 * min(shares), 100 * max(shares)
    return f"{low:+.1f}" if len(shares) == 1 else f"{low:+.1f} to {high:+.1f}"


QUESTIONS = ("times", "forecast", "plans", "baselines")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of runs.csv and instructions.csv.gz")
    parser.add_argument("--only", choices=QUESTIONS, help="one of the questions")
    parser.add_argument("--power-limit", type=float, help="of the cards, in watts (default: the highest in runs.csv)")
    arguments = parser.parse_args()
    for name in ("runs.csv", "instructions.csv.gz"):
        if not (arguments.data / name).exists():
            parser.error(f"{arguments.data}: no {name} in it")
    workloads = load_runs(arguments.data)
    asked = (arguments.only,) if arguments.only else QUESTIONS
    limits_w = [limit for runs in workloads.values() for run in runs for limit in run.power_limits_w]
    if "plans" in asked and not (arguments.power_limit or limits_w):
        parser.error("--power-limit: missing; no run in runs.csv has one")
    if "times" in asked:
        times(workloads)
    if "forecast" in asked:
        forecast(workloads)
    if "plans" in asked:
        plans(workloads, arguments.power_limit or max(limits_w))
    if "baselines" in asked:
        baselines(workloads)


if __name__ == "__main__":
    main()
