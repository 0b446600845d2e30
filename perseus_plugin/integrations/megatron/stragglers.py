"""Megatron's straggler detector (`--log-straggler`): its figures go to the session, corrected for the plan.

Its report gives each rank's throughput over a log interval, from GPU times of the forward passes only. Planned slow
clocks and unequal stages look like stragglers there; the session knows both.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from perseus_plugin.integrations.base import StragglerSource, pass_on

if TYPE_CHECKING:
    from perseus_plugin.stragglers.external import ExternalFigures


class MegatronDetector(StragglerSource):
    """What the detector has gathered from all ranks; None on other ranks than 0."""

    name, known_as = "megatron", "--log-straggler"

    def figures(self, report: Any) -> ExternalFigures | None:
        """From the throughputs."""
        from perseus_plugin.stragglers.external import ExternalFigures

        told = [throughput()[:2] for throughput in getattr(report, "aflops", None) or ()]
        times = {int(rank): 1 / float(flops) for flops, rank in told if float(flops) > 0}
        return ExternalFigures(self.name, times, kinds=("forward",)) if told else None


def listen(utils: ModuleType) -> None:
    """Have the detector of `megatron.core.utils` pass on what it gathers on rank 0. Idempotent."""
    pass_on(getattr(utils, "StragglerDetector", None), "_min_max", MegatronDetector())
