from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import pytest

from perseus_plugin.config import PerseusConfig
from perseus_plugin.errors import ConfigError, ScheduleError
from perseus_plugin.integrations.in_memory import InMemorySession, Iteration
from perseus_plugin.integrations.megatron.adapter import put_around
from perseus_plugin.integrations.megatron.hooks import Hooks, Schedule
from perseus_plugin.integrations.megatron.places import Argument
from perseus_plugin.integrations.megatron.schedule import Shape
from tests.factories import placement

SCHEDULE_FUNCTIONS = (
    "forward_backward_no_pipelining",
    "forward_backward_pipelining_without_interleaving",
    "forward_backward_pipelining_with_interleaving",
)
HOOKED = ("forward_step", "backward_step", *SCHEDULE_FUNCTIONS)


class Output:
    """Stands for a tensor."""


class Megatron:
    """Megatron as far as the hooks know it: modules whose functions look each other up as globals."""

    def __init__(self) -> None:
        self.schedules, self.training = ModuleType("schedules"), ModuleType("training")
        self.ran: list[str] = []
        self.fails_at = ""
        self.runs_per_step = 1
        self.order: Callable[[int], list[tuple[str, int]]] = lambda count: [
            step for m in range(count) for step in (("f", m), ("b", m))
        ]
        vars(self.schedules).update(
            forward_step=self.forward_step,
            backward_step=self.backward_step,
            forward_backward_no_pipelining=self.run_schedule,
            forward_backward_pipelining_without_interleaving=self.run_schedule,
        )
        vars(self.training).update(train_step=self.train_step)
        self.stock = {**vars(self.schedules), **vars(self.training)}
        self.microbatches = 2

    def _do(self, what: str) -> None:
        self.ran.append(what)
        if what == self.fails_at:
            raise RuntimeError("training failed")

    def forward_step(self, func: Any, data: Any, model: Any, count: int, *, current_microbatch: int) -> Any:
        self._do(f"forward {current_microbatch}")
        return [Output()], 0

    def backward_step(self, input_tensor: Any, output_tensor: Any, output_tensor_grad: Any, config: Any) -> str:
        self._do(f"backward {config}")
        return "gradient"

    def run_schedule(
        self, *, model: Any, num_microbatches: int, seq_length: int = 0, forward_only: bool = False
    ) -> str:
        outputs: dict[int, Any] = {}
        for kind, m in self.order(num_microbatches):
            if kind == "f":
                call = self.schedules.forward_step
                outputs[m], _ = call(None, None, model[0], num_microbatches, current_microbatch=m)
            elif not forward_only:
                self.schedules.backward_step(None, outputs[m], None, m)
        self._do("reduce")
        return "losses"

    def train_step(self, forward_step_func: Any, data_iterator: Any, model: Any) -> str:
        for _ in range(self.runs_per_step):
            run = self.schedules.forward_backward_no_pipelining
            losses = run(model=model, num_microbatches=self.microbatches, forward_only=False)
        self._do("step")
        return f"{losses} of {data_iterator}"

    # What a script does.

    def train(self, data: str = "x") -> Any:
        return self.training.train_step(None, data, self.model)

    def evaluate(self) -> Any:
        run = self.schedules.forward_backward_no_pipelining
        return run(model=self.model, num_microbatches=1, forward_only=True)

    @property
    def is_stock(self) -> bool:
        now = {**vars(self.schedules), **vars(self.training)}
        return all(now[name] == self.stock[name] for name in (*HOOKED, "train_step") if name in now)

    model: Any = (object(),)


TRAINED = ["forward 0", "backward 0", "forward 1", "backward 1", "reduce", "step"]


class Job:
    """Makes sessions for hooks."""

    def __init__(self) -> None:
        self.sessions: list[InMemorySession] = []
        self.error: Exception | None = None
        self.refuses = False
        self.iterations = 0

    def start(self, model: list[Any], known: Mapping[str, Any]) -> InMemorySession | None:
        self.known = dict(known)
        if self.error is not None:
            raise self.error
        if self.refuses:
            return None
        self.sessions.append(InMemorySession(PerseusConfig(), placement(0, 1, 1)))
        return self.sessions[-1]

    def schedule_of(self, interleaved: bool, model: list[Any], microbatches: int) -> Schedule:
        return Schedule.of(Shape(1, microbatches), 0)

    def after_iteration(self) -> None:
        self.iterations += 1

    def ran(self) -> list[Iteration]:
        """All iterations, of one session after the other."""
        return [one for session in self.sessions for one in session.iterations if one.over]

    def seen(self) -> list[bool]:
        """Which of them were seen whole."""
        return [one.complete for one in self.ran()]


