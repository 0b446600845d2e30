"""DeepSpeed: from `PipelineEngine`'s instruction stream to session calls.

`PipelineEngine._INSTRUCTION_MAP` holds the functions captured when the class was made, so overriding
`_exec_forward_pass` would do nothing. While a training schedule runs under a session, the engine *instance* carries an
`InstructionChain`, which calls what is in the engine's map at that moment; before and after, and during evaluation,
nothing of ours is there.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import logging
import weakref
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from perseus_plugin.config import BLOCK, PerseusConfig, load_config, parse_config
from perseus_plugin.errors import ConfigError, PerseusError, ScheduleError, os_problem
from perseus_plugin.integrations.deepspeed.schedule import OPTIMIZER_STEP, operation_name, operation_of, translate
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp

if TYPE_CHECKING:
    from perseus_plugin.session.session import Session

logger = logging.getLogger(__name__)

_MAP = "_INSTRUCTION_MAP"
_SESSION = "_perseus_session"
_DETACH = "_perseus_detach"
_PATCHED = "_perseus_patched"
_STREAMS_KEPT = 15  # lists of names of schedules that take turns


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
    if config is not None and config.enabled and not hasattr(type(engine), "_INSTRUCTION_MAP"):
        _say_no_pipeline()


def _say_no_pipeline() -> None:
    if _rank() == 0:
        logger.warning(
            "perseus is off: it needs pipeline parallelism, and this engine has none. Give deepspeed.initialize a "
            "PipelineModule with at least 2 stages, or remove the %r block.",
            BLOCK,
        )


def _attach(engine: Any, config: PerseusConfig) -> Session | None:
    """Start a session for this engine and bracket its training iterations.

    Nothing here may stop the job: the configuration has been checked, everything else degrades to full clocks.
    """
    if int(engine.num_stages) < 2 and config.profiling.load is None:
        _say_no_pipeline()  # with one stage nobody waits: there is nothing to measure
        return None
    from perseus_plugin.session.session import Session, start_session

    try:
        about = {"samples per iteration": str(engine.train_batch_size())}
        monitor = _monitor_of(engine)
        session = start_session(config, _placement(engine), monitor, _facts(engine), about)
    except ConfigError:
        raise
    except (OSError, PerseusError) as error:
        problem = os_problem(error) if isinstance(error, OSError) else error
        logger.warning("perseus is off: it could not start: %s; training goes on at full clocks", problem)
        return None
    except Exception:
        logger.exception(
            "perseus is off: it could not start; training goes on at full clocks. This is a fault of perseus_plugin or "
            "of the machine: `perseus doctor` tells the latter; else please report it with what follows"
        )
        return None
    if not isinstance(session, Session):
        return None
    _bracket_iterations(engine, session, monitor)
    vars(engine)[_SESSION] = session
    return session


def _placement(engine: Any) -> Any:
    from perseus_plugin.exchange.messages import Placement

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
            self._monitor.write_events([(name, value, self._samples) for name, value in events])


def _monitor_of(engine: Any) -> _Monitor | None:
    """What writes events, where the engine has a monitor turned on."""
    return _Monitor(engine) if getattr(getattr(engine, "monitor", None), "enabled", False) else None


def _bracket_iterations(engine: Any, session: Session, monitor: _Monitor | None) -> None:
    """Hook this engine's training iterations until the session ends.

    Whatever stands beneath our functions is looked up when it is called: on the instance what was there before us, else
    what the class has *then*, so that other tools may hook before, after and in the middle of a job.
    """
    # The session may live as long as the process; it must not keep the engine and its memory alive, and an engine
    # that is dropped shall go at once, without a garbage collection: no closure here holds it.
    of_engine = weakref.ref(engine)
    hook = _Hook(session)
    stage = int(engine.stage_id)
    streams = _StreamCache()
    in_batch = in_schedule = False

    def run_batch(run: Callable[[], Any]) -> Any:
        nonlocal in_batch
        try:
            in_batch = True
            session.begin_iteration()
            return run()
        except BaseException:
            # A script that catches it does not go on at the clock of the instruction that failed.
            session.evaluation()
            raise
        finally:
            in_batch = False
            if monitor is not None:
                monitor.look()
            session.end_iteration()

    def run_schedule(schedule: Any, run: Callable[[], Any]) -> Any:
        nonlocal in_schedule
        known = streams.get(schedule)
        if known is None:
            session.evaluation()
            return run()
        if not session.begin_schedule(*known):
            return run()
        hook.expect(known[1](stage))
        chain = InstructionChain(of_engine(), hook)
        try:
            in_schedule = True
            result = run()
            # Whose map was exchanged in the midst of it has only not been seen whole.
            if not session.closed and chain.is_there and (unlike := hook.difference()):
                streams.refuse(schedule, ScheduleError(unlike))
                session.evaluation()
            return result
        except BaseException:
            session.evaluation()
            raise
        finally:
            in_schedule = False
            chain.take_out()
            session.end_schedule()

    def train_batch(beneath: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        def train_batch(*args: Any, **kwargs: Any) -> Any:
            if in_batch or session.closed:
                return beneath()(*args, **kwargs)
            puts.put("_exec_schedule")
            return run_batch(lambda: beneath()(*args, **kwargs))

        return train_batch

    def exec_schedule(beneath: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        def exec_schedule(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                return beneath()(*args, **kwargs)

            schedule = next(iter((*args, *kwargs.values())), None)
            if in_schedule or session.closed:
                return run()
            if in_batch:
                return run_schedule(schedule, run)
            if streams.trains(schedule):  # somebody has taken `train_batch` off the instance again, and ours with it
                puts.put("train_batch")
                return run_batch(lambda: run_schedule(schedule, run))
            session.evaluation()
            return run()

        return exec_schedule

    def destroy(beneath: Callable[[], Callable[..., Any]]) -> Callable[..., Any]:
        def destroy(*args: Any, **kwargs: Any) -> Any:
            session.close()
            return beneath()(*args, **kwargs)

        return destroy

    puts = _InstanceMethods(
        of_engine, {"train_batch": train_batch, "_exec_schedule": exec_schedule, "destroy": destroy}
    )

    def detach() -> None:
        puts.take_out()
        alive = of_engine()
        if alive is None:
            return
        chain = vars(alive).get(_MAP)
        if isinstance(chain, InstructionChain):
            chain.take_out()
        for name in (_SESSION, _DETACH):
            vars(alive).pop(name, None)

    vars(engine)[_DETACH] = detach
    session.on_close(lambda: _detach(of_engine()))
    weakref.finalize(engine, session.close)


class _InstanceMethods:
    """Our functions in the place of an engine's methods, on the instance; each calls what is beneath it.

    Beneath is what was on the instance when it was put there, else what the class has at the time of the call.

    Args:
        of_engine: the engine, which may be gone.
        made_from: by name, makes the function from one that says what is beneath.
    """

    def __init__(
        self,
        of_engine: Callable[[], Any],
        made_from: Mapping[str, Callable[[Callable[[], Callable[..., Any]]], Callable[..., Any]]],
    ) -> None:
        self._of_engine, self._made_from = of_engine, made_from
        # Those that still live, with what each is around: another tool may keep an old one and put it back at any time.
        self._put: weakref.WeakKeyDictionary[Callable[..., Any], list[Any]] = weakref.WeakKeyDictionary()
        for name in made_from:
            self.put(name)

    def put(self, name: str) -> None:
        """Put ours on top, unless one of ours is there."""
        attributes, of_engine = vars(self._of_engine()), self._of_engine
        there = [attributes[name]] if name in attributes else []
        replaced: Any = there[0] if there else getattr(type(self._of_engine()), name, None)
        if replaced is None or self._is_ours(replaced):
            return

        def beneath() -> Callable[..., Any]:
            alive = of_engine()
            function: Callable[..., Any] = there[0] if there else getattr(type(alive), name).__get__(alive)
            return function

        function = functools.wraps(replaced)(self._made_from[name](beneath))
        vars(function).pop("__wrapped__", None)  # a bound method would keep the engine
        self._put[function] = there
        attributes[name] = function

    def take_out(self) -> None:
        """Have the engine's methods be as without us, where nobody has put something around ours since."""
        alive = self._of_engine()
        for name in self._made_from if alive is not None else ():
            while self._is_ours(function := vars(alive).get(name)):
                there = self._put[function]
                del vars(alive)[name]
                vars(alive).update({name: there[0]} if there else {})

    def _is_ours(self, function: Any) -> bool:
        return any(function is ours for ours in list(self._put))


