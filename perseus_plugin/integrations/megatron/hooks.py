"""What stands in the place of Megatron's own functions while a job runs under perseus.

Megatron looks up `forward_step`, `backward_step` and its schedule functions as globals of their modules, call by call,
so putting wrappers there is enough. A wrapper calls what it has replaced with the arguments it was given, whatever the
version's signature; the few arguments that it reads are found by name with `inspect.signature`. Iterations are
bracketed by `train_step` of `megatron.training`, or, in loops of one's own, by the schedule function.

Other tools put functions into the same places (`places.py`). The wrappers of instructions are there only while a
schedule of training runs, around whatever stands there then; those of `train_step` and of the schedule functions stay,
and are put there again when somebody has put back what was there before them.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from perseus_plugin.errors import ConfigError
from perseus_plugin.integrations.base import Function, PipelineSession, captures, iteration
from perseus_plugin.integrations.megatron.places import Argument, Place
from perseus_plugin.integrations.megatron.schedule import (
    Id,
    Shape,
    backward_id,
    forward_id,
    ids,
    pair_id,
    stream,
)
from perseus_plugin.iteration.instructions import StreamOp

logger = logging.getLogger(__name__)

BRACKETS = {
    "forward_backward_no_pipelining": False,
    "forward_backward_pipelining_without_interleaving": False,
    "forward_backward_pipelining_with_interleaving": True,
}
"""Megatron's schedule functions, and whether they have virtual stages."""


CALL_FACTS = ("seq_length", "micro_batch_size")
"""What a call of a schedule function says of the job."""


@dataclass(frozen=True)
class Schedule:
    """A schedule as hooks need it.

    Attributes:
        key: see `Shape.key`.
        expected: this stage's instructions in program order.
        stream_of: the stream of any stage.
    """

    key: str
    expected: Sequence[Id]
    stream_of: Callable[[int], Sequence[StreamOp]]

    @classmethod
    def of(cls, shape: Shape, stage: int) -> Schedule:
        """The schedule of a shape, seen from a stage.

        Raises:
            ScheduleError: Megatron has no such schedule.
        """
        return cls(shape.key, ids(stream(shape, stage)), functools.cache(lambda other: stream(shape, other)))