class Graph:
    """Stands for `torch.cuda.CUDAGraph` on an emulated GPU: a replay is what was captured, once more."""

    def __init__(self, run: Callable[[], Any]) -> None:
        self._run = run

    def replay(self) -> None:
        self._run()


def full_graph_of(megatron: Megatron, warmup: int) -> tuple[type, Any]:
    """As Megatron's: around the schedule function of training, which it captures after some iterations."""

    class FullCudaGraphWrapper:
        cuda_graph: ClassVar[dict[str, Graph | None]] = {"training": None, "validation": None}
        ran = 0
        cuda_graph_warmup_steps = warmup

        def curr_iter(self, stage: str) -> int:
            return self.ran

        def __call__(self, **call: Any) -> str:
            stock = megatron.schedules.forward_backward_no_pipelining
            self.ran += 1
            if self.ran - 1 == warmup:
                self.cuda_graph["training"] = Graph(lambda: stock(**call))
                stock(**call)
            graph = self.cuda_graph["training"]
            if graph is None:
                return str(stock(**call))
            megatron.ran.append("data")
            graph.replay()
            return "losses"

    return FullCudaGraphWrapper, FullCudaGraphWrapper()


def hooked(schedules: ModuleType, training: ModuleType | None, combined: ModuleType | None, job: Job) -> Hooks:
    hooks = Hooks(job.start, job.schedule_of, job.after_iteration)
    put_around(hooks, schedules, training, combined)
    return hooks


@pytest.fixture
def job() -> Job:
    return Job()


@pytest.fixture
def megatron(job: Job) -> Megatron:
    made = Megatron()
    made.hooks = hooked(made.schedules, made.training, None, job)  # type: ignore[attr-defined]
    return made


def test_training_runs_the_same_and_is_seen_whole(megatron: Megatron, job: Job) -> None:
    for _ in range(2):
        assert megatron.train("x") == "losses of x"
    assert megatron.ran == 2 * TRAINED
    assert len(job.sessions) == 1, "a session starts once"
    assert job.seen() == [True, True]
    first = job.ran()[0]
    assert first.schedule == "no-pipelining/1x2"
    names = [getattr(op, "kind", None) or op.name for op in first.operations]  # type: ignore[union-attr]
    assert names == ["forward", "backward", "forward", "backward", "end_of_batch"]
    assert job.iterations == 2


def test_the_end_of_the_batch_reaches_to_the_end_of_the_step(megatron: Megatron, job: Job) -> None:
    ended: list[int] = []
    do = megatron._do

    def noting(what: str) -> None:
        do(what)
        ended.append(job.sessions[0].iterations[-1].ended)

    megatron._do = noting  # type: ignore[method-assign]
    megatron.train()
    assert ended[-1] == 4, "while the optimizer steps it has not ended"
    assert job.ran()[0].ended == 5


def test_evaluation_is_left_alone_at_full_clocks(megatron: Megatron, job: Job) -> None:
    assert megatron.evaluate() == "losses", "before training there is no session yet"
    assert job.sessions == []
    megatron.train()
    megatron.evaluate()
    assert job.sessions[0].full_clocks == 1
    assert job.seen() == [True]
    megatron.train()
    assert job.seen() == [True, True]


def test_a_rerun_of_the_same_batch_is_no_part_of_any_measurement(megatron: Megatron, job: Job) -> None:
    megatron.runs_per_step = 2
    megatron.train()
    assert megatron.ran == [*TRAINED[:-1], *TRAINED]
    (only,) = job.ran()
    assert only.complete
    assert not only.undisturbed
    assert not job.sessions[0].closed


def test_a_changed_number_of_microbatches_is_another_schedule(megatron: Megatron, job: Job) -> None:
    megatron.train()
    megatron.microbatches = 3
    megatron.train()
    assert [one.schedule for one in job.ran()] == ["no-pipelining/1x2", "no-pipelining/1x3"]


def test_a_loop_without_train_step_is_bracketed_by_the_schedule(job: Job) -> None:
    megatron = Megatron()
    hooked(megatron.schedules, None, None, job)
    run = megatron.schedules.forward_backward_no_pipelining
    assert run(model=megatron.model, num_microbatches=2, seq_length=64) == "losses"
    assert job.known["seq_length"] == 64, "there may be no arguments to know it from"
    assert job.seen() == [True]
    assert job.iterations == 1