def _detach(engine: Any) -> None:
    """Put an engine back as it was, if it is still there."""
    if engine is not None and _DETACH in vars(engine):
        vars(engine)[_DETACH]()


class _Hook:
    """Puts the session's tap around an instruction's function; one that runs within another one is not seen twice."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._inside = False
        self._streams: list[tuple[Sequence[StreamOp], list[str]]] = []
        self._expected: list[str] = []
        self._position = 0
        self._unlike = ""

    def expect(self, stream: Sequence[StreamOp]) -> None:
        """A schedule begins, with these operations of this stage."""
        known = next((names for one, names in self._streams if one is stream), None)
        if known is None:
            known = [operation_of(op) for op in stream if isinstance(op, (Compute, Constant))]
            self._streams = [*self._streams[-_STREAMS_KEPT:], (stream, known)]
        self._expected = known
        self._position, self._unlike = 0, ""

    def difference(self) -> str:
        """What the schedule that has run has done otherwise than was expected; empty if nothing."""
        if not self._unlike and self._position < len(self._expected):
            return f"it ran {self._position} instructions where its class yields {len(self._expected)}"
        return self._unlike

    def _meets(self, name: str) -> bool:
        """Whether this operation is the next one; from the first one on that is not, none is looked at any more."""
        if self._unlike:
            return False
        expected = self._expected[self._position] if self._position < len(self._expected) else "no more"
        if name != expected:
            self._unlike = f"its instruction {self._position} is {name} where its class yields {expected}"
            self._session.evaluation()
            self._session.end_schedule()
            return False
        self._position += 1
        return True

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with the tap around it; `name` is the operation's, see `operation_name`."""
        begin, end = self._session.tap.begin, self._session.tap.end

        @functools.wraps(function, updated=())
        def instruction(engine: Any, *args: Any, **kwargs: Any) -> Any:
            if self._inside or not self._meets(name):
                return function(engine, *args, **kwargs)
            self._inside = True
            try:
                begin()
                result = function(engine, *args, **kwargs)
                end()
            finally:
                self._inside = False
            return result

        return instruction


