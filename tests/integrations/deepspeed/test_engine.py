from __future__ import annotations

import copy
import gc
import json
import logging
import math
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import perseus_plugin
from perseus_plugin.config import PerseusConfig
from perseus_plugin.errors import ConfigError, GpuError
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.integrations.deepspeed.adapter import patch_engine_module
from perseus_plugin.integrations.in_memory import InMemorySession, sessions_in_memory


class LoadMicroBatch:
    def __init__(self, buffer_id: int) -> None:
        self.buffer_id = buffer_id


class ForwardPass(LoadMicroBatch):
    pass


class BackwardPass(LoadMicroBatch):
    pass


class SendActivation(LoadMicroBatch):
    pass


class OptimizerStep:
    pass


class Schedule:
    """One stage, all forwards, then all backwards."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.micro_batches, self.stages, self.stage_id = micro_batches, stages, stage_id

    def steps(self) -> Iterator[list[Any]]:
        for i in range(self.micro_batches):
            yield [LoadMicroBatch(i), ForwardPass(i)]
        for i in range(self.micro_batches):
            yield [BackwardPass(i)]
        yield [OptimizerStep()]


class EvalSchedule(Schedule):
    """Forwards only."""

    def steps(self) -> Iterator[list[Any]]:
        for i in range(self.micro_batches):
            yield [LoadMicroBatch(i), ForwardPass(i)]


class Engine:
    """A DeepSpeed engine, as far as the integration knows it."""

    global_rank, world_size, stage_id, num_stages, local_rank, device = 0, 2, 0, 2, 0, "cpu"
    global_samples = 32

    def __init__(self, block: Any = None, micro_batches: int = 2, config_class: Any = None) -> None:
        self._config = config_class or SimpleNamespace(_param_dict={} if block is None else {"perseus": block})
        self.grid = SimpleNamespace(get_data_parallel_id=lambda: 0)
        self.micro_batches = micro_batches
        self.ran: list[str] = []
        self.map_seen: dict[type, Any] = {}
        self.fails_at = ""
        self.module = torch.nn.Linear(2, 3)

    def train_micro_batch_size_per_gpu(self) -> int:
        return 4

    def train_batch_size(self) -> int:
        return 4 * self.micro_batches

    def zero_optimization_stage(self) -> int:
        return 1

    def train_batch(self, data_iter: Any = None) -> str:
        """Stock training."""
        self._exec_schedule(Schedule(self.micro_batches, 1, 0))
        return f"loss of {data_iter}"

    def eval_batch(self) -> str:
        self._exec_schedule(EvalSchedule(self.micro_batches, 1, 0))
        return "evaluated"

    def _exec_schedule(self, schedule: Schedule) -> None:
        self.map_seen = dict(self._INSTRUCTION_MAP)
        for step in schedule.steps():
            for instruction in step:
                self._INSTRUCTION_MAP[type(instruction)].__get__(self)(**vars(instruction))

    def _do(self, what: str) -> None:
        self.ran.append(what)
        if what == self.fails_at:
            raise RuntimeError("training failed")

    _INSTRUCTION_MAP: ClassVar[dict[type, Callable[..., None]]] = {
        LoadMicroBatch: lambda self, buffer_id: self._do(f"load {buffer_id}"),
        ForwardPass: lambda self, buffer_id: self._do(f"forward {buffer_id}"),
        BackwardPass: lambda self, buffer_id: self._do(f"backward {buffer_id}"),
        SendActivation: lambda self, buffer_id: self._do(f"send {buffer_id}"),
        OptimizerStep: lambda self: self._do("step"),
    }


STOCK_MAP = dict(Engine._INSTRUCTION_MAP)
TRAINED = ["load 0", "forward 0", "load 1", "forward 1", "backward 0", "backward 1", "step"]


Started = list[InMemorySession]


@pytest.fixture
def started() -> Iterator[Started]:
    """The sessions that were started."""
    with sessions_in_memory() as sessions:
        yield sessions


def seen(started: Started) -> list[bool]:
    """Which iterations of the newest session were seen whole."""
    return [one.complete for one in started[-1].iterations if one.over]


@pytest.fixture
def engine(started: Started) -> Engine:
    """An engine with a session."""
    made = Engine({"enabled": True})
    assert perseus_plugin.enable(made) is started[0]
    return made


def stock(engine: Engine) -> bool:
    """Whether the engine is as DeepSpeed made it."""
    return not {"train_batch", "_exec_schedule", "_INSTRUCTION_MAP", "_perseus_session"} & vars(engine).keys()


# Enabling.


@pytest.mark.parametrize("block", [None, {"enabled": False}])
def test_without_the_block_or_disabled_no_trace_is_left(started: Started, block: Any) -> None:
    engine = Engine(block)
    assert perseus_plugin.enable(engine) is None
    assert stock(engine)
    assert started == []
    engine.train_batch()
    assert engine.map_seen == STOCK_MAP


def test_the_block_can_be_given_as_dict_file_or_config(started: Started, tmp_path: Path) -> None:
    path = tmp_path / "perseus.json"
    path.write_text(json.dumps({"slowdown": 0.2}))
    for config in ({"slowdown": 0.2}, path, str(path), PerseusConfig(slowdown=0.2)):
        assert perseus_plugin.enable(Engine({"slowdown": 9.0}), config) is not None
    assert [session.config.slowdown for session in started] == [0.2] * 4
    assert perseus_plugin.enable(Engine({"enabled": True}), {"enabled": False}) is None


def test_enabling_twice_gives_the_session_there_is(engine: Engine, started: Started) -> None:
    assert perseus_plugin.enable(engine, {"slowdown": 0.5}) is started[0]
    assert len(started) == 1


def test_an_engine_without_a_pipeline_is_refused(started: Started) -> None:
    with pytest.raises(ConfigError, match="enable: got a SimpleNamespace; allowed: a DeepSpeed PipelineEngine"):
        perseus_plugin.enable(SimpleNamespace(), {})


@pytest.mark.parametrize("config", [{"slow": 1}, "missing.yaml", 7, ["enabled"]])
def test_a_wrong_block_is_a_config_error(started: Started, config: Any) -> None:
    engine = Engine()
    with pytest.raises(ConfigError):
        perseus_plugin.enable(engine, config)
    assert stock(engine)


def test_the_placement_is_the_engines(engine: Engine, started: Started) -> None:
    engine = Engine({"enabled": True})
    vars(engine).update(global_rank=5, world_size=8, stage_id=1, num_stages=4, local_rank=2, device="cuda:2")
    engine.grid.get_data_parallel_id = lambda: 1
    perseus_plugin.enable(engine)
    assert started[-1].placement == Placement(
        rank=5, world_size=8, stage=1, stages=4, replica=1, local_rank=2, device="cuda:2"
    )


def test_model_parallel_ranks_are_shards(engine: Engine, started: Started) -> None:
    engine = Engine({"enabled": True})
    vars(engine).update(global_rank=5, world_size=8, stage_id=1, num_stages=2)
    engine.grid.data_parallel_size = 2
    perseus_plugin.enable(engine)
    placed = started[-1].placement
    assert (placed.shards, placed.replicas) == (2, 2)


def test_jobs_that_differ_have_different_facts(started: Started) -> None:
    first, second, wider, half = (Engine({"enabled": True}) for _ in range(4))
    wider.module = torch.nn.Linear(2, 4)
    half.module = torch.nn.Linear(2, 3).half()
    larger = Engine({"enabled": True})
    vars(larger)["train_micro_batch_size_per_gpu"] = lambda: 8
    for engine in (first, second, wider, half, larger):
        perseus_plugin.enable(engine)
    assert started[0].facts == started[1].facts
    assert len({json.dumps(session.facts, sort_keys=True) for session in started}) == 4


def test_the_samples_of_an_iteration_are_no_part_of_what_a_job_is(started: Started) -> None:
    for microbatches in (2, 3):
        perseus_plugin.enable(Engine({"enabled": True}, microbatches))
    assert [session.about for session in started] == [{"samples per iteration": str(samples)} for samples in (8, 12)]
    assert started[0].facts == started[1].facts, "a kept profile is of use with any number of microbatches"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (OSError(24, "Too many open files", "/x"), "it could not start: /x: Too many open files (raise the limit"),
        (GpuError("the GPU is lost"), "it could not start: the GPU is lost; training goes on at full clocks"),
        (KeyError("x"), "it could not start; training goes on at full clocks. This is a fault of perseus_plugin or"),
    ],
)
def test_a_session_that_cannot_start_leaves_training_as_it_was(
    caplog: pytest.LogCaptureFixture, error: Exception, text: str
) -> None:
    engine = Engine({"enabled": True})
    with sessions_in_memory(error):
        assert perseus_plugin.enable(engine) is None
    assert stock(engine)
    assert text in caplog.text
    assert ("Traceback" in caplog.text) == isinstance(error, KeyError)
    assert engine.train_batch("x") == "loss of x"


def test_a_setting_that_does_not_fit_the_job_stops_it() -> None:
    error = ConfigError("perseus.emulation.forward_time_s: got 1 numbers")
    with sessions_in_memory(error), pytest.raises(ConfigError, match="got 1 numbers"):
        perseus_plugin.enable(Engine({"enabled": True}))


# Hooks.


def test_training_runs_the_same_instructions_and_is_seen_whole(engine: Engine, started: Started) -> None:
    for _ in range(2):
        assert engine.train_batch("x") == "loss of x"
    assert engine.ran == 2 * TRAINED
    assert seen(started) == [True, True]
    first = started[0].iterations[0]
    assert first.schedule == "Schedule/1x2"
    names = [getattr(op, "kind", None) or op.name for op in first.operations]  # type: ignore[union-attr]
    assert names == [*["load_microbatch", "forward"] * 2, "backward", "backward", "optimizer_step"]


def test_only_what_takes_time_is_hooked_and_only_while_training(engine: Engine) -> None:
    engine.train_batch()
    hooked = {kind for kind, function in engine.map_seen.items() if function is not STOCK_MAP[kind]}
    assert hooked == {LoadMicroBatch, ForwardPass, BackwardPass, OptimizerStep}
    assert "_INSTRUCTION_MAP" not in vars(engine), "afterwards the map is the class's"
    assert type(engine)._INSTRUCTION_MAP == STOCK_MAP
    other = Engine()
    other.train_batch()
    assert other.map_seen == STOCK_MAP, "another engine is left alone"


def test_evaluation_runs_the_stock_functions_at_full_clocks(engine: Engine, started: Started) -> None:
    engine.train_batch()
    assert engine.eval_batch() == "evaluated"
    assert engine.map_seen == STOCK_MAP
    assert started[0].full_clocks == 1
    assert seen(started) == [True]
    engine.train_batch()
    assert seen(started) == [True, True]


def test_a_changed_number_of_microbatches_is_another_schedule(engine: Engine, started: Started) -> None:
    engine.train_batch()
    engine.micro_batches = 3
    engine.train_batch()
    assert [one.schedule for one in started[0].iterations] == ["Schedule/1x2", "Schedule/1x3"]
    stream_of = started[0].iterations[1].stream_of
    assert len(stream_of(0)) == 3 * 3 + 1
    assert stream_of(0) is stream_of(0), "streams are made once"


@pytest.mark.parametrize("where", ["load 0", "forward 1", "backward 0", "step"])
def test_an_error_in_training_reaches_the_script_and_the_next_batch_is_whole(
    engine: Engine, started: Started, where: str
) -> None:
    engine.fails_at = where
    with pytest.raises(RuntimeError, match="training failed"):
        engine.train_batch()
    assert "_INSTRUCTION_MAP" not in vars(engine)
    engine.fails_at = ""
    assert engine.train_batch("y") == "loss of y"
    assert seen(started) == [False, True]
    engine.eval_batch()
    assert engine.map_seen == STOCK_MAP


@pytest.mark.parametrize("where", ["forward 1", "loss"])
def test_an_error_in_training_leaves_full_clocks(started: Started, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    engine = Engine({"enabled": True})
    stock_train = Engine.train_batch

    def train_batch(self: Engine, data_iter: Any = None) -> str:
        loss = stock_train(self, data_iter)
        self._do("loss")
        return loss

    monkeypatch.setattr(Engine, "train_batch", train_batch)
    perseus_plugin.enable(engine)
    engine.fails_at = where
    with pytest.raises(RuntimeError, match="training failed"):
        engine.train_batch()
    assert started[0].full_clocks > 0
    (failed,) = started[0].iterations
    assert failed.over
    assert not failed.undisturbed


def test_when_the_session_ends_the_engine_is_the_stock_one(engine: Engine, started: Started) -> None:
    engine.train_batch()
    started[0].close()
    assert stock(engine)
    engine.ran = []
    assert engine.train_batch("z") == "loss of z"
    assert engine.ran == TRAINED
    assert engine.map_seen == STOCK_MAP


def test_a_session_does_not_keep_its_engine_alive(started: Started) -> None:
    engine = Engine(block={"enabled": True})
    assert perseus_plugin.enable(engine) is started[0]
    engine.train_batch()
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None, "the engine's memory would stay taken"
    assert started[0].closed, "the helper would keep the GPU from the next engine"


def test_a_session_that_ends_amid_a_batch_lets_it_finish(engine: Engine, started: Started) -> None:
    stock_forward = Engine._do

    def failing(self: Engine, what: str) -> None:
        stock_forward(self, what)
        if what == "forward 1":
            started[0].close()

    vars(engine)["_do"] = failing.__get__(engine)
    assert engine.train_batch("x") == "loss of x"
    assert engine.ran == TRAINED
    assert stock(engine)


def test_what_another_tool_put_on_the_instance_is_kept(started: Started) -> None:
    engine = Engine({"enabled": True})
    calls: list[str] = []
    plain = engine.train_batch

    def profiled(*args: Any) -> str:
        calls.append("profiled")
        return plain(*args)

    vars(engine)["train_batch"] = profiled
    perseus_plugin.enable(engine)
    engine.train_batch("a")
    started[0].close()
    engine.train_batch("b")
    assert calls == ["profiled"] * 2
    assert vars(engine)["train_batch"] is profiled


def test_what_another_tool_put_around_ours_is_kept(engine: Engine, started: Started) -> None:
    calls: list[str] = []
    ours = engine.train_batch

    def profiled(*args: Any) -> str:
        calls.append("profiled")
        return ours(*args)

    vars(engine)["train_batch"] = profiled
    engine.train_batch("a")
    started[0].close()
    assert engine.train_batch("b") == "loss of b"
    assert calls == ["profiled"] * 2
    assert engine.ran == 2 * TRAINED
    assert engine.map_seen == STOCK_MAP


# Other people's functions.


class Foreign:
    """Another tool's function for the step of the optimizer: counts its calls, then does what it has replaced."""

    def __init__(self) -> None:
        self.calls = 0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def foreign(engine: Engine, **kwargs: Any) -> Any:
            self.calls += 1
            return function(engine, **kwargs)

        return foreign


