"""Megatron's straggler detector (`--log-straggler`): its figures go to the session, corrected for the plan.

Its report gives each rank's throughput over a log interval, from GPU times of the forward passes only. Planned slow
clocks and unequal stages look like stragglers there; the session knows both.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from perseus_plugin.session.running import running_sessions

logger = logging.getLogger(__name__)

SOURCE = "megatron"

_PATCHED = "_perseus_patched"


def listen(utils: ModuleType) -> None:
    """Have the detector of `megatron.core.utils` pass on what it gathers on rank 0. Idempotent."""
    detector = getattr(utils, "StragglerDetector", None)
    stock = getattr(detector, "_min_max", None)
    if stock is None or hasattr(stock, _PATCHED):
        return

    @functools.wraps(stock)
    def min_max(self: Any, *args: Any, **kwargs: Any) -> Any:
        gathered = stock(self, *args, **kwargs)
        try:
            take(gathered)
        except Exception:
            logger.warning("a report of --log-straggler was not understood; training goes on", exc_info=True)
        return gathered

    setattr(min_max, _PATCHED, True)
    setattr(detector, "_min_max", min_max)  # noqa: B010 - mypy knows nothing of the class


def take(gathered: Any) -> bool:
    """Have this process's session look at what the detector has gathered from all ranks; None on other ranks."""
    throughputs = getattr(gathered, "aflops", None)
    sessions = running_sessions()
    if not throughputs or not sessions:
        return False
    from perseus_plugin.stragglers.external import ExternalFigures

    told = [throughput()[:2] for throughput in throughputs]
    times = {int(rank): 1 / float(flops) for flops, rank in told if float(flops) > 0}
    for session in sessions:
        session.external_figures(ExternalFigures(SOURCE, times, kinds=("forward",)))
    return True
