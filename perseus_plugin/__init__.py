"""perseus_plugin: less GPU energy at the same speed for pipeline-parallel training.

All names that a program may use are here; `docs/api.md` describes them. Importing this package imports neither torch
nor ortools nor pydantic: a name is loaded from its module when it is first asked for.
"""

from __future__ import annotations

import importlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from perseus_plugin._version import __version__

if TYPE_CHECKING:
    from perseus_plugin.cli.simulation.description import modelled_profile
    from perseus_plugin.cli.simulation.scenarios import Figures, Pipeline, simulate
    from perseus_plugin.config import load_config, parse_config
    from perseus_plugin.integrations.base import PipelineSession
    from perseus_plugin.iteration.graph import build_graph
    from perseus_plugin.iteration.schedules import early_recomputation_1f1b, gpipe, interleaved_1f1b, one_f_one_b
    from perseus_plugin.planning.frontier import make_frontier
    from perseus_plugin.planning.plan import Plan, load_plan, save_plan
    from perseus_plugin.planning.planner import Planner, make_plan
    from perseus_plugin.planning.power.budget import GroupBudget, NodeOverhead, Peaks, PowerBudget
    from perseus_plugin.planning.streams import load_streams
    from perseus_plugin.planning.targets import ChangeLimits, Prices, Target
    from perseus_plugin.profiling.profile import Measurement, Profile, load_profile, save_profile

BatchT = TypeVar("BatchT")

__all__ = [
    "ChangeLimits",
    "Figures",
    "GroupBudget",
    "Measurement",
    "NodeOverhead",
    "Peaks",
    "Pipeline",
    "Plan",
    "Planner",
    "PowerBudget",
    "Prices",
    "Profile",
    "Target",
    "__version__",
    "announce",
    "announced",
    "build_graph",
    "early_recomputation_1f1b",
    "enable",
    "gpipe",
    "interleaved_1f1b",
    "load_config",
    "load_plan",
    "load_profile",
    "load_streams",
    "make_frontier",
    "make_plan",
    "modelled_profile",
    "one_f_one_b",
    "parse_config",
    "replaying",
    "report_straggler",
    "save_plan",
    "save_profile",
    "set_target",
    "simulate",
]

# The same as the imports above, for a running program; `tests/test_init.py` holds the two together.
_HOME = {
    "cli.simulation.description": ("modelled_profile",),
    "cli.simulation.scenarios": ("Figures", "Pipeline", "simulate"),
    "config": ("load_config", "parse_config"),
    "iteration.graph": ("build_graph",),
    "iteration.schedules": (
        "early_recomputation_1f1b",
        "gpipe",
        "interleaved_1f1b",
        "one_f_one_b",
    ),
    "planning.frontier": ("make_frontier",),
    "planning.plan": ("Plan", "load_plan", "save_plan"),
    "planning.planner": ("Planner", "make_plan"),
    "planning.streams": ("load_streams",),
    "planning.power.budget": ("GroupBudget", "NodeOverhead", "Peaks", "PowerBudget"),
    "planning.targets": ("ChangeLimits", "Prices", "Target"),
    "profiling.profile": ("Measurement", "Profile", "load_profile", "save_profile"),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOME.items() for name in names}


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def enable(engine: Any, config: Any = None) -> PipelineSession | None:
    """Attach to a DeepSpeed `PipelineEngine`, or to a schedule of `torch.distributed.pipelining`.

    Args:
        engine: the engine `deepspeed.initialize` returned, or the schedule, which need not have run yet.
        config: the `perseus` block as a dict, a path of a JSON or YAML file, or None for the one in the
            engine's own DeepSpeed config.

    Returns:
        The session, the one already attached if there is one, or None when the block is absent or disabled. A
        schedule's session starts when the schedule first trains: None until then.

    Raises:
        ConfigError: the block is wrong, or this is neither a pipeline engine nor a schedule.
    """
    from perseus_plugin.integrations.torch_pipelining.turning_on import is_schedule

    if is_schedule(engine):
        from perseus_plugin.integrations.torch_pipelining.adapter import enable as enable_on_schedule

        return enable_on_schedule(engine, config)
    from perseus_plugin.integrations.deepspeed.adapter import enable as enable_on_engine

    return enable_on_engine(engine, config)


def replaying(schedule: Any) -> AbstractContextManager[None]:
    """Around the replay of a CUDA graph that holds a whole run of a schedule of `torch.distributed.pipelining`.

    `with perseus_plugin.replaying(schedule): graph.replay()`, the optimizer's step after it, in the graph or not. The
    session starts with a run of the schedule that is no graph. With `cuda_graph` in the settings clocks then change by
    host time; without it such steps run at full clocks. See `docs/cuda-graphs.md`.

    Args:
        schedule: that `enable` was called with; with any other one nothing is done.
    """
    from perseus_plugin.integrations.torch_pipelining.adapter import replaying as replaying_schedule

    return replaying_schedule(schedule)


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


_said_refused = False