def on_the_instance(engine: Engine, function: Callable[..., Any]) -> None:
    engine._INSTRUCTION_MAP = {**engine._INSTRUCTION_MAP, OptimizerStep: function}  # type: ignore[misc]


def in_the_instances_map(engine: Engine, function: Callable[..., Any]) -> None:
    vars(engine).setdefault("_INSTRUCTION_MAP", dict(engine._INSTRUCTION_MAP))
    engine._INSTRUCTION_MAP[OptimizerStep] = function


def on_the_class(engine: Engine, function: Callable[..., Any]) -> None:
    type(engine)._INSTRUCTION_MAP = {**type(engine)._INSTRUCTION_MAP, OptimizerStep: function}


def in_the_classes_map(engine: Engine, function: Callable[..., Any]) -> None:
    type(engine)._INSTRUCTION_MAP[OptimizerStep] = function


WAYS = [on_the_instance, in_the_instances_map, on_the_class, in_the_classes_map]


@pytest.fixture
def own_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "_INSTRUCTION_MAP", dict(STOCK_MAP))


@pytest.mark.usefixtures("own_map")
@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("put", WAYS)
@pytest.mark.parametrize("when", ["before attach", "after attach", "between batches", "amid a batch"])
def test_a_foreign_function_runs_as_often_as_without_us(
    started: Started, put: Callable[..., None], when: str, hooked: bool
) -> None:
    """Five batches; put in before the third at the latest, taken out after the fourth."""
    engine, foreign = Engine({"enabled": hooked}), Foreign()
    stock_step = STOCK_MAP[OptimizerStep]
    if when == "before attach":
        put(engine, foreign.around(stock_step))
    perseus_plugin.enable(engine)
    if when == "after attach":
        put(engine, foreign.around(stock_step))
    for _ in range(2):
        engine.train_batch()
    if when == "between batches":
        put(engine, foreign.around(stock_step))
    if when == "amid a batch":
        stock_do = engine._do

        def do(what: str) -> None:
            stock_do(what)
            if what == "forward 1" and not foreign.calls:
                put(engine, foreign.around(engine._INSTRUCTION_MAP[OptimizerStep]))

        vars(engine)["_do"] = do
    for _ in range(2):
        engine.train_batch()
    assert engine._INSTRUCTION_MAP[OptimizerStep] is not stock_step, "what was put in is still there"
    if when != "amid a batch":
        assert ("_INSTRUCTION_MAP" in vars(engine)) == (put in (on_the_instance, in_the_instances_map))
    put(engine, stock_step)
    engine.train_batch()
    assert foreign.calls == (4 if when in ("before attach", "after attach") else 2)
    assert engine.ran == 5 * TRAINED
    if hooked:
        assert seen(started)[-2:] == [True, True]