@pytest.mark.parametrize("where", ["forward 1", "backward 0", "reduce", "step"])
def test_an_error_in_training_reaches_the_script_and_the_next_step_is_whole(
    megatron: Megatron, job: Job, where: str
) -> None:
    megatron.fails_at = where
    with pytest.raises(RuntimeError, match="training failed"):
        megatron.train()
    (failed,) = job.ran()
    assert not failed.undisturbed
    assert job.sessions[0].full_clocks > 0, "what a script does with the error, it does at full clocks"
    megatron.fails_at = ""
    assert megatron.train("y") == "losses of y"
    assert job.seen()[-1]
    assert not job.sessions[0].closed


@pytest.mark.parametrize("bracketed", [True, False])
def test_an_error_in_a_followed_iteration_leaves_full_clocks(job: Job, bracketed: bool) -> None:
    megatron = Megatron()
    hooked(megatron.schedules, megatron.training if bracketed else None, None, job)
    run = megatron.train if bracketed else lambda: megatron.schedules.forward_backward_no_pipelining(**call)
    call = {"model": megatron.model, "num_microbatches": 2}
    run()
    assert job.sessions[0].full_clocks == 0
    megatron.fails_at = "backward 1"
    with pytest.raises(RuntimeError, match="training failed"):
        run()
    full_clocks = job.sessions[0].full_clocks
    assert full_clocks > 0
    megatron.fails_at = ""
    run()
    assert job.sessions[0].full_clocks == full_clocks, "the next iteration goes on as ever"
    assert job.seen() == [True, False, True]


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([("f", 0), ("f", 1), ("b", 0), ("b", 1)], "its instruction 1 is forward of microbatch 1 instead"),
        ([("f", 0), ("b", 0)], "it ended after 2 of 4 instructions"),
        (
            [("f", 0), ("b", 0), ("f", 1), ("b", 1), ("f", 2)],
            "its instruction 4 is forward of microbatch 2 instead of the end",
        ),
    ],
)
def test_an_unknown_schedule_runs_at_full_clocks_and_is_said_once(
    megatron: Megatron, job: Job, caplog: pytest.LogCaptureFixture, order: list[tuple[str, int]], message: str
) -> None:
    stock_order = megatron.order
    megatron.order = lambda count: order
    for data in "xy":
        assert megatron.train(data) == f"losses of {data}"
    (said,) = [text for text in caplog.messages if "not one that perseus can follow" in text]
    assert f"no-pipelining/1x2: {message}" in said
    assert [(one.complete, one.undisturbed) for one in job.ran()] == [(False, False)] * 2
    assert not job.sessions[0].closed
    megatron.order, megatron.microbatches = stock_order, 3
    megatron.train()
    assert job.seen()[-1], "another schedule is followed"