def announce(work: Any, *, ahead: int = 0) -> bool:
    """Tell how much work each microbatch of a batch to come is, so that its iteration can be planned for it.

    On any one rank of every pipeline (replica), in the order of the steps. Returns at once and never raises; training
    never waits for a plan: an iteration that is announced too late follows the job's usual one. See `docs/batches.md`.

    Args:
        work: one positive number per microbatch, in their order and on the CPU: tokens, or whatever the time of a
            microbatch goes with. What it means for times is measured.
        ahead: how many more steps begin before the one that runs this batch; 0: none, it is the next that begins.

    Returns:
        Whether it was sent; False also when no session runs in this process.
    """
    return _announce(lambda: work, ahead)


def announced(batches: Iterable[BatchT], work: Callable[[BatchT], Iterable[float]], *, ahead: int) -> Iterator[BatchT]:
    """The same batches in the same order, each of them read, and announced, `ahead` steps before the one that runs it.

    To be asked for one batch per step, before it or within it, on any ranks that have the data. Its `work` is asked
    for only where a session runs, and what is wrong with it is one warning.

    Args:
        batches: of one step each; they are read early, so that a loader that is checkpointed is that far ahead.
        work: of each microbatch of a batch, see `announce`.
        ahead: how many batches are held.

    Raises:
        ConfigError: `ahead` cannot be that.
    """
    from perseus_plugin.errors import ConfigError, shown
    from perseus_plugin.iteration.bounds import MOST_AHEAD

    if type(ahead) is not int or not 0 <= ahead <= MOST_AHEAD:
        raise ConfigError(f"ahead: got {shown(ahead)}; allowed: a whole number from 0 to {MOST_AHEAD}")
    return _ReadAhead(batches, work, ahead)


class _ReadAhead(Iterator[BatchT]):
    """What ends the batches, or fails in reading them, comes where it would come without us: after all before it."""

    def __init__(self, batches: Iterable[BatchT], work: Callable[[BatchT], Any], ahead: int) -> None:
        self._batches, self._work, self._ahead = batches, work, ahead
        self._reading: Iterator[BatchT] | None = None
        self._held: deque[BatchT] = deque()
        self._error: Exception | None = None

    def __next__(self) -> BatchT:
        if self._reading is None:
            self._reading = iter(self._batches)
        while self._error is None and len(self._held) <= self._ahead:
            try:
                batch = next(self._reading)
            except Exception as error:
                self._error = error
                break
            self._held.append(batch)
            _announce(partial(self._work, batch), len(self._held) - 1, of_this=True)
        if self._held:
            return self._held.popleft()
        ended, self._error = self._error, None
        assert ended is not None  # else something is held
        raise ended


def _announce(work: Callable[[], Any], ahead: int, *, of_this: bool = False) -> bool:
    """With `of_this`, `ahead` counts from a step that is running, if one is."""
    global _said_refused
    from perseus_plugin.session.running import running_sessions

    sessions, reason = running_sessions(), ""
    try:
        for session in sessions:
            reason = reason or session.announce(work(), ahead, of_this=of_this)
    except Exception as error:  # of the script's own function
        reason = f"work: {error!r}"
    if reason and not _said_refused:
        _said_refused = True  # steps are many
        logging.getLogger(__name__).warning(
            "announced work was refused: %s (logged once). Such iterations follow the job's usual plan; correct the "
            "call",
            reason,
        )
    return bool(sessions) and not reason


def set_target(
    *,
    slowdown: float | str | None = None,
    deadline_s: float | None = None,
    cheapest: bool = False,
    money: Prices | None = None,
    full: bool = False,
    power_budget_w: PowerBudget | float | str | None = None,
    until: float | None = None,
    for_s: float | None = None,
    source: str = "python",
) -> bool:
    """Tell the job what to aim at from now on; to be called on any one rank, any number of times.

    Returns at once and never raises: what is refused is logged with its reason, and training goes on. Without a wish
    and a budget it takes back what this source said. What stands above what: `docs/targets.md`.

    Args:
        slowdown: wish: share by which an iteration may be longer than at full clocks, or words such as "10 %".
        deadline_s: wish: an iteration may take so many seconds.
        cheapest: wish: least energy, however long an iteration takes.
        money: wish: least cost at these prices.
        full: wish: full clocks; nothing is slowed, for stragglers neither.
        power_budget_w: average power that the job may draw, in watts or words such as "180kW", whatever is wished.
        until: Unix time at which it ends by itself.
        for_s: or so many seconds from now.
        source: who says so; a source's newest word stands in the place of what it said before.

    Returns:
        Whether it was sent; False also when no session runs in this process.
    """
    from perseus_plugin.session.running import running_sessions

    said = {
        "slowdown": slowdown,
        "deadline_s": deadline_s,
        "cheapest": cheapest,
        "money": money,
        "full": full,
        "power_budget_w": power_budget_w,
        "until": until,
        "for_s": for_s,
        "source": source,
    }
    refusals = [session.set_target(**said) for session in running_sessions()] or ["no session runs in this process"]
    for reason in filter(None, refusals):
        logging.getLogger(__name__).warning("a target was refused: %s; correct it and say it again", reason)
    return not any(refusals)
