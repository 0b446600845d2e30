"""What stands in the place of a DeepSpeed engine's own functions while it trains under a session.

`PipelineEngine._INSTRUCTION_MAP` holds the functions captured when the class was made, so overriding
`_exec_forward_pass` would do nothing. While a training schedule runs under a session, the engine *instance* carries an
`InstructionChain`, which calls what is in the engine's map at that moment; before and after, and during evaluation,
nothing of ours is there.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

from perseus_plugin.errors import ScheduleError
from perseus_plugin.integrations.base import PipelineSession, iteration
from perseus_plugin.integrations.deepspeed.schedule import StreamCache, operation_name, operation_of
from perseus_plugin.integrations.instances import InstanceMethods
from perseus_plugin.iteration.instructions import Compute, Constant, StreamOp

SESSION = "_perseus_session"
"""Attribute of an engine that has one."""
_MAP = "_INSTRUCTION_MAP"
_DETACH = "_perseus_detach"
_STREAMS_KEPT = 15  # lists of names of schedules that take turns


def bracket_iterations(engine: Any, session: PipelineSession, look: Callable[[], None]) -> None:
    """Hook this engine's training iterations until the session ends.

    Whatever stands beneath our functions is looked up when it is called: on the instance what was there before us, else
    what the class has *then*, so that other tools may hook before, after and in the middle of a job.
    """
    # The session may live as long as the process; it must not keep the engine and its memory alive, and an engine
    # that is dropped shall go at once, without a garbage collection: no closure here holds it.
    of_engine = weakref.ref(engine)
    hook = _Hook(session)
    stage = int(engine.stage_id)
    streams = StreamCache()
    in_batch = in_schedule = False

    def run_batch(run: Callable[[], Any]) -> Any:
        nonlocal in_batch
        with iteration(session):
            try:
                in_batch = True
                return run()
            finally:
                in_batch = False
                look()

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

    puts = InstanceMethods(of_engine, {"train_batch": train_batch, "_exec_schedule": exec_schedule, "destroy": destroy})

    def detach() -> None:
        puts.take_out()
        alive = of_engine()
        if alive is None:
            return
        chain = vars(alive).get(_MAP)
        if isinstance(chain, InstructionChain):
            chain.take_out()
        for name in (SESSION, _DETACH):
            vars(alive).pop(name, None)

    vars(engine)[_DETACH] = detach
    session.on_close(lambda: _detach(of_engine()))
    weakref.finalize(engine, session.close)


def _detach(engine: Any) -> None:
    """Put an engine back as it was, if it is still there."""
    if engine is not None and _DETACH in vars(engine):
        vars(engine)[_DETACH]()


class _Hook:
    """Puts the session's tap around an instruction's function; one that runs within another one is not seen twice."""

    def __init__(self, session: PipelineSession) -> None:
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
