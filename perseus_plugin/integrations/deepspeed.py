"""DeepSpeed: from `PipelineEngine`'s instruction stream to session calls.

`PipelineEngine._INSTRUCTION_MAP` holds the functions captured when the class was made, so overriding
`_exec_forward_pass` would do nothing. While a training schedule runs under a session, the engine *instance* carries a
map of wrapped functions; before and after, and during evaluation, it has the stock one.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from perseus_plugin.config import BLOCK, PerseusConfig, load_config, parse_config
from perseus_plugin.errors import ConfigError
from perseus_plugin.instructions import StreamOp
from perseus_plugin.integrations.deepspeed_schedule import operation_name, translate

if TYPE_CHECKING:
    from perseus_plugin.session import Session

logger = logging.getLogger(__name__)

_SESSION = "_perseus_session"
_DETACH = "_perseus_detach"
_PATCHED = "_perseus_patched"


def patch_engine_module(module: ModuleType) -> None:
    """Make the engine class of a freshly imported DeepSpeed module attach itself. Idempotent."""
    name = "PipelineEngine" if hasattr(module, "PipelineEngine") else "DeepSpeedEngine"
    engine_class = getattr(module, name, None)
    if engine_class is None or _PATCHED in vars(engine_class):
        return
    stock_init = engine_class.__init__
    after = _attach_if_enabled if name == "PipelineEngine" else _warn_without_pipeline

    @functools.wraps(stock_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        # Checked before the engine is built: a wrong block should cost seconds, not a model's initialisation.
        config = _config_of(kwargs.get("config_class"))
        stock_init(self, *args, **kwargs)
        after(self, config if config is not None else _config_of(getattr(self, "_config", None)))

    engine_class.__init__ = init
    setattr(engine_class, _PATCHED, True)


def enable(engine: Any, config: Any = None) -> Session | None:
    """See `perseus_plugin.enable`."""
    existing: Session | None = vars(engine).get(_SESSION)
    if existing is not None:
        return existing
    if not hasattr(type(engine), "_INSTRUCTION_MAP"):
        raise ConfigError(f"enable: got a {type(engine).__name__}; allowed: a DeepSpeed PipelineEngine")
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
        if _rank() != 0:
            raise SystemExit(1) from None  # rank 0 says it; the same traceback from every rank would bury it
        raise


def _rank() -> int:
    import torch.distributed

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def _attach_if_enabled(engine: Any, config: PerseusConfig | None) -> None:
    if config is not None and config.enabled and _SESSION not in vars(engine):
        _attach(engine, config)


def _warn_without_pipeline(engine: Any, config: PerseusConfig | None) -> None:
    if config is not None and config.enabled and not hasattr(type(engine), "_INSTRUCTION_MAP") and _rank() == 0:
        logger.warning(
            "perseus is off: it needs pipeline parallelism, and this engine has none. Give deepspeed.initialize a "
            "PipelineModule with at least 2 stages, or remove the %r block.",
            BLOCK,
        )


def _attach(engine: Any, config: PerseusConfig) -> Session | None:
    """Start a session for this engine and bracket its training iterations.

    Nothing here may stop the job: the configuration has been checked, everything else degrades to full clocks.
    """
    from perseus_plugin.session import Session, start_session

    try:
        about = {"samples per iteration": str(engine.train_batch_size())}
        session = start_session(config, _placement(engine), _monitor_of(engine), _facts(engine), about)
    except ConfigError:
        raise
    except Exception:
        logger.exception(
            "perseus is off: it could not start; training goes on at full clocks. This is a fault of perseus_plugin or "
            "of the machine: `perseus doctor` tells the latter; else please report it with what follows"
        )
        return None
    if not isinstance(session, Session):
        return None
    _bracket_iterations(engine, session)
    vars(engine)[_SESSION] = session
    return session


def _placement(engine: Any) -> Any:
    from perseus_plugin.messages import Placement

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

    digest = hashlib.sha256()
    for name, parameter in engine.module.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
    return {
        "model": digest.hexdigest()[:16],
        "microbatch size": str(engine.train_micro_batch_size_per_gpu()),
        "activation checkpointing": str(getattr(engine.module, "activation_checkpoint_interval", "unknown")),
        "ZeRO stage": str(engine.zero_optimization_stage()),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
    }


def _monitor_of(engine: Any) -> Callable[[list[tuple[str, float]]], None] | None:
    """A function that writes events at the engine's sample count, where the engine has a monitor turned on."""
    monitor = getattr(engine, "monitor", None)
    if monitor is None or not getattr(monitor, "enabled", False):
        return None
    # The session outlives the engine until the process ends; it must not keep the engine's memory.
    of_engine = weakref.ref(engine)

    def write(events: list[tuple[str, float]]) -> None:
        alive = of_engine()
        if alive is not None:
            monitor.write_events([(name, value, alive.global_samples) for name, value in events])

    return write