class InstructionChain(UserDict[type, Callable[..., Any]]):
    """What stands in the place of an engine's instruction map while a training schedule runs; put there when made.

    Every lookup goes to the map that would be there without us, as it is then: the instance's, else the class's. What
    others put into it, or take out, before or during the schedule therefore counts at once; and what is put in through
    this object is put into that map.

    Args:
        engine: whose map.
        hook: goes around what takes time.
    """

    def __init__(self, engine: Any, hook: _Hook) -> None:
        self._engine, self._hook = engine, hook
        self._had = _MAP in vars(engine)
        self._instance_map = vars(engine).get(_MAP)
        self._known: dict[type, tuple[Callable[..., Any], Callable[..., Any]]] = {}
        vars(engine)[_MAP] = self

    @property
    def data(self) -> Any:  # type: ignore[override]
        """The map beneath."""
        return self._instance_map if self._had else type(self._engine)._INSTRUCTION_MAP

    def __getitem__(self, instruction_class: type) -> Callable[..., Any]:
        function: Callable[..., Any] = self.data[instruction_class]
        known = self._known.get(instruction_class)
        if known is None or known[0] is not function:
            name = operation_name(instruction_class)
            hooked = function if name is None else self._hook.around(name, function)
            known = self._known[instruction_class] = (function, hooked)
        return known[1]

    def copy(self) -> dict[type, Callable[..., Any]]:  # type: ignore[override]
        """The map beneath, without our hooks."""
        return dict(self.data)

    __copy__ = copy  # type: ignore[assignment]

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[type, Callable[..., Any]]:
        return copy.deepcopy(self.copy(), memo)

    def __or__(self, other: Any) -> Any:
        return self.copy() | (other.copy() if isinstance(other, InstructionChain) else other)

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    @property
    def is_there(self) -> bool:
        """Whether the engine's map is this one."""
        return vars(self._engine).get(_MAP) is self

    def take_out(self) -> None:
        """Have the engine's map be there again, unless somebody has put another one in our place."""
        if self.is_there:
            vars(self._engine).pop(_MAP, None)  # the worker's thread may take it out just now
            if self._had:
                vars(self._engine)[_MAP] = self._instance_map