def test_wrappers_taken_out_amid_a_schedule_cost_that_iteration(
    megatron: Megatron, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    do = megatron._do

    def taking_out(what: str) -> None:
        do(what)
        if what == "forward 0" and len(megatron.ran) == 1:
            megatron.schedules.forward_step = megatron.stock["forward_step"]  # type: ignore[attr-defined]

    megatron._do = taking_out  # type: ignore[method-assign]
    for _ in range(2):
        assert megatron.train() == "losses of x"
    assert megatron.ran == 2 * TRAINED
    assert job.seen() == [False, True]
    assert not caplog.records


def test_a_schedule_that_cannot_be_made_costs_its_iterations_only(
    megatron: Megatron, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    def schedule_of(interleaved: bool, model: list[Any], microbatches: int) -> Schedule:
        if microbatches == 1:
            raise ScheduleError("1 microbatch for 2 chunks")
        return Schedule.of(Shape(1, microbatches), 0)

    megatron.hooks._schedule_of = schedule_of  # type: ignore[attr-defined]
    megatron.train()
    megatron.microbatches = 1
    megatron.fails_at = "reduce"
    with pytest.raises(RuntimeError, match="training failed"):
        megatron.train()
    assert not caplog.records, "Megatron itself has refused it, in its own words"
    megatron.fails_at = ""
    for _ in range(2):
        assert megatron.train() == "losses of x"
    (record,) = caplog.records
    assert "1 microbatch for 2 chunks" in record.getMessage()
    megatron.microbatches = 2
    megatron.train()
    assert not job.sessions[0].closed
    assert job.seen() == [True, False, False, False, True]
    assert [one.undisturbed for one in job.ran()] == [True, False, False, False, True]


# Other people's functions.


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("name", ["forward_step", "backward_step", "forward_backward_no_pipelining", "train_step"])
@pytest.mark.parametrize("when", ["before", "after", "between steps", "within a step"])
def test_a_foreign_function_runs_as_often_as_without_us(job: Job, name: str, when: str, hooks: bool) -> None:
    """Five steps; the foreign function is there from the third at the latest, and taken out after the fourth."""
    megatron = Megatron()
    module = megatron.training if name == "train_step" else megatron.schedules
    stock = getattr(module, name)
    calls = 0

    def put() -> None:
        beneath = getattr(module, name)

        def foreign(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            return beneath(*args, **kwargs)

        setattr(module, name, foreign)

    if when == "before":
        put()
    if hooks:
        hooked(megatron.schedules, megatron.training, None, job)
    if when == "after":
        put()
    for _ in range(2):
        megatron.train()
    if when == "between steps":
        put()
    if when == "within a step":
        do = megatron._do

        def putting(what: str) -> None:
            do(what)
            if what == "forward 0" and not calls and getattr(module, name).__name__ != "foreign":
                put()

        megatron._do = putting  # type: ignore[method-assign]
    for _ in range(2):
        megatron.train()
    megatron._do = Megatron._do.__get__(megatron)  # type: ignore[method-assign]
    setattr(module, name, stock)
    for _ in range(2):
        megatron.train()
    per_step = 2 if name in ("forward_step", "backward_step") else 1
    # One that is put in within a step comes too late for the call that is running.
    missed = {"forward_step": 1, "backward_step": 0}.get(name, 1) if when == "within a step" else 0
    assert calls == per_step * (4 if when in ("before", "after") else 2) - missed
    assert megatron.ran == 6 * TRAINED
    if hooks:
        assert job.seen()[-1], "taking it out has not taken us out for good"
        assert not job.sessions[0].closed


def test_between_schedules_nothing_stands_in_the_place_of_instructions(megatron: Megatron, job: Job) -> None:
    seen: list[bool] = []
    do = megatron._do

    def looking(what: str) -> None:
        do(what)
        seen.append(megatron.schedules.forward_step == megatron.stock["forward_step"])

    megatron._do = looking  # type: ignore[method-assign]
    megatron.train()
    assert seen == [False] * 5 + [True]
    seen.clear()
    megatron.evaluate()
    assert all(seen)


# Several models.


class Model:
    """Something that can be watched."""


def test_a_second_model_runs_at_full_clocks_and_is_said_once(
    megatron: Megatron, job: Job, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = (Model(),), (Model(),)
    for model in (first, second, first, second):
        megatron.model = model
        assert megatron.train() == "losses of x"
    assert len(job.ran()) == 2
    assert len(job.sessions) == 1
    assert [r.getMessage() for r in caplog.records if "a second model" in r.getMessage()] != []
    assert len(caplog.records) == 1


def test_with_its_model_a_session_ends_and_the_next_model_has_one(megatron: Megatron, job: Job) -> None:
    """As in a job that is restarted in its process."""
    other = (Model(),)
    megatron.model = (Model(),)
    megatron.train()
    assert not job.sessions[0].closed
    megatron.model = other
    assert job.sessions[0].closed, "its GPU is free before another model is trained"
    for _ in range(2):
        assert megatron.train() == "losses of x"
    assert len(job.sessions) == 2
    assert not job.sessions[1].closed
    assert job.seen() == [True] * 3
    job.sessions[1].close()
    assert megatron.is_stock


@pytest.mark.parametrize("end", ["after a step", "amid a step", "refuse"])
def test_when_the_session_ends_megatron_is_the_stock_one(megatron: Megatron, job: Job, end: str) -> None:
    job.refuses = end == "refuse"
    step = megatron.training.train_step  # what a loop holds on to
    if end == "amid a step":
        stock = megatron._do

        def failing(what: str) -> None:
            stock(what)
            if what == "forward 1":
                job.sessions[0].close()

        megatron._do = failing  # type: ignore[method-assign]
    assert megatron.train("x") == "losses of x"
    if end == "after a step":
        job.sessions[0].close()
    assert megatron.is_stock
    assert step(None, "y", megatron.model) == "losses of y"
    assert megatron.train("z") == "losses of z"
    assert megatron.ran == 3 * TRAINED
    assert len(job.sessions) == (0 if end == "refuse" else 1)


def test_what_another_tool_put_around_ours_is_kept(megatron: Megatron, job: Job) -> None:
    ours = megatron.schedules.forward_step
    calls: list[str] = []

    def profiled(*args: Any, **kwargs: Any) -> Any:
        calls.append("profiled")
        return ours(*args, **kwargs)

    megatron.schedules.forward_step = profiled  # type: ignore[attr-defined]
    megatron.train()
    job.sessions[0].close()
    assert megatron.schedules.forward_step is profiled
    megatron.train()
    assert len(calls) == 4


def test_a_tool_that_comes_and_goes_leaves_no_layers_of_ours(megatron: Megatron) -> None:
    megatron.train()
    ours = megatron.training.train_step
    for _ in range(3):
        for _ in range(6):
            megatron.training.train_step = lambda *args: ours(*args)  # type: ignore[attr-defined]
            megatron.train()
            megatron.training.train_step = ours  # type: ignore[attr-defined]
        megatron.train()
        assert megatron.training.train_step is ours
    assert megatron.ran == 22 * TRAINED


def test_a_compiled_function_that_tells_no_signature_is_wrapped() -> None:
    microbatch = Argument(dict.update, "model", 2)  # what is built in may have none
    assert microbatch((1, 2, 3), {}) == 3
    assert microbatch((1,), {"model": 4}) == 4


def test_a_setting_that_does_not_fit_the_job_stops_it(megatron: Megatron, job: Job) -> None:
    job.error = ConfigError("perseus.emulation.forward_time_s: got 1 numbers")
    with pytest.raises(ConfigError, match="got 1 numbers"):
        megatron.train()
    assert megatron.is_stock


def test_functions_that_a_version_lacks_are_no_trouble(megatron: Megatron) -> None:
    assert not hasattr(megatron.schedules, SCHEDULE_FUNCTIONS[2])
    hooks = Hooks(lambda model, known: None, lambda *args: None)  # type: ignore[arg-type, return-value]
    hooks.put(megatron.schedules, "no_such_function", hooks.forward_step)
    assert not hasattr(megatron.schedules, "no_such_function")


def test_arguments_are_found_however_they_are_passed() -> None:
    def function(model: Any, config: Any, microbatch: Any = None) -> None: ...

    microbatch, missing = Argument(function, "microbatch"), Argument(function, "vp_stage")
    assert microbatch((1, 2, 3), {}) == 3
    assert microbatch((1, 2), {"microbatch": 4}) == 4
    assert microbatch((1,), {"config": 2}) is None
    assert missing((1, 2, 3), {}) is None
    assert missing((1, 2, 3, 4), {}) is None

    def wrapper(*args: Any, **kwargs: Any) -> None: ...

    def keyword_only(*args: Any, model: Any) -> None: ...

    for function_of in (wrapper, keyword_only):
        model = Argument(function_of, "model")
        assert model((1, 2, 3), {}) is None, "a position that is not known is not guessed"
        assert model((1,), {"model": 4}) == 4


def combined_module(ran: list[Any]) -> ModuleType:
    def combined_forward_backward_step(f_model, b_model, b_output_tensor, current_microbatch, pre_backward=None):  # type: ignore[no-untyped-def]
        if pre_backward is not None:
            pre_backward()
        ran.append((f_model is not None, b_model is not None))
        return Output(), 0, None

    module = ModuleType("combined_1f1b")
    module.combined_forward_backward_step = combined_forward_backward_step  # type: ignore[attr-defined]
    return module


@pytest.mark.parametrize("overlap", [False, True])
def test_a_forward_and_a_backward_as_one_are_one_instruction(job: Job, overlap: bool) -> None:
    megatron, ran = Megatron(), []  # type: ignore[var-annotated]
    module = combined_module(ran)
    job.schedule_of = lambda *args: Schedule.of(Shape(1, 3, pairs=True), 0)  # type: ignore[method-assign]
    waited: list[bool] = []

    def run_schedule(*, model: Any, num_microbatches: int) -> None:
        chunk, output = model[0], None
        waits = {"pre_backward": lambda: waited.append(True)} if overlap else {}
        for m in range(num_microbatches + 1):
            forward = chunk if m < num_microbatches else None
            step = module.combined_forward_backward_step
            output, _, _ = step(forward, chunk if m else None, output, m if forward else None, **(waits if m else {}))

    megatron.schedules.forward_backward_no_pipelining = run_schedule  # type: ignore[attr-defined]
    hooked(megatron.schedules, None, module, job)
    megatron.schedules.forward_backward_no_pipelining(model=megatron.model, num_microbatches=3)
    (only,) = job.ran()
    assert only.complete
    kinds = [op.kind for op in only.operations[:-1]]  # type: ignore[union-attr]
    assert kinds == ["forward", "forward_backward", "forward_backward", "backward"]
    assert ran == [(True, False), (True, True), (True, True), (False, True)]
    assert len(waited) == (3 if overlap else 0)
    assert not job.sessions[0].closed


def test_a_full_graph_is_followed_until_it_is_captured_and_timed_from_then_on() -> None:
    """On an emulated GPU, where a replay runs the schedule function: the tap has it take its time, and sees nothing."""
    megatron, job = Megatron(), Job()
    hooks = hooked(megatron.schedules, megatron.training, None, job)
    kind, wrapper = full_graph_of(megatron, warmup=2)
    hooks.put(kind, "__call__", hooks.full_graph)
    stock_replay = Graph.replay

    def train_step(forward_step_func: Any, data_iterator: Any, model: Any) -> str:
        losses = wrapper(model=model, num_microbatches=2, seq_length=4, forward_only=False)
        return f"{losses} of {data_iterator}"

    megatron.training.train_step = train_step  # type: ignore[attr-defined]
    assert [megatron.train() for _ in range(5)] == ["losses of x"] * 5
    seen = job.ran()
    assert [one.replayed for one in seen] == [False, False, False, True, True]
    assert [bool(one.schedule) for one in seen] == [True, True, False, True, True], "nothing of it may be captured"
    assert [one.complete for one in seen[:3]] == [True, True, False]
    assert [one.ended for one in seen[3:]] == [len(one.operations) - 1 for one in seen[3:]], "all but the batch's end"
    assert [one.undisturbed for one in seen] == [True, True, False, True, True]
    assert Graph.replay is stock_replay
    assert wrapper(model=megatron.model, num_microbatches=1, forward_only=True) == "losses"
    assert job.sessions[0].full_clocks == 2, "validation, and the capture"
    job.sessions[0].close()
    assert megatron.train() == "losses of x"
    assert len(job.ran()) == 5


def graphed(megatron: Megatron, job: Job, kind: type, wrapper: Any, runs: int = 1) -> Hooks:
    def train_step(forward_step_func: Any, data_iterator: Any, model: Any) -> str:
        return str([wrapper(model=model, num_microbatches=2, forward_only=False) for _ in range(runs)])

    megatron.training.train_step = train_step  # type: ignore[attr-defined]
    hooks = hooked(megatron.schedules, megatron.training, None, job)
    hooks.put(kind, "__call__", hooks.full_graph)
    return hooks


def test_the_same_batch_again_in_a_graph_is_no_part_of_any_measurement() -> None:
    megatron, job = Megatron(), Job()
    graphed(megatron, job, *full_graph_of(megatron, warmup=1), runs=2)
    for _ in range(3):
        megatron.train()
    assert [(one.replayed, one.undisturbed) for one in job.ran()] == [(False, False), (True, False), (True, False)]


class FixedType(type):
    """Of what a compiled class may be like."""

    def __setattr__(cls, name: str, value: Any) -> None:
        raise TypeError("immutable")


class FixedGraph(metaclass=FixedType):
    def replay(self) -> None: ...


class OtherWrapper:
    """Of a version that captures in another way."""

    def __call__(self, **call: Any) -> str:
        return "losses"


class FixedGraphWrapper(OtherWrapper):
    cuda_graph: ClassVar[dict[str, Any]] = {"training": FixedGraph()}


@pytest.mark.parametrize("kind", [OtherWrapper, FixedGraphWrapper])
def test_a_graph_of_another_version_runs_at_full_clocks_and_that_is_said_once(
    caplog: pytest.LogCaptureFixture, kind: type
) -> None:
    megatron, job = Megatron(), Job()
    hooks = graphed(megatron, job, kind, kind())
    assert [megatron.train() for _ in range(2)] == ["['losses']"] * 2
    assert [(one.schedule, one.undisturbed) for one in job.ran()] == [("", False)] * 2
    (message,) = caplog.messages
    assert "is not one that perseus can follow" in message
    hooks.remove()


def test_nothing_of_ours_is_captured(megatron: Megatron, job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    """By whomever: a loop of one's own need not use Megatron's wrapper."""
    megatron.train()
    monkeypatch.setattr("torch.cuda.is_initialized", lambda: True)
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: True)
    assert megatron.train() == "losses of x"
    assert [bool(one.schedule) for one in job.ran()] == [True, False]
