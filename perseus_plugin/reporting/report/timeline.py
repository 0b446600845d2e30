"""The pipeline's timeline as a picture: stages as rows, instructions coloured by clock, waiting left blank."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perseus_plugin.errors import ConfigError
from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import one_f_one_b
from perseus_plugin.planning.plan import Plan, PlannedInstruction
from perseus_plugin.profiling.profile import Profile

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Normalize

Row = tuple[PlannedInstruction, ...]


def full_clock_rows(plan: Plan, profile: Profile) -> list[Row]:
    """The plan's instructions as 1F1B runs them with every one at the profile's highest clock.

    Raises:
        ConfigError: the plan is of another schedule than 1F1B.
    """
    stages = len(plan.stages)
    graph = build_graph(one_f_one_b(stages, plan.microbatches))
    fastest = {key: rows[0] for key, rows in profile.table.items()}
    order = [
        [graph.instructions[node] for node in nodes if graph.instructions[node] is not None]
        for nodes in graph.stage_nodes
    ]
    planned_order = [[planned.instruction for planned in row] for row in plan.stages]
    if order != planned_order:
        raise ConfigError(f"timeline: the plan's schedule is {plan.schedule!r}; allowed: one in the order of 1F1B")
    durations = np.array([0.0 if i is None else fastest[i.stage, i.kind].time_s for i in graph.instructions])
    start, finish = graph.times(durations)
    rows: list[list[PlannedInstruction]] = [[] for _ in range(stages)]
    for node, instruction in enumerate(graph.instructions):
        if instruction is not None:
            clock = fastest[instruction.stage, instruction.kind].frequency_mhz
            rows[instruction.stage].append(PlannedInstruction(instruction, clock, start[node], finish[node]))
    return [tuple(sorted(row, key=lambda p: p.start_s)) for row in rows]


def draw_timeline(plan: Plan, profile: Profile, path: Path) -> None:
    """Draw full clocks above the plan; needs matplotlib.

    Raises:
        ConfigError: matplotlib is missing, cannot write that kind of file, or the plan's schedule is not 1F1B.
    """
    try:
        from matplotlib.colors import Normalize
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("timeline: needs matplotlib, which is not installed (pip install matplotlib)") from None
    above = full_clock_rows(plan, profile)
    clocks = [m.frequency_mhz for _, _, m in profile.rows()]
    scale = Normalize(min(clocks), max(clocks))
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.set_title(f"every instruction at full clock: {plan.baseline_energy_j:.0f} J", loc="left", fontsize=10)
    lower.set_title(
        f"plan, same iteration time: {plan.energy_j:.0f} J ({-100 * plan.saving:+.1f} %)", loc="left", fontsize=10
    )
    for axes, rows in ((upper, above), (lower, plan.stages)):
        mappable = _draw_rows(axes, rows, scale)
    lower.set_xlabel("time within an iteration (s)")
    figure.colorbar(mappable, ax=[upper, lower], label="SM clock (MHz)", aspect=30, pad=0.01)
    try:
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:
        raise ConfigError(f"timeline: cannot write {path}: {error}") from error


def _draw_rows(axes: Axes, rows: tuple[Row, ...] | list[Row], scale: Normalize) -> PatchCollection:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches, clocks = [], []
    for stage, row in enumerate(rows):
        for planned in row:
            backward = "backward" in planned.instruction.kind
            patches.append(
                Rectangle((planned.start_s, stage - 0.42), planned.finish_s - planned.start_s, 0.84, fill=True)
            )
            clocks.append(planned.frequency_mhz)
            axes.text(
                (planned.start_s + planned.finish_s) / 2,
                stage,
                f"{'B' if backward else 'F'}{planned.instruction.microbatch}",
                ha="center",
                va="center",
                fontsize=7,
                color="black",
            )
    collection = PatchCollection(patches, cmap="RdYlBu_r", norm=scale, edgecolor="white", linewidth=0.6, alpha=0.9)
    collection.set_array(np.array(clocks, dtype=float))
    axes.add_collection(collection)
    axes.set_xlim(0, max(planned.finish_s for row in rows for planned in row))
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [f"stage {stage}" for stage in range(len(rows))])
    axes.spines[["top", "right"]].set_visible(False)
    return collection
