"""PyTorch's schedules: from one that is hooked to a session that follows it."""

from __future__ import annotations

import itertools
import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from perseus_plugin.config import PerseusConfig, load_config, parse_config
from perseus_plugin.errors import ConfigError
from perseus_plugin.exchange.messages import Placement, Seat
from perseus_plugin.exchange.store import Exchange, open_exchange
from perseus_plugin.integrations.base import (
    PipelineSession,
    job_rank,
    local_rank,
    model_digest,
    start_session,
    started,
)
from perseus_plugin.integrations.torch_pipelining.hooks import HOOKS, Hooks, Microbatches
from perseus_plugin.integrations.torch_pipelining.places import replica_and_shards, seats_of_all, together_with
from perseus_plugin.integrations.torch_pipelining.schedule import stages_of

logger = logging.getLogger(__name__)


_GIVEN = ("arg_mbs", "kwarg_mbs", "target_mbs")
"""Lists of microbatches that a run of a schedule is given, in their order."""

_numbers = itertools.count(1)
_current: list[weakref.ref[Hooks]] = []
"""Of the schedule that this process trains with, once its session has started."""


def enable(schedule: Any, config: Any) -> PipelineSession | None:
    """See `perseus_plugin.enable`. The session starts with the schedule's first run that trains: None until then."""
    hooks: Hooks | None = vars(schedule).get(HOOKS)
    if hooks is not None:
        return hooks.session
    if config is None:
        raise ConfigError("enable: got a schedule and no settings; allowed: a dict, or the path of a JSON or YAML file")
    if isinstance(config, (str, Path)):
        config = load_config(config)
    elif not isinstance(config, PerseusConfig):
        config = parse_config(config)
    if config.enabled:
        job = _Job(config)
        Hooks(schedule, job.start, job.elsewhere)
    return None


def replaying(schedule: Any) -> AbstractContextManager[None]:
    """See `perseus_plugin.replaying`."""
    hooks: Hooks | None = getattr(schedule, "__dict__", {}).get(HOOKS)  # of whatever: training may have begun
    return nullcontext() if hooks is None else hooks.replaying()


class _Job:
    """What hooks want of the running job."""

    def __init__(self, config: PerseusConfig) -> None:
        self._config = config
        self._said = False

    def start(self, hooks: Hooks, schedule: Any, microbatches: Microbatches) -> PipelineSession | None:
        """Start the session of the first schedule that trains; None for any other one as long as that one lives.

        Raises:
            ConfigError: something in the configuration does not fit this job.
        """
        other = _living()
        if other is not None and other is not hooks:
            if not self._said:
                self._said = True
                logger.warning(
                    "a second schedule trains in this process: its iterations run at full clocks and are not "
                    "measured, nor is one of the first schedule that comes right after; only the one that has trained "
                    "first is planned for, as long as it is there"
                )
            return None
        session = started(lambda: self._start(hooks, schedule, microbatches))
        if session is None:
            hooks.remove()
            return None
        _current[:] = [weakref.ref(hooks)]
        return session

    def elsewhere(self, hooks: Hooks) -> None:
        """Something runs on the GPU that is not this job's training as planned."""
        other = _living()
        if other is not None:
            other.disturbed()

    def _start(self, hooks: Hooks, schedule: Any, microbatches: Microbatches) -> PipelineSession | None:
        stages = stages_of(schedule)
        if int(stages[0].group_size) < 2 and self._config.profiling.load is None:
            if job_rank() == 0:
                logger.warning(
                    "perseus is off: it needs pipeline parallelism, and this job's pipeline has one rank; training "
                    "goes on at full clocks"
                )
            return None
        exchange = open_exchange(f"schedule-{next(_numbers)}")
        try:
            where = placement(stages, exchange)
        except BaseException:
            exchange.close()
            raise
        session = start_session(self._config, where, None, facts(stages, microbatches), exchange=exchange)
        try:
            hooks.begins(session)
        except BaseException:
            session.close()
            raise
        return session


def _living() -> Hooks | None:
    hooks = _current[0]() if _current else None
    return None if hooks is None or hooks.session is None or hooks.session.closed else hooks


def placement(stages: list[Any], exchange: Exchange) -> Placement:
    """Where this rank sits.

    Raises:
        PerseusError: a rank does not come, or the pipelines are not alike.
    """
    import torch.distributed

    first, rank = stages[0], torch.distributed.get_rank()
    world_size = torch.distributed.get_world_size()
    pipeline = first.group if first.group is not None else torch.distributed.group.WORLD
    mine = Seat(
        pipeline=torch.distributed.get_process_group_ranks(pipeline)[0],
        stage=int(first.group_rank),
        stages=int(first.group_size),
        together=together_with(rank, (stage.submod for stage in stages)),
    )
    replica, shards = replica_and_shards(seats_of_all(exchange, mine, rank, world_size), rank)
    device = device_of(first)
    return Placement(
        rank=rank,
        world_size=world_size,
        stage=mine.stage,
        stages=mine.stages,
        replica=replica,
        shards=shards,
        local_rank=local_rank(device),
        device=device,
    )


def device_of(stage: Any) -> str:
    """A stage's device with its number, which scripts that have set the current one leave out."""
    import torch

    device = torch.device(stage.device)
    return f"cuda:{torch.cuda.current_device()}" if device == torch.device("cuda") else str(device)


def facts(stages: list[Any], microbatches: Microbatches) -> dict[str, str]:
    """What makes this rank's part of the job what it is."""
    import torch

    named = (
        (f"{stage.stage_index} {name}", parameter)
        for stage in stages
        for name, parameter in stage.submod.named_parameters()
    )
    return {
        "model": model_digest(named),
        "microbatch": ", ".join(_tensors_of_first(microbatches)) or "none",  # stages in the middle are given none
        "torch": torch.__version__,
    }


def _tensors_of_first(microbatches: Microbatches) -> Iterator[str]:
    """Types and shapes of what the first microbatch consists of: arguments by place and by name, and targets."""
    import torch
    from torch.utils._pytree import tree_leaves

    args, kwargs = microbatches
    given = [*args[: len(_GIVEN)], *(kwargs.get(name) for name in _GIVEN[len(args) :])]
    for one in tree_leaves([of_all[0] for of_all in given if of_all]):
        if isinstance(one, torch.Tensor):
            yield f"{one.dtype}{tuple(one.shape)}".removeprefix("torch.")