def _bracket_iterations(engine: Any, session: Session) -> None:
    stock_train_batch = engine.train_batch
    stock_exec_schedule = engine._exec_schedule
    hooked = _hooked_map(type(engine)._INSTRUCTION_MAP, session)
    streams = _StreamCache()
    training = False

    @functools.wraps(stock_train_batch)
    def train_batch(*args: Any, **kwargs: Any) -> Any:
        nonlocal training
        training = True
        session.begin_iteration()
        try:
            return stock_train_batch(*args, **kwargs)
        except BaseException:
            # A script that catches it does not go on at the clock of the instruction that failed.
            session.evaluation()
            raise
        finally:
            training = False
            session.end_iteration()

    @functools.wraps(stock_exec_schedule)
    def exec_schedule(schedule: Any) -> Any:
        if not training:
            session.evaluation()
            return stock_exec_schedule(schedule)
        key, stream_of = streams.get(schedule)
        if not session.begin_schedule(key, stream_of):
            return stock_exec_schedule(schedule)
        vars(engine)["_INSTRUCTION_MAP"] = hooked
        try:
            return stock_exec_schedule(schedule)
        except BaseException:
            session.evaluation()
            raise
        finally:
            vars(engine).pop("_INSTRUCTION_MAP", None)
            session.end_schedule()

    ours = {"train_batch": train_batch, "_exec_schedule": exec_schedule}
    before = {name: vars(engine)[name] for name in ours if name in vars(engine)}
    vars(engine).update(ours)

    def detach() -> None:
        for name, function in ours.items():
            # Another tool may have wrapped the method on this instance too: before us, or around ours.
            if vars(engine).get(name) is function:
                del vars(engine)[name]
                vars(engine).update({name: before[name]} if name in before else {})
        for name in ("_INSTRUCTION_MAP", _SESSION, _DETACH):
            vars(engine).pop(name, None)

    vars(engine)[_DETACH] = detach
    # The session lives until the process ends; it must not keep the engine and its memory alive.
    of_engine = weakref.ref(engine)
    session.on_close(lambda: _detach(of_engine()))
    weakref.finalize(engine, session.close)


def _detach(engine: Any) -> None:
    """Put an engine back as it was, if it is still there."""
    if engine is not None and _DETACH in vars(engine):
        vars(engine)[_DETACH]()


def _hooked_map(stock: Mapping[type, Callable[..., Any]], session: Session) -> dict[type, Callable[..., Any]]:
    hooked: dict[type, Callable[..., Any]] = {}
    for instruction_class, function in stock.items():
        name = operation_name(instruction_class)
        hooked[instruction_class] = function if name is None else _hooked(function, session)
    return hooked


def _hooked(function: Callable[..., Any], session: Session) -> Callable[..., Any]:
    begin, end = session.tap.begin, session.tap.end

    @functools.wraps(function)
    def instruction(engine: Any, *args: Any, **kwargs: Any) -> Any:
        begin()
        result = function(engine, *args, **kwargs)
        end()
        return result

    return instruction


class _StreamCache:
    """Streams of the schedules seen; a schedule is known by its class and shape."""

    def __init__(self) -> None:
        self._known: dict[str, Callable[[int], list[StreamOp]]] = {}

    def get(self, schedule: Any) -> tuple[str, Callable[[int], list[StreamOp]]]:
        schedule_class, microbatches, stages = type(schedule), schedule.micro_batches, schedule.stages
        key = f"{schedule_class.__name__}/{stages}x{microbatches}"
        if key not in self._known:

            @functools.cache
            def stream_of(stage: int) -> list[StreamOp]:
                made = schedule_class(micro_batches=microbatches, stages=stages, stage_id=stage)
                return translate(made.steps(), stage)

            self._known[key] = stream_of
        return key, self._known[key]