@pytest.mark.usefixtures("own_map")
@pytest.mark.parametrize("put", WAYS)
def test_a_foreign_function_that_fails_stays_where_it_was(
    engine: Engine, started: Started, put: Callable[..., None]
) -> None:
    def failing(engine: Engine) -> None:
        raise RuntimeError("the tool's own fault")

    put(engine, failing)
    with pytest.raises(RuntimeError, match="the tool's own fault"):
        engine.train_batch()
    assert engine._INSTRUCTION_MAP[OptimizerStep] is failing
    assert not started[0].closed


def test_functions_that_read_the_map_during_a_batch_see_what_is_beneath(engine: Engine) -> None:
    seen: dict[str, Any] = {}
    stock_do = engine._do

    def do(what: str) -> None:
        stock_do(what)
        seen["copy"] = engine._INSTRUCTION_MAP.copy()
        seen["length"] = len(engine._INSTRUCTION_MAP)
        seen["keys"] = set(engine._INSTRUCTION_MAP)

    vars(engine)["_do"] = do
    engine.train_batch()
    assert seen == {"copy": STOCK_MAP, "length": len(STOCK_MAP), "keys": set(STOCK_MAP)}


@pytest.mark.parametrize(
    "join", [lambda m, new: m | new, lambda m, new: new | m, operator.ior, lambda m, new: copy.copy(m)]
)
def test_a_map_is_joined_and_copied_during_a_batch_as_any_other(
    engine: Engine, own_map: None, join: Callable[[Any, Any], Any]
) -> None:
    stock_do, new = engine._do, {SendActivation: lambda self, buffer_id: None}

    def do(what: str) -> None:
        stock_do(what)
        vars(engine)["_INSTRUCTION_MAP"] = join(engine._INSTRUCTION_MAP, new)

    vars(engine)["_do"] = do
    for _ in range(2):
        engine.train_batch()
    assert engine.ran == 2 * TRAINED


