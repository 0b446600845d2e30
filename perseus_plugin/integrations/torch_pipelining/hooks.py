"""What stands in the place of a schedule's and its stages' methods while a job runs under perseus.

PyTorch's schedules call their stages' methods one instruction at a time, after they have waited for its input (and for
FSDP's parameters), so a wrapper on the *instance* sees it from its begin to its end; on the last stage the loss follows
the forward in a method of the schedule. Functions that were registered for types of action run in the place of these
methods, or call them: what runs within an instruction is not seen twice.

An iteration is a run of the schedule, and what follows up to the last step of an optimizer (see `optimizers.py`).
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from perseus_plugin.errors import ScheduleError
from perseus_plugin.integrations.base import Function, PipelineSession, captures, job_rank
from perseus_plugin.integrations.instances import InstanceMethods, MadeFrom
from perseus_plugin.integrations.torch_pipelining.optimizers import OptimizerSteps
from perseus_plugin.integrations.torch_pipelining.schedule import (
    LISTS,
    Followed,
    followed,
    functions_of,
    stages_of,
)
from perseus_plugin.iteration.actions import Action
from perseus_plugin.iteration.instructions import Compute, Constant

logger = logging.getLogger(__name__)

Operation = Compute | Constant
Microbatches = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a run of a schedule."""

HOOKS = "_perseus_hooks"
"""Attribute of a schedule that is hooked."""
_RUN = "_step_microbatches"


