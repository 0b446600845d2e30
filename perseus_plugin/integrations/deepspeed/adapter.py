"""DeepSpeed: from a `PipelineEngine` with a `perseus` block to a session that follows its schedules."""

from __future__ import annotations

import logging
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from perseus_plugin.config import BLOCK, PerseusConfig, load_config, parse_config
from perseus_plugin.errors import ConfigError
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.integrations.base import (
    PipelineSession,
    job_rank,
    model_digest,
    start_session,
    started,
    wrap_once,
)
from perseus_plugin.integrations.deepspeed.hooks import SESSION, bracket_iterations

logger = logging.getLogger(__name__)


def patch_engine_module(module: ModuleType) -> None:
    """Make the engine class of a freshly imported DeepSpeed module attach itself. Idempotent."""
    name = "PipelineEngine" if hasattr(module, "PipelineEngine") else "DeepSpeedEngine"
    after = _attach_if_enabled if name == "PipelineEngine" else _warn_without_pipeline

    def around(stock: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            # Checked before the engine is built: a wrong block should cost seconds, not a model's initialisation.
            config = _config_of(kwargs.get("config_class"))
            stock(self, *args, **kwargs)
            after(self, config if config is not None else _config_of(getattr(self, "_config", None)))

        return init

    wrap_once(getattr(module, name, None), "__init__", around)


def enable(engine: Any, config: Any = None) -> PipelineSession | None:
    """See `perseus_plugin.enable`."""
    existing: PipelineSession | None = vars(engine).get(SESSION)
    if existing is not None:
        return existing
    if not hasattr(type(engine), "_INSTRUCTION_MAP"):
        raise ConfigError(
            f"enable: got a {type(engine).__name__}; allowed: a DeepSpeed PipelineEngine, or a schedule of "
            "torch.distributed.pipelining"
        )
    if config is None:
        parsed = _config_of(getattr(engine, "_config", None))
    elif isinstance(config, PerseusConfig):
        parsed = config
    elif isinstance(config, (str, Path)):
        parsed = load_config(config)
    else:
        parsed = parse_config(config)
    if parsed is None or not parsed.enabled:
        return None
    return _attach(engine, parsed)


def _config_of(deepspeed_config: Any) -> PerseusConfig | None:
    """The parsed block of a `DeepSpeedConfig`, None when it has none."""
    block = getattr(deepspeed_config, "_param_dict", {}).get(BLOCK)
    if block is None:
        return None
    try:
        return parse_config(block)
    except ConfigError:
        if job_rank() != 0:
            raise SystemExit(1) from None  # rank 0 says it; the same traceback from every rank would bury it
        raise


def _attach_if_enabled(engine: Any, config: PerseusConfig | None) -> None:
    if config is not None and config.enabled and SESSION not in vars(engine):
        _attach(engine, config)


def _warn_without_pipeline(engine: Any, config: PerseusConfig | None) -> None:
    if config is not None and config.enabled and not hasattr(type(engine), "_INSTRUCTION_MAP"):
        _say_no_pipeline()


def _say_no_pipeline() -> None:
    if job_rank() == 0:
        logger.warning(
            "perseus is off: it needs pipeline parallelism, and this engine has none. Give deepspeed.initialize a "
            "PipelineModule with at least 2 stages, or remove the %r block.",
            BLOCK,
        )


def _attach(engine: Any, config: PerseusConfig) -> PipelineSession | None:
    """Start a session for this engine and bracket its training iterations.

    Nothing here may stop the job: the configuration has been checked, everything else degrades to full clocks.
    """
    if int(engine.num_stages) < 2 and config.profiling.load is None:
        _say_no_pipeline()  # with one stage nobody waits: there is nothing to measure
        return None
    monitor = _monitor_of(engine)

    def start() -> PipelineSession:
        about = {"samples per iteration": str(engine.train_batch_size())}
        return start_session(config, _placement(engine), monitor, _facts(engine), about)

    session = started(start)
    if session is not None:
        bracket_iterations(engine, session, monitor.look if monitor is not None else lambda: None)
        vars(engine)[SESSION] = session
    return session


def _placement(engine: Any) -> Placement:
    stages, world_size = int(engine.num_stages), int(engine.world_size)
    replicas = int(getattr(engine.grid, "data_parallel_size", 0)) or world_size // stages
    return Placement(
        rank=int(engine.global_rank),
        world_size=world_size,
        stage=int(engine.stage_id),
        stages=stages,
        replica=int(engine.grid.get_data_parallel_id()),
        shards=world_size // (stages * replicas),  # of model parallelism within a stage
        local_rank=int(getattr(engine, "local_rank", 0) or 0),
        device=str(engine.device),
    )


def _facts(engine: Any) -> dict[str, str]:
    """What makes this rank's part of the job what it is."""
    import deepspeed
    import torch

    return {
        "model": model_digest(engine.module.named_parameters()),
        "microbatch size": str(engine.train_micro_batch_size_per_gpu()),
        "activation checkpointing": str(getattr(engine.module, "activation_checkpoint_interval", "unknown")),
        "ZeRO stage": str(engine.zero_optimization_stage()),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


class _Monitor:
    """Writes events to an engine's monitor, at its sample count.

    The session must not keep the engine's memory, and its last figures come when the engine may be gone: then the
    monitor and the count that were there last are used.
    """

    def __init__(self, engine: Any) -> None:
        self._of_engine = weakref.ref(engine)
        self.look()

    def look(self) -> None:
        """See what the engine has now."""
        alive = self._of_engine()
        if alive is not None:
            self._monitor, self._samples = getattr(alive, "monitor", None), getattr(alive, "global_samples", 0)

    def __call__(self, events: list[tuple[str, float]]) -> None:
        self.look()
        if self._monitor is not None:
            known = [(name, value, self._samples) for name, value in events if not math.isnan(value)]
            self._monitor.write_events(known)


def _monitor_of(engine: Any) -> _Monitor | None:
    """What writes events, where the engine has a monitor turned on."""
    return _Monitor(engine) if getattr(getattr(engine, "monitor", None), "enabled", False) else None
