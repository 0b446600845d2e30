"""A power budget: how many watts a job's GPUs may draw together, and how many those of a group. Pure data.

All watts are averages over an iteration, except those of `Peaks`. Where an overhead per node is given, all of them are
watts at the node: every GPU counts with its own power and its share of the node's. Only where each GPU has a budget, or
a limit on its peaks, for itself, that is of the GPU alone.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from perseus_plugin.errors import PlanError, shown
from perseus_plugin.iteration.bounds import GPUS_OF_A_GROUP

if TYPE_CHECKING:
    from perseus_plugin.config import PerseusConfig

_NODE = re.compile(r"node (\d{1,9})")
EACH_GPU, EACH_NODE = "gpu", "node"
GROUPS_ALLOWED = '"gpu" (each), "node" (each), "node 3", or ranks such as "0-7,16"'


def check_number(name: str, value: float, allow_zero: bool = False) -> None:
    """Raises `PlanError` unless the value is finite and above 0, or 0 where that is allowed."""
    if not (math.isfinite(value) and (value > 0 or (allow_zero and value == 0))):
        raise PlanError(f"{name}: got {value}; allowed: a finite number {'from' if allow_zero else 'above'} 0")


@dataclass(frozen=True, slots=True)
class NodeOverhead:
    """What a node draws besides its GPUs: processors, fans, network cards, losses.

    Attributes:
        watts: per node, always.
        share: of the power of its GPUs.
    """

    watts: float = 0.0
    share: float = 0.0

    def __post_init__(self) -> None:
        check_number("node overhead, watts", self.watts, allow_zero=True)
        check_number("node overhead, share", self.share, allow_zero=True)


@dataclass(frozen=True, slots=True)
class GroupBudget:
    """A budget of some of the job's GPUs.

    Attributes:
        name: for people.
        of: which: `gpu` or `node`: each of them has this budget for itself; `node 3`: the fourth node;
            `0-7,16`: the GPUs of these ranks.
        watts: that they may draw together.
    """

    name: str
    of: str
    watts: float

    def __post_init__(self) -> None:
        check_number(f"power budget of {self.name}", self.watts)
        if not re.fullmatch(GPUS_OF_A_GROUP, self.of):
            raise PlanError(f"power budget of {self.name}: got {shown(self.of)}; allowed: {GROUPS_ALLOWED}")

    def ranks(self, world_size: int, gpus_per_node: int) -> list[tuple[int, ...]]:
        """The GPUs that share the budget, by rank; several sets where each has its own.

        Raises:
            PlanError: there are none in the job.
        """
        if self.of == EACH_GPU:
            return [(rank,) for rank in range(world_size)]
        nodes = [
            tuple(range(first, min(first + gpus_per_node, world_size))) for first in range(0, world_size, gpus_per_node)
        ]
        if self.of == EACH_NODE:
            return nodes
        if (node := _NODE.fullmatch(self.of)) is not None:
            if int(node[1]) >= len(nodes):
                raise PlanError(
                    f"power budget of {self.name}: got {shown(self.of)}; allowed: node 0 to node {len(nodes) - 1}"
                )
            return [nodes[int(node[1])]]
        ranks: set[int] = set()
        for part in self.of.split(","):
            low, _, high = part.partition("-")
            if not int(low) <= int(high or low) < world_size:
                raise PlanError(
                    f"power budget of {self.name}: got ranks {shown(part)}; allowed: 0 to {world_size - 1}, rising"
                )
            ranks.update(range(int(low), int(high or low) + 1))
        return [tuple(sorted(ranks))]


@dataclass(frozen=True, slots=True)
class Peaks:
    """Limits on the highest average over any window, in watts; None: no limit.

    Attributes:
        window_s: how long the window is.
        job_w, node_w, gpu_w: of all GPUs together, of each node, of each GPU.
    """

    window_s: float = 1.0
    job_w: float | None = None
    node_w: float | None = None
    gpu_w: float | None = None

    def __post_init__(self) -> None:
        check_number("peak window", self.window_s)
        for name, watts in (("job", self.job_w), ("node", self.node_w), ("gpu", self.gpu_w)):
            if watts is not None:
                check_number(f"peak power, {name}", watts)

    @property
    def limited(self) -> bool:
        """Whether there is any limit."""
        return any(watts is not None for watts in (self.job_w, self.node_w, self.gpu_w))


@dataclass(frozen=True, slots=True)
class StageLimit:
    """One budget as the planner needs it, of GPU power: the sum of `gpus[s]` times the power of stage s's GPU.

    All pipelines of a job run one plan, so how many GPUs of each stage a group holds is all that matters of it.

    Attributes:
        name: for people.
        watts: at most; may be 0 or below where the overhead alone uses the budget up.
        gpus: per stage, how many count.
        at_gpu: whether it was given as power of the GPU itself, whatever the overhead of its node.
    """

    name: str
    watts: float
    gpus: tuple[int, ...]
    at_gpu: bool = False


@dataclass(frozen=True, slots=True)
class PowerBudget:
    """How many watts a job may draw.

    Attributes:
        job_w: all GPUs of the job together, those of all pipelines; None: no limit.
        groups: budgets of some of them.
        node: what nodes draw beside; all watts are the node's then.
        peaks: limits on short windows, and how long these are.
        gpus_per_node: ranks are numbered node by node.
        stage_of: per rank, the stage that its GPU runs; empty: one pipeline, of which rank s runs stage s.
        or_nearest: where no plan keeps it, it is planned for what comes nearest to it, instead of for nothing.
    """

    job_w: float | None = None
    groups: tuple[GroupBudget, ...] = ()
    node: NodeOverhead = NodeOverhead()
    peaks: Peaks = Peaks()
    gpus_per_node: int = 8
    stage_of: tuple[int, ...] = ()
    or_nearest: bool = False

    def __post_init__(self) -> None:
        if self.job_w is not None:
            check_number("power budget", self.job_w)
        if self.gpus_per_node < 1:
            raise PlanError(f"GPUs per node: got {self.gpus_per_node}; allowed: a whole number from 1")
        if self.job_w is None and not self.groups and not self.peaks.limited:
            raise PlanError("power budget: got none; allowed: watts of the job, of a group, or of a peak")

    @classmethod
    def configured(cls, config: PerseusConfig) -> PowerBudget | None:
        """What the `perseus` block says, as far as it can be kept: nobody is there to be refused; None: nothing.

        Raises:
            PlanError: a figure is out of range.
        """
        groups = tuple(GroupBudget(of, of, watts) for of, watts in config.power_budget_groups_w.items())
        if config.power_budget_w is None and config.peak_w is None and not groups:
            return None
        return cls(
            config.power_budget_w,
            groups,
            NodeOverhead(config.node_overhead_w, config.node_overhead_share),
            Peaks(config.peak_window_s, config.peak_w),
            or_nearest=True,
        )

    def completed(self, config: PerseusConfig) -> PowerBudget:
        """With the block's groups, peaks and overhead of nodes, where it has none of its own."""
        usual = PowerBudget.configured(config)
        return replace(
            self,
            groups=self.groups or (() if usual is None else usual.groups),
            peaks=self.peaks if self.peaks.limited or usual is None else usual.peaks,
            node=self.node
            if self.node != NodeOverhead()
            else NodeOverhead(config.node_overhead_w, config.node_overhead_share),
        )

    def placed(self, stage_of: Sequence[int], gpus_per_node: int | None = None) -> PowerBudget:
        """The same for a job whose ranks run these stages."""
        return replace(self, stage_of=tuple(stage_of), gpus_per_node=gpus_per_node or self.gpus_per_node)

    def tightened(self, draws: float) -> PowerBudget:
        """For GPUs that draw so many times what their profile says, all together.

        Where that is less, a group, or a moment, may still draw what the profile says.
        """
        if draws == 1:
            return self
        job_w, gpus = self.job_w, len(self.stage_of)
        if job_w is not None and gpus:
            job_w = self.node_w(self.gpu_w(job_w, gpus) / draws, gpus)

        peaks, more = self.peaks, max(draws, 1.0)

        def less(watts: float | None) -> float | None:
            return None if watts is None else watts / more

        return replace(
            self,
            job_w=job_w,
            groups=tuple(replace(group, watts=group.watts / more) for group in self.groups),
            peaks=replace(peaks, job_w=less(peaks.job_w), node_w=less(peaks.node_w), gpu_w=less(peaks.gpu_w)),
        )

    def ranks_by_stage(self, stages: int) -> tuple[int, ...]:
        """`stage_of`, for a pipeline of so many stages.

        Raises:
            PlanError: it does not fit them.
        """
        stage_of = self.stage_of or tuple(range(stages))
        if set(stage_of) != set(range(stages)):
            raise PlanError(f"power budget: placed on stages {sorted(set(stage_of))}; the pipeline has {stages} stages")
        return stage_of

    def limits(self, stages: int) -> tuple[StageLimit, ...]:
        """The budgets of job and groups, each once, in GPU watts.

        Raises:
            PlanError: a group holds ranks that are not in the job.
        """
        stage_of = self.ranks_by_stage(stages)
        found: dict[tuple[int, ...], StageLimit] = {}

        def limit(name: str, watts: float, ranks: Sequence[int], at_gpu: bool = False) -> None:
            count = Counter(stage_of[rank] for rank in ranks)
            gpus = tuple(count[stage] for stage in range(stages))
            own_w = watts if at_gpu else self.gpu_w(watts, len(ranks))
            if gpus not in found or own_w < found[gpus].watts:
                found[gpus] = StageLimit(name, own_w, gpus, at_gpu)

        if self.job_w is not None:
            limit("the job", self.job_w, range(len(stage_of)))
        for group in self.groups:
            sets = group.ranks(len(stage_of), self.gpus_per_node)
            for at, ranks in enumerate(sets):
                limit(group.name if len(sets) == 1 else f"{group.name} {at}", group.watts, ranks, group.of == EACH_GPU)
        return tuple(found.values())

    def told_w(self, limit: StageLimit, gpu_w: float) -> float:
        """The power of a budget's GPUs as the budget was given: theirs, or that of their nodes."""
        return gpu_w if limit.at_gpu else self.node_w(gpu_w, sum(limit.gpus))

    def gpu_w(self, node_w: float, gpus: int) -> float:
        """The power of so many GPUs that makes `node_w` at their nodes."""
        return (node_w - gpus * self.node.watts / self.gpus_per_node) / (1 + self.node.share)

    def node_w(self, gpu_w: float, gpus: int) -> float:
        """Inverse of `gpu_w`."""
        return gpu_w * (1 + self.node.share) + gpus * self.node.watts / self.gpus_per_node
