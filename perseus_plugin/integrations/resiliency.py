"""nvidia-resiliency-ext: its straggler detection's reports go to the session, corrected for the plan.

Its relative GPU scores compare each rank's kernel times with the fastest rank's, so planned slow clocks look like slow
GPUs. `Detector.generate_report` is wrapped when its module is imported; what it returns is not changed.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from perseus_plugin.session.running import running_sessions

logger = logging.getLogger(__name__)

SOURCE = "nvidia-resiliency-ext"

_PATCHED = "_perseus_patched"


def patch_straggler_module(module: ModuleType) -> None:
    """Make the detector of a freshly imported module pass its reports on. Idempotent."""
    detector = getattr(module, "Detector", None)
    if detector is None or _PATCHED in vars(detector) or not hasattr(detector, "generate_report"):
        return
    stock = detector.generate_report.__func__

    @functools.wraps(stock)
    def generate_report(cls: type, *args: Any, **kwargs: Any) -> Any:
        report = stock(cls, *args, **kwargs)
        try:
            take_report(report)
        except Exception:
            logger.warning("a report of nvidia-resiliency-ext was not understood; training goes on", exc_info=True)
        return report

    detector.generate_report = classmethod(generate_report)
    setattr(detector, _PATCHED, True)


def take_report(report: Any) -> bool:
    """Have this process's session look at a report; to be called on rank 0, with the scores of all ranks.

    Args:
        report: a `Report` of nvidia-resiliency-ext; only `gpu_relative_perf_scores` is used.

    Returns:
        Whether a session took it.
    """
    scores = dict(getattr(report, "gpu_relative_perf_scores", None) or {})
    sessions = running_sessions()
    if len(scores) < 2 or not sessions:
        return False
    from perseus_plugin.stragglers.external import ExternalFigures

    # A score is the time of the fastest rank over this rank's.
    times = {int(rank): 1 / float(score) for rank, score in scores.items() if float(score) > 0}
    for session in sessions:
        session.external_figures(ExternalFigures(SOURCE, times, comparable=True))
    return True