StreamOfStage = Callable[[int], list[StreamOp]]


class _StreamCache:
    """Streams of the schedules seen; a schedule is known by its class and shape.

    A class that cannot be understood (a fork's, whose constructor wants more, or whose instructions make no pipeline)
    is named once, and its iterations run at full clocks. All ranks build all stages' streams, so all find the same.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[type, Any, Any], tuple[str, StreamOfStage] | Exception] = {}
        self._named: set[type] = set()

    def get(self, schedule: Any) -> tuple[str, StreamOfStage] | None:
        """Name and streams of a schedule; None for one that is not understood."""
        known = self._look_up(schedule)
        if isinstance(known, Exception):
            self._say(type(schedule), known)
            return None
        return known

    def trains(self, schedule: Any) -> bool:
        """Whether a schedule is one of training: it has a step of the optimizer."""
        known = self._look_up(schedule)
        return not isinstance(known, Exception) and any(getattr(op, "name", "") == OPTIMIZER_STEP for op in known[1](0))

    def refuse(self, schedule: Any, error: ScheduleError) -> None:
        """A schedule that ran otherwise than its class says is not followed from now on; every rank names its own."""
        self._known[_shape(schedule)] = error
        self._say(type(schedule), error, everywhere=True)

    def _look_up(self, schedule: Any) -> tuple[str, StreamOfStage] | Exception:
        shape = _shape(schedule)
        if shape not in self._known:
            try:
                self._known[shape] = _streams(*shape)
            except Exception as error:
                self._known[shape] = error
        return self._known[shape]

    def _say(self, schedule_class: type, error: Exception, everywhere: bool = False) -> None:
        if schedule_class in self._named:
            return
        self._named.add(schedule_class)
        if everywhere or _rank() == 0:
            logger.warning(
                "the schedule %s.%s is not one that perseus can follow (%s): its iterations run at full clocks, and "
                "training is not affected. A schedule is followed that can be made from micro_batches, stages and "
                "stage_id alone, and then yields what it runs",
                schedule_class.__module__,
                schedule_class.__qualname__,
                error,
            )


def _shape(schedule: Any) -> tuple[type, Any, Any]:
    return type(schedule), getattr(schedule, "micro_batches", None), getattr(schedule, "stages", None)


def _streams(schedule_class: type, microbatches: Any, stages: Any) -> tuple[str, StreamOfStage]:
    """Name and streams of a shape of a schedule, checked for all stages.

    Raises:
        Exception: whatever a foreign class raises when it is made, or ours if its streams make no pipeline.
    """
    from perseus_plugin.iteration.graph import build_graph

    if not (isinstance(microbatches, int) and isinstance(stages, int)):
        raise ScheduleError("it has no numbers of micro_batches and stages")

    @functools.cache
    def stream_of(stage: int) -> list[StreamOp]:
        made = schedule_class(micro_batches=microbatches, stages=stages, stage_id=stage)
        return translate(made.steps(), stage)

    build_graph([stream_of(stage) for stage in range(stages)], {})
    return f"{schedule_class.__name__}/{stages}x{microbatches}", stream_of