class Hooks:
    """Wrappers in module globals, and where in the iteration they are.

    Args:
        start: makes this job's session at the first training iteration, from the list of model chunks and what the
            call says of the job (`CALL_FACTS`, where it does); None for none.
        schedule_of: the schedule of a call of a schedule function: whether it has virtual stages, the model chunks and
            the number of microbatches in.
        after_iteration: called after each training iteration.
    """

    def __init__(
        self,
        start: Callable[[list[Any], Mapping[str, Any]], PipelineSession | None],
        schedule_of: Callable[[bool, list[Any], int], Schedule],
        after_iteration: Callable[[], None] = lambda: None,
    ) -> None:
        self._start, self._schedule_of = start, schedule_of
        self.after_iteration = after_iteration
        self._lasting: list[Place] = []
        self._within: list[Place] = []
        self._session: PipelineSession | None = None
        self._model: Callable[[], Any] = lambda: None
        self._removed = self._said_other_model = False
        self._not_followed: set[str] = set()
        self._refused: set[str] = set()
        self._key = ""
        self._in_step = self._ran = False
        self._following = self._begun = self._at_end = self._inside = False
        self._expected: Sequence[Id] = ()
        self._position = 0
        self._launch: Callable[[Callable[[], Any]], Any] | None = None
        self._graphs: dict[type, Place] = {}
        self._chunk_of: dict[int, int] = {}
        self._forward_of: dict[int, tuple[int, int]] = {}

    # In and out.

    def put(self, module: ModuleType | type, name: str, wrap: Callable[[Function], Function]) -> None:
        """Put a wrapper in the place of a module's function, if it has one of this name, until `remove`."""
        self._lasting.append(Place(module, name, wrap))
        self._lasting[-1].put()

    def put_within(self, module: ModuleType, name: str, wrap: Callable[[Function], Function]) -> None:
        """As `put`, but only while a schedule of training is followed."""
        self._within.append(Place(module, name, wrap))

    def _put_again(self) -> None:
        """Somebody may have put back what was there before us."""
        for place in self._lasting:
            place.put()

    @property
    def removed(self) -> bool:
        """Whether they are gone for good."""
        return self._removed

    def remove(self) -> None:
        """Put back what was there, where nobody else has put something since."""
        self._removed, self._following = True, False
        for place in (*self._within, *self._lasting):
            place.take_out()
        self._forward_of.clear()

    # Iterations.

    def train_step(self, stock: Function) -> Function:
        """For `megatron.training.training.train_step`."""
        model_in = Argument(stock, "model", 2)

        def train_step(*args: Any, **kwargs: Any) -> Any:
            if self._in_step or self._removed:
                return stock(*args, **kwargs)
            self._put_again()
            session = self._session_for(model_in(args, kwargs), {})
            if session is None:
                return stock(*args, **kwargs)
            return self._step(session, lambda: stock(*args, **kwargs))

        return train_step

    def schedule(self, stock: Function, interleaved: bool) -> Function:
        """For one of the functions of `BRACKETS`."""
        forward_only_in, model_in = Argument(stock, "forward_only"), Argument(stock, "model")
        microbatches_in = Argument(stock, "num_microbatches")
        facts_in = {name: Argument(stock, name) for name in CALL_FACTS}

        def run_schedule(*args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                return stock(*args, **kwargs)

            if self._removed or self._following or captures():
                return run()
            self._put_again()
            if forward_only_in(args, kwargs):
                if self._session is not None:
                    self._session.evaluation()
                return run()
            model = model_in(args, kwargs)
            session = self._session_for(model, {name: fact(args, kwargs) for name, fact in facts_in.items()})
            if session is None:
                return run()

            def follow() -> Any:
                return self._follow(session, interleaved, _chunks(model), microbatches_in(args, kwargs), run)

            return follow() if self._in_step else self._step(session, follow)

        return run_schedule

    def full_graph(self, stock: Function) -> Function:
        """For the call of `full_cuda_graph.FullCudaGraphWrapper`, which stands before the schedule function."""

        def call(wrapper: Any, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                return stock(wrapper, *args, **kwargs)

            if self._removed or self._following:
                return run()
            if kwargs.get("forward_only"):
                if self._session is not None:
                    self._session.evaluation()
                return self._unseen(run)  # replayed or captured, it is no schedule that is followed either
            try:
                graph = wrapper.cuda_graph["training"]
                if graph is None and wrapper.curr_iter("training") != wrapper.cuda_graph_warmup_steps:
                    return run()  # it calls the schedule function
            except Exception as error:  # of another version; it may capture now
                graph = None
                self._say_not_followed(f"{type(wrapper).__name__}: {error!r}")
            model = kwargs.get("model")
            session = self._session_for(model, {name: kwargs.get(name) for name in CALL_FACTS})
            if session is None:
                return run()

            def follow() -> Any:
                again, self._ran = self._ran, True
                if graph is None or again:
                    session.evaluation()
                    return self._unseen(run)  # it is captured, where nothing of ours may be, or the same batch again
                return self._replay(session, graph, _chunks(model), kwargs.get("num_microbatches", 0), run)

            return follow() if self._in_step else self._step(session, follow)

        return call

    def _unseen(self, run: Callable[[], Any]) -> Any:
        self._following = self._inside = True
        try:
            return run()
        finally:
            self._following = self._inside = False

    def _replay(
        self, session: PipelineSession, graph: Any, model: list[Any], microbatches: int, run: Callable[[], Any]
    ) -> Any:
        """A step that is one CUDA graph. Where its GPU is emulated, that runs the schedule function once more."""
        kind = type(graph)
        place = self._graphs.setdefault(kind, Place(kind, "replay", self._launched))
        try:
            schedule = self._schedule_of(len(model) > 1, model, microbatches)
            place.put()
        except Exception as error:
            session.evaluation()
            result = self._unseen(run)
            self._say_not_followed(error)
            return result

        def launch(replay: Callable[[], Any]) -> Any:
            self._launch = None
            if not session.begin_schedule(schedule.key, schedule.stream_of, replayed=True):
                return replay()
            try:
                return self._followed(schedule, model, replay)
            finally:
                session.end_schedule()

        # Data is read before the launch: what is timed begins where the graph does.
        self._launch = launch
        try:
            return run()
        finally:
            self._launch = None
            place.take_out()

    def _launched(self, stock: Function) -> Function:
        """For the `replay` of a CUDA graph."""

        def replay(graph: Any, *args: Any, **kwargs: Any) -> Any:
            def run() -> Any:
                return stock(graph, *args, **kwargs)

            return run() if self._launch is None else self._launch(run)

        return replay

    def _session_for(self, model: Any, known: Mapping[str, Any]) -> PipelineSession | None:
        """The session, made at the first training iteration of a model; None for others as long as that one lives."""
        first = _chunks(model)[0]
        if self._session is None and not self._removed:
            self._session_starts(model, first, known)
        if self._session is None or self._removed:
            return None
        if self._model() is first:
            return self._session
        self._session.evaluation()
        if not self._said_other_model:
            self._said_other_model = True
            logger.warning(
                "a second model is trained in this process: its iterations run at full clocks and are not measured; "
                "only the model that was trained first is planned for, as long as it is there"
            )
        return None

    def _session_starts(self, model: Any, first: Any, known: Mapping[str, Any]) -> None:
        try:
            session = self._start(_chunks(model), known)
        except ConfigError:
            self.remove()
            raise
        if session is None:
            self.remove()
            return
        self._session = session
        session.on_close(lambda: self._session_ended(session))
        try:
            self._model = weakref.ref(first, lambda gone: self._model_gone(session))
        except TypeError:  # what cannot be watched stays
            self._model = lambda: first

    def _session_ended(self, session: PipelineSession) -> None:
        if session is self._session:
            self.remove()

    def _model_gone(self, session: PipelineSession) -> None:
        """With its model a session ends: the GPU is free at once, and the next model is planned for."""
        if session is self._session and not self._removed:
            self._session, self._said_other_model = None, False
        session.close()

    def _step(self, session: PipelineSession, run: Callable[[], Any]) -> Any:
        self._in_step, self._ran, self._at_end = True, False, False
        try:
            with iteration(session):
                try:
                    return run()
                finally:
                    if self._at_end:
                        session.tap.end()
                    session.end_schedule()
        finally:
            self._in_step = False
            self.after_iteration()

    def _follow(
        self, session: PipelineSession, interleaved: bool, model: list[Any], microbatches: int, run: Callable[[], Any]
    ) -> Any:
        if self._ran:  # the same batch again, to validate results or after an overflow
            session.evaluation()
            return run()
        self._ran = True
        try:
            schedule = self._schedule_of(interleaved, model, microbatches)
        except Exception as error:
            # Megatron may refuse it too, and the script may go on with another one; if not, it runs without us.
            session.evaluation()
            result = run()
            self._say_not_followed(error)
            return result
        if schedule.key in self._refused:
            session.evaluation()
            return run()
        if not session.begin_schedule(schedule.key, schedule.stream_of):
            return run()

        def run_to_the_end() -> Any:
            result = run()
            if self._following and self._position < len(self._expected):
                self._mismatch(f"it ended after {self._position} of {len(self._expected)} instructions")
            return result

        return self._followed(schedule, model, run_to_the_end)

    def _followed(self, schedule: Schedule, model: list[Any], run: Callable[[], Any]) -> Any:
        self._key, self._expected, self._position = schedule.key, schedule.expected, 0
        self._following, self._begun = True, False
        self._chunk_of = {id(chunk): number for number, chunk in enumerate(model)}
        for place in self._within:
            place.put()
        try:
            return run()
        finally:
            for place in self._within:
                place.take_out()
            self._following = self._inside = False
            self._forward_of.clear()

    def _say_not_followed(self, error: Exception | str) -> None:
        if str(error) not in self._not_followed:
            self._not_followed.add(str(error))
            logger.warning(
                "this schedule of Megatron is not one that perseus can follow (%s): its iterations run at full clocks, "
                "and training is not affected",
                error,
            )

    # Instructions. What runs within an instruction (a function that another tool has put around one of ours, and that
    # stands beneath one of ours again) is not seen twice.

    def forward_step(self, stock: Function) -> Function:
        """For `schedules.forward_step`."""
        model_in, microbatch_in = Argument(stock, "model", 2), Argument(stock, "current_microbatch")

        def forward_step(*args: Any, **kwargs: Any) -> Any:
            if not self._following or self._inside:
                return stock(*args, **kwargs)
            forward = microbatch_in(args, kwargs), self._chunk_of.get(id(model_in(args, kwargs)), -1)
            result = self._run(forward_id(*forward), stock, args, kwargs)
            self._remember(_first(result), forward)
            return result

        return forward_step

    def backward_step(self, stock: Function) -> Function:
        """For `schedules.backward_step`: the same tensor that a forward has returned says whose backward it is."""
        output_in = Argument(stock, "output_tensor", 1)

        def backward_step(*args: Any, **kwargs: Any) -> Any:
            if not self._following or self._inside:
                return stock(*args, **kwargs)
            return self._run(backward_id(*self._forward_with(output_in(args, kwargs))), stock, args, kwargs)

        return backward_step

    def combined_step(self, stock: Function) -> Function:
        """For `combined_1f1b.combined_forward_backward_step`: a forward, a backward, or both as one."""
        forward_model_in, backward_model_in = Argument(stock, "f_model"), Argument(stock, "b_model")
        microbatch_in, output_in = Argument(stock, "current_microbatch"), Argument(stock, "b_output_tensor")

        def combined_step(*args: Any, **kwargs: Any) -> Any:
            if not self._following or self._inside:
                return stock(*args, **kwargs)
            model = forward_model_in(args, kwargs)
            forward = None if model is None else (microbatch_in(args, kwargs), self._chunk_of.get(id(model), -1))
            of_forward = None if forward is None else forward_id(*forward)
            of_backward = None
            if backward_model_in(args, kwargs) is not None:
                of_backward = backward_id(*self._forward_with(output_in(args, kwargs)))
            instruction = _joined(of_forward, of_backward)
            # With transfers that overlap, waiting for the inputs is done within; it is no part of the instruction.
            waits = [name for name in ("pre_forward", "pre_backward") if kwargs.get(name) is not None]
            if waits:
                kwargs[waits[-1]] = self._beginning_after(kwargs[waits[-1]], instruction)
            result = self._run(None if waits else instruction, stock, args, kwargs)
            if forward is not None:
                self._remember(_first(result), forward)
            return result

        return combined_step

    def _beginning_after(self, wait: Function, instruction: Id) -> Function:
        def wait_and_begin(*args: Any, **kwargs: Any) -> Any:
            result = wait(*args, **kwargs)
            self._begin(instruction)
            return result

        return wait_and_begin

    def _run(self, instruction: Id | None, stock: Function, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run an instruction; None for one that begins within."""
        self._inside = True
        try:
            if instruction is not None:
                self._begin(instruction)
            result = stock(*args, **kwargs)
            self._end()
        finally:
            self._inside = False
        return result

    def _begin(self, instruction: Id) -> None:
        session = self._session
        if session is None or not self._following:
            return
        position = self._position
        expected = self._expected[position] if position < len(self._expected) else None
        if instruction != expected:
            wanted = "the end" if expected is None else _shown(expected)
            self._mismatch(f"its instruction {position} is {_shown(instruction)} instead of {wanted}")
            return
        self._begun = True
        session.tap.begin()

    def _end(self) -> None:
        session = self._session
        if session is None or not self._following:
            return
        if not self._begun:
            self._mismatch(f"its instruction {self._position} ended before it began")
            return
        session.tap.end()
        self._begun = False
        self._position += 1
        if self._position == len(self._expected):
            self._at_end = True
            session.tap.begin()  # what follows, up to the end of the step, is the end of the batch

    def _remember(self, output: Any, forward: tuple[int, int]) -> None:
        # By identity: the tensor lives until its backward, and another one may take its place only then.
        self._forward_of[id(_first(output))] = forward

    def _forward_with(self, output: Any) -> tuple[int, int]:
        return self._forward_of.pop(id(_first(output)), (-1, -1))

    def _mismatch(self, text: str) -> None:
        """What runs is not what is known: full clocks for the rest of the iteration, and for this schedule later on.

        Where somebody has taken our wrappers out in the middle of it, we have only not seen all: the next one may do.
        """
        self._following = self._at_end = False
        if self._session is not None:
            self._session.evaluation()
            self._session.end_schedule()
        if not any(place.displaced for place in self._within):
            self._refused.add(self._key)
            self._say_not_followed(f"{self._key}: {text}")


def _joined(forward: Id | None, backward: Id | None) -> Id:
    if forward is None or backward is None:
        return forward or backward or Id("nothing", -1, -1)
    return pair_id(forward, backward)


def _shown(instruction: Id) -> str:
    return f"{instruction.kind} of microbatch {instruction.microbatch}"


def _first(output: Any) -> Any:
    return output[0] if isinstance(output, (list, tuple)) and output else output


def _chunks(model: Any) -> list[Any]:
    return list(model) if isinstance(model, (list, tuple)) else [model]
