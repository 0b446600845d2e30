"""perseus_plugin: less GPU energy at the same speed for pipeline-parallel training.

Importing this package imports neither torch nor ortools; what needs them is loaded on first use.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from perseus_plugin._version import __version__

if TYPE_CHECKING:
    from perseus_plugin.session.session import Session

__all__ = ["__version__", "enable", "report_straggler"]


def enable(engine: Any, config: Any = None) -> Session | None:
    """Attach to a DeepSpeed `PipelineEngine`; for sites that turn `torch.backends` entry points off.

    Args:
        engine: the engine `deepspeed.initialize` returned.
        config: the `perseus` block as a dict, a path of a JSON or YAML file, or None for the one in the
            engine's own DeepSpeed config.

    Returns:
        The session, the one already attached if there is one, or None when the block is absent or disabled.

    Raises:
        ConfigError: the block is wrong, or the engine is no pipeline engine.
    """
    from perseus_plugin.integrations.deepspeed.engine import enable as enable_on_engine

    return enable_on_engine(engine, config)


def report_straggler(
    *,
    rank: int,
    slowdown: float | None = None,
    iteration_time_s: float | None = None,
    until: float | None = None,
    source: str = "python",
) -> bool:
    """Tell the job that a rank is slow, or will be from now on; to be called on any one rank, any number of times.

    Returns at once and never raises: what is refused is logged with its reason, and training goes on.

    Args:
        rank: which, in the whole job.
        slowdown: its instructions take so many times as long as they did; 1 takes back what this source said.
        iteration_time_s: or: an iteration of its pipeline takes so many seconds.
        until: Unix time at which it ends by itself.
        source: who says so; reports of different sources stand side by side, and the largest counts.

    Returns:
        Whether the report was sent; False also when no session runs in this process.
    """
    from perseus_plugin.session.running import running_sessions

    sessions = running_sessions()
    report = {
        "rank": rank,
        "slowdown": slowdown,
        "iteration_time_s": iteration_time_s,
        "until": until,
        "source": source,
    }
    refusals = [session.report_straggler(**report) for session in sessions] or ["no session runs in this process"]
    for reason in filter(None, refusals):
        logging.getLogger(__name__).warning("a straggler report was refused: %s; correct it and report again", reason)
    return not any(refusals)