class Hooks:
    """The wrappers on one schedule and its stages, and where in the iteration they are.

    Args:
        schedule: of which nothing here keeps it, or its stages, alive.
        start: makes the job's session at the first run that trains, from the run's arguments, and calls `begins`; None
            for none.
        elsewhere: called at a run of a schedule without a session: something runs on the GPU.
    """

    def __init__(
        self,
        schedule: Any,
        start: Callable[[Hooks, Any, Microbatches], PipelineSession | None],
        elsewhere: Callable[[Hooks], None],
    ) -> None:
        self._of_schedule: Callable[[], Any] = weakref.ref(schedule)
        self._start, self._elsewhere = start, elsewhere
        self.session: PipelineSession | None = None
        self._refused = self._in_run = False
        self._stages: list[InstanceMethods] = []
        self._run_hook = InstanceMethods(self._of_schedule, {_RUN: self._run})
        self._loss_hook: InstanceMethods | None = None
        self._optimizers = OptimizerSteps()
        self._known: dict[object, tuple[object, Followed | None]] = {}
        self._shape: object = None
        self._said: set[str] = set()
        self._open = False
        self._following = self._inside = self._loss_follows = self._at_end = False
        self._followed: Followed | None = None
        self._expected: Sequence[Operation] = ()
        self._position = 0
        vars(schedule)[HOOKS] = self  # last: whoever finds it finds all of it

    # In and out.

    def remove(self) -> None:
        """Have the schedule and its stages be as they were, and follow nothing any more."""
        self._refused, self._following = True, False
        _hearing.discard(self)
        for methods in (*self._stages, self._loss_hook, self._run_hook):
            if methods is not None:
                methods.take_out()
        schedule = self._of_schedule()
        if schedule is not None:
            vars(schedule).pop(HOOKS, None)

    def begins(self, session: PipelineSession) -> None:
        """The session that this schedule's iterations are told to."""
        self.session = session
        schedule = self._of_schedule()
        self._loss_hook = InstanceMethods(self._of_schedule, {"_maybe_compute_loss": self._loss})
        self._stages = [self._on_stage(stage) for stage in stages_of(schedule)]
        _hear_optimizers(self)
        session.on_close(self.remove)
        weakref.finalize(schedule, session.close)

    def _on_stage(self, stage: Any) -> InstanceMethods:
        index = int(stage.stage_index)

        def backward(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
            full = kwargs.get("full_backward", args[2] if len(args) > 2 else True)
            return "B" if full else "I"

        made_from: dict[str, MadeFrom] = {
            "forward_one_chunk": self._instruction(index, lambda args, kwargs: "F"),
            "backward_one_chunk": self._instruction(index, backward),
            "backward_weight_one_chunk": self._instruction(index, lambda args, kwargs: "W"),
            "perform_reduce_grad": self._instruction(index, lambda args, kwargs: "REDUCE_GRAD"),
            "_prepare_forward_infra": self._preparation,
            "_prepare_backward_infra": self._preparation,
        }
        return InstanceMethods(weakref.ref(stage), made_from)

    # Iterations.

    def _run(self, beneath: Callable[[], Function]) -> Function:
        def run_schedule(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                return beneath()(*args, **kwargs)

            if self._in_run or self._refused or captures():
                return run()
            schedule = self._of_schedule()
            self._in_run = True
            try:
                session = self.session
                if getattr(schedule, "_has_backward", True):
                    session = session or self._start(self, schedule, (args, kwargs))
                    if session is not None and not session.closed:
                        return self._iteration(session, schedule, run)
                (self._elsewhere if session is None else Hooks.disturbed)(self)
                return run()
            finally:
                self._in_run = False

        return run_schedule

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """Around the replay of a CUDA graph that holds a run of the schedule.

        Where the GPU is emulated, a run of the schedule stands for the replay.
        """
        if captures():
            yield
            return
        session, schedule = self.session, self._of_schedule()
        known = None if session is None or session.closed or self._in_run else self._look_up(schedule)
        if session is None or known is None:
            (self._elsewhere if session is None else Hooks.disturbed)(self)
            yield
            return
        self._end_iteration(whole=False)
        self._optimizers.run_begins()
        session.begin_iteration()
        self._open, self._at_end, self._in_run = True, False, True
        try:
            if session.begin_schedule(known.key, known.streams.__getitem__, replayed=True):
                self._followed, self._expected = known, known.operations
                self._position, self._inside, self._loss_follows = 0, False, False
                self._following = True
            with self._functions(schedule):
                yield
        except BaseException:
            self._optimizers.run_failed()
            self._end_iteration(whole=False)
            raise
        finally:
            self._following = self._inside = self._in_run = False
        session.end_schedule()
        self._optimizers.run_ended()
        if self._optimizers.all_stepped:
            self._end_iteration()

    def disturbed(self) -> None:
        """Something else than this schedule's training runs on the GPU."""
        if not self._following:
            self._end_iteration(whole=False)
            self._optimizers.elsewhere()
        if self.session is not None:
            self.session.evaluation()

    def _iteration(self, session: PipelineSession, schedule: Any, run: Callable[[], Any]) -> Any:
        # What was to end with an optimizer's step that has not come has no end that is known.
        self._end_iteration(whole=False)
        for methods in (*self._stages, self._loss_hook):
            if methods is not None:
                methods.put_all()
        self._optimizers.run_begins()
        session.begin_iteration()
        self._open, self._at_end = True, False
        try:
            result = self._follow(session, schedule, run)
        except BaseException:
            self._optimizers.run_failed()
            self._end_iteration(whole=False)
            raise
        self._optimizers.run_ended()
        if self._optimizers.all_stepped:
            self._end_iteration()
        return result

    def optimizer_stepped(self) -> None:
        """An optimizer of this process has stepped."""
        self._optimizers.stepped()
        if self._optimizers.all_stepped:
            self._end_iteration()

    def _end_iteration(self, whole: bool = True) -> None:
        session, was_open, self._open = self.session, self._open, False
        if session is None or not was_open:
            return
        if not whole:
            session.evaluation()
        elif self._at_end:
            session.tap.end()
        self._at_end = False
        session.end_schedule()
        session.end_iteration()

    def _follow(self, session: PipelineSession, schedule: Any, run: Callable[[], Any]) -> Any:
        known = self._look_up(schedule)
        if known is None:
            session.evaluation()
            return run()
        if not session.begin_schedule(known.key, known.streams.__getitem__):
            return run()
        self._followed, self._expected = known, known.operations
        self._position, self._inside, self._loss_follows = 0, False, False
        self._following = True
        try:
            with self._functions(schedule):
                result = run()
            if self._following and self._position < len(self._expected) - 1:
                self._unlike(f"it ended after {self._position} of {len(self._expected) - 1} instructions")
            return result
        finally:
            self._following = self._inside = False

    def _look_up(self, schedule: Any) -> Followed | None:
        """What the schedule runs, as far as that is known; looked at again when something of it has changed."""
        lists = getattr(schedule, LISTS, None)
        self._shape = (getattr(schedule, "_n_microbatches", 0), frozenset(functions_of(schedule)))
        of_lists, known = self._known.get(self._shape, (None, None))
        if self._shape not in self._known or of_lists is not lists:
            try:
                known = followed(schedule)
            except Exception as error:
                known = None
                self._say_not_followed(schedule, error)
            self._known[self._shape] = (lists, known)
        return known

    def _say_not_followed(self, schedule: Any, error: Exception, everywhere: bool = False) -> None:
        text = f"{type(schedule).__name__}: {error}"
        if text in self._said:
            return
        self._said.add(text)
        if everywhere or job_rank() == 0:
            logger.warning(
                "this schedule of PyTorch is not one that perseus can follow (%s): its iterations run at full clocks, "
                "and training is not affected",
                text,
            )

    # Instructions.

    def _instruction(self, stage: int, letter: Callable[[tuple[Any, ...], dict[str, Any]], str]) -> MadeFrom:
        """Around a stage's method that is an instruction on the microbatch that it is called with first."""

        def made_from(beneath: Callable[[], Function]) -> Function:
            def instruction(*args: Any, **kwargs: Any) -> Any:
                if not self._following or self._inside:
                    return beneath()(*args, **kwargs)
                type_ = letter(args, kwargs)
                if type_ == "REDUCE_GRAD":
                    action = Action(stage, type_)
                else:
                    action = Action(stage, type_, int(next(iter((*args, *kwargs.values())))))
                return self._run_operation(self._operation(action), beneath(), args, kwargs, self._ends_later(action))

            return instruction

        return made_from

    def _operation(self, action: Action) -> Operation | None:
        try:
            return None if self._followed is None else self._followed.operation(action)
        except ScheduleError as error:
            self._unlike(str(error))
            return None

    def _ends_later(self, action: Action) -> bool:
        """Whether the schedule computes the loss after this forward: it is part of it."""
        schedule = self._of_schedule()
        if action.type != "F" or getattr(schedule, "_loss_fn", None) is None:
            return False
        return any(int(one.stage_index) == action.stage and one.is_last for one in stages_of(schedule))

    def _loss(self, beneath: Callable[[], Function]) -> Function:
        def maybe_compute_loss(*args: Any, **kwargs: Any) -> Any:
            result = beneath()(*args, **kwargs)
            if self._loss_follows:
                self._end()
            return result

        return maybe_compute_loss

    def _preparation(self, beneath: Callable[[], Function]) -> Function:
        """Around what runs a stage once more, to learn the shapes of what it passes on: at first, and after `eval`."""

        def prepare(*args: Any, **kwargs: Any) -> Any:
            if self._open and self._in_run and self.session is not None:
                self.session.evaluation()
            return beneath()(*args, **kwargs)

        return prepare

    @contextmanager
    def _functions(self, schedule: Any) -> Iterator[None]:
        """Have those that are registered for actions be seen, for as long as the schedule runs."""
        functions = functions_of(schedule)
        put = {type_: (function, self._around(function)) for type_, function in functions.items()}
        functions.update({type_: ours for type_, (_, ours) in put.items()})
        try:
            yield
        finally:
            for type_, (function, ours) in put.items():
                if functions.get(type_) is ours:
                    functions[type_] = function

    def _around(self, function: Function) -> Function:
        @functools.wraps(function, updated=())
        def instruction(action: Any, *args: Any, **kwargs: Any) -> Any:
            known = self._followed
            if not self._following or self._inside or known is None:
                return function(action, *args, **kwargs)
            try:
                operation = known.operation_written(str(action))
            except ScheduleError as error:
                self._unlike(str(error))
                operation = None
            return self._run_operation(operation, function, (action, *args), kwargs, False)

        return instruction

    def _run_operation(
        self,
        operation: Operation | None,
        function: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        ends_later: bool,
    ) -> Any:
        if operation is None:
            return function(*args, **kwargs)
        self._begin(operation)
        self._inside = True
        try:
            result = function(*args, **kwargs)
        finally:
            self._inside = False
        if ends_later:
            self._loss_follows = True
        else:
            self._end()
        return result

    def _begin(self, operation: Operation) -> None:
        session = self.session
        if session is None or not self._following:
            return
        if self._loss_follows:
            self._unlike("it computes no loss after the last stage's forward")
            return
        expected = self._expected[self._position] if self._position < len(self._expected) - 1 else None
        if operation != expected:
            self._unlike(f"its instruction {self._position} is {_shown(operation)} instead of {_shown(expected)}")
            return
        session.tap.begin()

    def _end(self) -> None:
        session, self._loss_follows = self.session, False
        if session is None or not self._following:
            return
        session.tap.end()
        self._position += 1
        if self._position == len(self._expected) - 1:
            self._at_end = True
            session.tap.begin()  # what follows, up to the last step of an optimizer, is the end of the batch

    def _unlike(self, text: str) -> None:
        """What runs is not what is known: full clocks for the rest of the iteration, and for this schedule later on."""
        self._following = self._at_end = self._loss_follows = False
        if self.session is not None:
            self.session.evaluation()
            self.session.end_schedule()
        self._known[self._shape] = (self._known[self._shape][0], None)
        self._say_not_followed(self._of_schedule(), ScheduleError(text), everywhere=True)


_hearing: weakref.WeakSet[Hooks] = weakref.WeakSet()
_registered: list[Any] = []


def _hear_optimizers(hooks: Hooks) -> None:
    """Have hooks be told of every step of an optimizer, until they are removed.

    torch goes through its table of hooks while it calls them, and a session may end at any time, also in the midst of
    one: so ours stays there for good, and does nothing once nobody is to be told.
    """
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    if not _registered:
        # A step that is compiled is compiled without what we do after it.
        _registered.append(register_optimizer_step_post_hook(torch.compiler.disable(_optimizer_stepped)))
    _hearing.add(hooks)


def _optimizer_stepped(*_: Any) -> None:
    for hooks in () if captures() else list(_hearing):
        hooks.optimizer_stepped()


def _shown(operation: Operation | None) -> str:
    if operation is None:
        return "the end"
    if isinstance(operation, Constant):
        return operation.name
    return f"{operation.kind} of microbatch {operation.microbatch}"