def test_a_forks_schedule_may_be_passed_by_name_and_with_more(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = Engine._exec_schedule

    def of_fork(self: Engine, pipe_schedule: Schedule, profile: bool = False) -> None:
        stock(self, pipe_schedule)

    monkeypatch.setattr(Engine, "_exec_schedule", of_fork)
    engine._exec_schedule(pipe_schedule=Schedule(2, 1, 0), profile=True)  # type: ignore[call-arg]
    assert engine.ran == TRAINED


@pytest.mark.parametrize("hooked", [False, True])
@pytest.mark.parametrize("name", ["train_batch", "_exec_schedule"])
@pytest.mark.parametrize("place", ["class", "instance"])
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_foreign_methods_run_as_often_as_without_us(
    started: Started, monkeypatch: pytest.MonkeyPatch, place: str, name: str, when: str, hooked: bool
) -> None:
    """Two batches with the foreign method, two without it again."""
    engine, calls = Engine({"enabled": hooked}), 0

    def put() -> None:
        owner: Any = Engine if place == "class" else engine
        before = getattr(owner, name)

        def foreign(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return before(*args)

        monkeypatch.setattr(owner, name, foreign)

    if when == "before attach":
        put()
    perseus_plugin.enable(engine)
    if when == "after attach":
        put()
    for batch in range(4):
        if batch == 2:
            monkeypatch.setattr(*((Engine if place == "class" else engine), name, _without(engine, name, place)))
        assert engine.train_batch(batch) == f"loss of {batch}"
    assert calls == 2
    assert engine.ran == 4 * TRAINED
    if hooked:
        assert seen(started)[-1], "taking it out has not taken us out for good"


STOCK_METHODS = {name: vars(Engine)[name] for name in ("train_batch", "_exec_schedule")}


def _without(engine: Engine, name: str, place: str) -> Any:
    """What a tool puts back that has saved the class's own function."""
    return STOCK_METHODS[name] if place == "class" else STOCK_METHODS[name].__get__(engine)


def test_a_class_method_replaced_in_mid_training_is_what_runs(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.train_batch()
    monkeypatch.setattr(Engine, "train_batch", lambda self, data_iter=None: "another loop")
    assert engine.train_batch() == "another loop"


# Schedules of forks.


def test_a_tool_that_comes_and_goes_leaves_nothing_of_ours_behind(engine: Engine) -> None:
    ours, gone = engine._exec_schedule, []
    for _ in range(5):

        def around(schedule: Any) -> None:
            ours(schedule)

        gone.append(weakref.ref(around))
        vars(engine)["_exec_schedule"] = around
        engine.train_batch()
        vars(engine)["_exec_schedule"] = ours
        del around
    assert engine.ran == 5 * TRAINED
    gc.collect()
    assert [tool() for tool in gone] == 5 * [None]


class Ahead(Schedule):
    """Wants one argument more."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int, ahead: int) -> None:
        super().__init__(micro_batches, stages, stage_id)
        self.ahead = ahead


class Shapeless(Schedule):
    """Does not say how many microbatches it has."""

    def __init__(self, micro_batches: int, stages: int, stage_id: int) -> None:
        self.count = micro_batches

    def steps(self) -> Iterator[list[Any]]:
        yield [LoadMicroBatch(0), ForwardPass(0), BackwardPass(0), OptimizerStep()]


class Unmatched(Schedule):
    """Sends where nobody receives."""

    def steps(self) -> Iterator[list[Any]]:
        yield [ForwardPass(0), SendActivation(0), BackwardPass(0), OptimizerStep()]


class Failing(Schedule):
    """Can be gone through only once, by the engine."""

    made = 0

    def steps(self) -> Iterator[list[Any]]:
        Failing.made += 1
        if Failing.made == 1:
            raise RuntimeError("not twice")
        return super().steps()


@pytest.mark.parametrize(
    "made",
    [lambda: Ahead(2, 1, 0, 2), lambda: Shapeless(2, 1, 0), lambda: Unmatched(2, 1, 0), lambda: Failing(2, 1, 0)],
)
def test_a_schedule_that_cannot_be_followed_is_named_once_and_runs_at_full_clocks(
    engine: Engine, started: Started, caplog: pytest.LogCaptureFixture, made: Callable[[], Any]
) -> None:
    engine.train_batch()
    before = started[0].full_clocks
    schedule = made()
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Engine, "train_batch", lambda self, data_iter=None: self._exec_schedule(schedule) or "loss")
    Failing.made = 0
    try:
        for _ in range(3):
            assert engine.train_batch() == "loss"
    finally:
        monkey.undo()
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert type(schedule).__qualname__ in line
    assert started[0].full_clocks >= before + 3
    assert not started[0].closed
    engine.train_batch()
    assert seen(started)[-1], "the stock schedule is followed as before"


class Changing(Schedule):
    """Runs as the script has set it, which its constructor does not know."""

    tail: Sequence[Any] = ()
    turned = False

    def steps(self) -> Iterator[list[Any]]:
        steps = list(super().steps())
        yield from reversed(steps) if self.turned else steps
        yield list(self.tail)


class Shortened(Schedule):
    """Leaves out what its class has."""

    turned = False

    def steps(self) -> Iterator[list[Any]]:
        steps = list(super().steps())
        yield from steps[:1] if self.turned else steps


@pytest.mark.parametrize(
    ("schedule_class", "attributes", "reason"),
    [
        (Changing, {"tail": [ForwardPass(0)]}, "its instruction 7 is forward where its class yields no more"),
        (Changing, {"turned": True}, "its instruction 0 is optimizer_step where its class yields load_microbatch"),
        (Shortened, {"turned": True}, "it ran 2 instructions where its class yields 7"),
    ],
)
def test_a_schedule_that_runs_otherwise_than_its_class_says_is_named_and_runs_at_full_clocks(
    engine: Engine,
    started: Started,
    caplog: pytest.LogCaptureFixture,
    schedule_class: type[Schedule],
    attributes: dict[str, Any],
    reason: str,
) -> None:
    def train_batch(self: Engine, data_iter: Any = None) -> str:
        schedule = schedule_class(2, 1, 0)
        vars(schedule).update(attributes)
        self._exec_schedule(schedule)
        return "loss"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "train_batch", train_batch)
        for _ in range(3):
            assert engine.train_batch() == "loss"
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert f"{schedule_class.__qualname__} is not one that perseus can follow ({reason})" in line
    assert not any(one.complete and one.undisturbed for one in started[0].iterations)
    assert started[0].full_clocks >= 3
    assert not started[0].closed
    engine.train_batch()
    assert seen(started)[-1], "the stock schedule is followed as before"


def test_a_map_that_is_exchanged_in_mid_schedule_costs_that_iteration(
    engine: Engine, started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    do = Engine._do

    def exchanging(self: Engine, what: str) -> None:
        do(self, what)
        if what == "forward 0" and len(engine.ran) == 2:
            vars(engine)["_INSTRUCTION_MAP"] = dict(STOCK_MAP)

    vars(engine)["_do"] = exchanging.__get__(engine)
    for _ in range(2):
        engine.train_batch()
    assert engine.ran == 2 * TRAINED
    assert seen(started) == [False, True]
    assert vars(engine)["_INSTRUCTION_MAP"] == STOCK_MAP
    assert not caplog.records


# Nothing to plan for.


def test_a_pipeline_of_one_stage_is_said_and_left_alone(
    started: Started, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Engine, "num_stages", 1)
    engine = Engine({"enabled": True})
    assert perseus_plugin.enable(engine) is None
    assert stock(engine)
    assert started == []
    (line,) = caplog.messages
    assert line.startswith("perseus is off: it needs pipeline parallelism, and this engine has none.")
    given = {"load": "p.csv", "blocking_power_w": 80.0}
    assert perseus_plugin.enable(engine, {"slowdown": 0.1, "profiling": given}) is started[0]


# Life of engines.


def test_an_engine_that_is_dropped_frees_its_gpu_without_a_garbage_collection(started: Started) -> None:
    engine = Engine(block={"enabled": True})
    perseus_plugin.enable(engine)
    engine.train_batch()
    gc.disable()
    try:
        del engine
        assert started[0].closed
    finally:
        gc.enable()


def test_destroying_an_engine_ends_its_session_first(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(Engine, "destroy", lambda self: closed.append(started[0].closed) or "destroyed", raising=False)
    engine = Engine(block={"enabled": True})
    perseus_plugin.enable(engine)
    engine.train_batch()
    assert engine.destroy() == "destroyed"  # type: ignore[attr-defined]
    assert closed == [True]
    assert stock(engine)


def test_figures_go_to_the_monitor_at_the_sample_count(started: Started) -> None:
    written: list[Any] = []
    for enabled in (True, False):
        engine = Engine({"enabled": True})
        vars(engine)["monitor"] = SimpleNamespace(enabled=enabled, write_events=written.extend)
        perseus_plugin.enable(engine)
        started[-1].events += [("Perseus/gone", math.nan), ("Perseus/x", 1.5)]
        engine.train_batch()
    assert written == [("Perseus/x", 1.5, 32)]


def test_the_last_figures_are_written_when_the_engine_is_gone(started: Started) -> None:
    written: list[Any] = []
    engine = Engine({"enabled": True})
    vars(engine)["monitor"] = SimpleNamespace(enabled=True, write_events=written.extend)
    perseus_plugin.enable(engine)
    vars(engine)["global_samples"] = 64
    engine.train_batch()
    started[0].events.append(("Perseus/x", 1.5))
    del engine
    assert started[0].closed
    assert written == [("Perseus/x", 1.5, 64)]


# Patching the classes.


class Module(ModuleType):
    """An engine module whose class is made anew for each test."""

    def __init__(self, name: str, base: type) -> None:
        super().__init__("deepspeed.runtime." + name)

        class Made(base):  # type: ignore[misc, valid-type]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.built = True

        setattr(self, name, Made)
        self.engine_class: Any = Made


def test_a_patched_pipeline_engine_attaches_itself(started: Started) -> None:
    module = Module("PipelineEngine", Engine)
    patch_engine_module(module)
    patch_engine_module(module)
    made = module.engine_class({"enabled": True})
    assert made.built
    assert len(started) == 1
    assert perseus_plugin.enable(made) is started[0]
    for block in (None, {"enabled": False}):
        assert stock(module.engine_class(block))
    assert len(started) == 1


def test_a_wrong_block_stops_the_job_before_the_engine_is_built(started: Started) -> None:
    module = Module("PipelineEngine", Engine)
    built: list[bool] = []
    stock_init = module.engine_class.__init__
    module.engine_class.__init__ = lambda self, **more: (built.append(True), stock_init(self, **more))[-1]
    patch_engine_module(module)
    with pytest.raises(ConfigError, match=r"perseus\.slow: unknown key"):
        module.engine_class(config_class=SimpleNamespace(_param_dict={"perseus": {"slow": 1}}))
    assert built == []


def test_only_rank_0_says_what_is_wrong(started: Started, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 3)
    module = Module("PipelineEngine", Engine)
    patch_engine_module(module)
    with pytest.raises(SystemExit) as caught:
        module.engine_class({"slow": 1})
    assert caught.value.code == 1


class Plain:
    """An engine without a pipeline."""

    def __init__(self, block: Any = None) -> None:
        self._config = SimpleNamespace(_param_dict={} if block is None else {"perseus": block})


def test_an_engine_without_a_pipeline_says_so_once_and_trains(
    started: Started, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    module = Module("DeepSpeedEngine", Plain)
    patch_engine_module(module)
    for block in (None, {"enabled": False}):
        module.engine_class(block)
    assert caplog.text == ""
    assert module.engine_class({"enabled": True}).built
    assert caplog.text.count("perseus is off: it needs pipeline parallelism") == 1
    with pytest.raises(ConfigError):
        module.engine_class({"enabled": "yes"})
    assert started == []


def test_a_module_without_engines_is_left_alone() -> None:
    module = ModuleType("deepspeed.runtime.pipe.engine")
    patch_engine_module(module)
    assert not [name for name in vars(module) if not name.startswith("__")]


def test_the_real_deepspeed_has_what_is_hooked() -> None:
    engine_module = pytest.importorskip("deepspeed.runtime.pipe.engine")
    engine_class = engine_module.PipelineEngine
    assert "_perseus_patched" in vars(engine_class), "importing torch and DeepSpeed is enough"
    for name in ("_INSTRUCTION_MAP", "train_batch", "eval_batch", "_exec_schedule"):
        assert hasattr(engine_class, name), name


@pytest.mark.parametrize("when", ["before", "after", "between batches", "within a batch"])
@pytest.mark.parametrize("where", ["instance", "class"])
@pytest.mark.parametrize("hooks", [False, True])
def test_a_foreign_function_runs_as_often_in_the_real_engines_schedule(
    started: Started, when: str, where: str, hooks: bool
) -> None:
    """DeepSpeed's own `_exec_schedule` and `TrainSchedule`; what instructions do is made up. In the end it is out."""
    engine_class = pytest.importorskip("deepspeed.runtime.pipe.engine").PipelineEngine
    schedules = pytest.importorskip("deepspeed.runtime.pipe.schedule")
    ran: list[str] = []
    calls = 0

    def stock_function(kind: type) -> Callable[..., None]:
        return lambda self, **kwargs: ran.append(kind.__name__)

    class Real(engine_class):  # type: ignore[misc, valid-type]
        _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
            kind: stock_function(kind) for kind in engine_class._INSTRUCTION_MAP
        }
        train_batch_size, zero_optimization_stage = Engine.train_batch_size, Engine.zero_optimization_stage
        train_micro_batch_size_per_gpu = Engine.train_micro_batch_size_per_gpu

        def _reserve_pipe_buffers(self, count: int) -> None:
            pass

        def train_batch(self, data_iter: Any = None) -> None:
            self._exec_schedule(schedules.TrainSchedule(micro_batches=2, stages=2, stage_id=0))

    engine = Real.__new__(Real)
    torch.nn.Module.__init__(engine)
    vars(engine).update(
        vars(Engine()), global_rank=0, world_size=2, stage_id=0, num_stages=2, local_rank=0, device="cpu"
    )
    kind = schedules.BackwardPass
    stock_map = Real._INSTRUCTION_MAP

    def foreign(self: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        stock_map[kind](self, **kwargs)

    def put() -> None:
        changed = {**stock_map, kind: foreign}
        if where == "instance":
            vars(engine)["_INSTRUCTION_MAP"] = changed
        else:
            Real._INSTRUCTION_MAP = changed

    def put_within(self: Any, **kwargs: Any) -> None:
        ran.append("ForwardPass")
        if ran.count("ForwardPass") == 5:  # the first of the third batch: before any backward of it
            put()

    if when == "within a batch":
        stock_map[schedules.ForwardPass] = put_within
    if when == "before":
        put()
    if hooks:
        perseus_plugin.enable(engine, {})
    if when == "after":
        put()
    for batch in range(4):
        if when == "between batches" and batch == 2:
            put()
        engine.train_batch()
    there = vars(engine).get("_INSTRUCTION_MAP", Real._INSTRUCTION_MAP)
    assert there[kind] is foreign, "what was put in is still there, itself"
    vars(engine).pop("_INSTRUCTION_MAP", None)
    Real._INSTRUCTION_MAP = stock_map
    engine.train_batch()
    assert calls == 2 * (4 if when in ("before", "after") else 2)
    assert ran.count("BackwardPass") == ran.count("ForwardPass") == 10
    if hooks:
        assert seen(started)[-1]
        assert not started[0].closed
        started[0].close()
    assert not {"train_batch", "_exec_schedule", "_INSTRUCTION_MAP", "_perseus_session"} & vars(engine).keys()
