"""The pipeline's timeline as a picture: stages as rows, instructions coloured by clock, waiting left blank.

Waits with a clock of their own are thin bars in its colour.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perseus_plugin.errors import PerseusError, figure
from perseus_plugin.iteration.graph import PipelineGraph, build_graph
from perseus_plugin.iteration.instructions import Compute
from perseus_plugin.iteration.schedules import SCHEDULES
from perseus_plugin.planning.plan import Plan, load_plan
from perseus_plugin.profiling.derived import with_rows_for
from perseus_plugin.profiling.profile import load_profile
from perseus_plugin.reporting.report.folder import JobFolder, load_folder
from perseus_plugin.reporting.report.lanes import Lanes, full_clock_lanes, planned_lanes
from perseus_plugin.reporting.report.palette import CLOCKS
from perseus_plugin.reporting.report.still import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import PatchCollection
    from matplotlib.colors import Colormap, Normalize


def textbook_graph(plan: Plan) -> PipelineGraph | None:
    """The graph of the textbook schedule that has the plan's instructions in the plan's order; None: of none."""
    planned = [[one.instruction for one in stage] for stage in plan.stages]
    for streams_of in SCHEDULES.values():
        try:
            graph = build_graph(streams_of(len(plan.stages), plan.microbatches))
        except PerseusError:
            continue  # there is none of this size
        of_stages = [[graph.instructions[node] for node in nodes.tolist()] for nodes in graph.stage_nodes]
        if [[one for one in stage if one is not None] for stage in of_stages] == planned:
            return graph
    return None


def lanes_of(job: JobFolder) -> tuple[Plan, list[Lanes]]:
    """A job's plan, and it beside full clocks; alone where its schedule's dependencies or times are not known.

    Raises:
        PerseusError: there is no plan or no profile, or they cannot be read.
    """
    plan, profile = load_plan(job.path / "plan.json"), load_profile(job.path / "profile.csv")
    graph = job.graph() or textbook_graph(plan)
    of_full, of_plan = _titles(job, plan)
    made = [planned_lanes(of_plan, plan, profile, graph)]
    planned = [[one.instruction for one in stage] for stage in plan.stages]
    # `perseus plan` may have derived rows that the file does not have.
    known = with_rows_for(job.profile or profile, [[Compute(i.kind, i.microbatch) for i in stage] for stage in planned])
    if graph is not None and {(i.stage, i.kind) for stage in planned for i in stage} <= known.table.keys():
        made.insert(0, full_clock_lanes(of_full, known, graph))
    return plan, made


def _titles(job: JobFolder, plan: Plan) -> tuple[str, str]:
    """Of full clocks and of the plan: what the job's table says of energy, where it says something of this plan.

    The plan's own figures are of iterations that all are as the profile is on average, and of one GPU per stage.
    """
    summary = job.summary
    full_j, plan_j, saved, gpus = plan.baseline_energy_j, plan.energy_j, 100 * plan.saving, len(plan.stages)
    how, which = "by the profile", ""
    if summary is not None and summary.predicts(plan):
        full, predicted, told = (
            summary.energy_j.full_clock,
            summary.energy_j.predicted,
            summary.saving_percent.predicted,
        )
        if full is not None and predicted is not None and told is not None:
            full_j, plan_j, saved, how = full, predicted, told, "predicted"
            which = "" if summary.ranks == gpus else f" on {summary.ranks} GPUs"
    return (
        f"every instruction at full clock: {full_j:,.1f} J{which}",
        f"plan: {plan_j:,.1f} J{which}, {how} ({figure(-saved, '+.2f')} %)",
    )


def draw_timeline(folder: Path, path: Path) -> bytes:
    """Full clocks above the plan of a job's output folder, as a picture; needs matplotlib.

    Raises:
        PerseusError: there is no plan or no profile, or they cannot be read.
    """
    from matplotlib.colors import LinearSegmentedColormap, Normalize
    from matplotlib.figure import Figure

    job = load_folder(folder)
    _, lanes = lanes_of(job)
    of_what = " of emulated GPUs" if job.emulated else ""
    clocks = [block.clock_mhz for one in lanes for block in one.blocks]
    clocks += [wait.clock_mhz for one in lanes for wait in one.waits if wait.own]
    scale, colours = Normalize(min(clocks), max(clocks)), LinearSegmentedColormap.from_list("clocks", CLOCKS)
    figure = Figure(figsize=(11, 0.7 + 1.95 * len(lanes)), layout="constrained")
    all_axes: list[Axes] = list(figure.subplots(len(lanes), 1, sharex=True, squeeze=False)[:, 0])
    for axes, one in zip(all_axes, lanes, strict=True):
        axes.set_title(one.title, loc="left", fontsize=10)
        mappable = _draw_rows(axes, one, max(lane.end_s for lane in lanes), scale, colours)
    all_axes[-1].set_xlabel(f"time within an iteration{of_what} (s)")
    figure.colorbar(mappable, ax=all_axes, label="SM clock (MHz)", aspect=30, pad=0.01)
    return drawn(figure, path)


def _draw_rows(axes: Axes, lanes: Lanes, end_s: float, scale: Normalize, colours: Colormap) -> PatchCollection:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    patches, clocks = [], []
    for stage, row in enumerate(lanes.rows):
        for block in row:
            patches.append(Rectangle((block.start_s, stage - 0.42), block.finish_s - block.start_s, 0.84, fill=True))
            clocks.append(block.clock_mhz)
            axes.text(
                (block.start_s + block.finish_s) / 2,
                stage,
                f"{block.instruction.kind[0].upper()}{block.instruction.microbatch}",
                ha="center",
                va="center",
                fontsize=7,
                color="black",
            )
    for wait in lanes.waits:
        if wait.own:
            patches.append(Rectangle((wait.start_s, wait.stage - 0.1), wait.finish_s - wait.start_s, 0.2, fill=True))
            clocks.append(wait.clock_mhz)
    collection = PatchCollection(patches, cmap=colours, norm=scale, edgecolor="white", linewidth=0.6)
    collection.set_array(np.array(clocks, dtype=float))
    axes.add_collection(collection)
    axes.set_xlim(0, end_s)
    axes.set_ylim(len(lanes.rows) - 0.5, -0.5)
    axes.set_yticks(range(len(lanes.rows)), [f"stage {stage}" for stage in range(len(lanes.rows))])
    axes.spines[["top", "right"]].set_visible(False)
    return collection
