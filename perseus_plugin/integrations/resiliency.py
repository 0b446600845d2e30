"""nvidia-resiliency-ext: its straggler detection's reports go to the session, corrected for the plan.

Its relative GPU scores compare each rank's kernel times with the fastest rank's, so planned slow clocks look like slow
GPUs. `Detector.generate_report` is wrapped when its module is imported; what it returns is not changed.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from perseus_plugin.integrations.base import StragglerSource, pass_on

if TYPE_CHECKING:
    from perseus_plugin.stragglers.external import ExternalFigures


class ResiliencyDetector(StragglerSource):
    """Reports with the scores of all ranks, which rank 0 has; only `gpu_relative_perf_scores` is used."""

    name = known_as = "nvidia-resiliency-ext"

    def figures(self, report: Any) -> ExternalFigures | None:
        """A score is the time of the fastest rank over this rank's."""
        from perseus_plugin.stragglers.external import ExternalFigures

        scores = dict(getattr(report, "gpu_relative_perf_scores", None) or {})
        times = {int(rank): 1 / float(score) for rank, score in scores.items() if float(score) > 0}
        return ExternalFigures(self.name, times, comparable=True) if len(scores) > 1 else None


def patch_straggler_module(module: ModuleType) -> None:
    """Make the detector of a freshly imported module pass its reports on. Idempotent."""
    pass_on(getattr(module, "Detector", None), "generate_report", ResiliencyDetector())
