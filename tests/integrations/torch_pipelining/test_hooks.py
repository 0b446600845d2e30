from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
import torch._dynamo.utils

import perseus_plugin
from perseus_plugin.errors import PerseusError
from perseus_plugin.integrations.in_memory import InMemorySession, Iteration, sessions_in_memory
from perseus_plugin.iteration.instructions import Compute, Constant
from tests.again import hold
from tests.integrations.torch_pipelining.conftest import BLOCK, Script, Untold


def enabled(*arguments: Any) -> Script:
    script = Script(*arguments)
    assert perseus_plugin.enable(script.schedule, BLOCK) is None
    return script


def whole(iterations: list[Iteration]) -> list[bool]:
    return [one.complete and one.undisturbed and one.over for one in iterations]


NAMES = {"1F1B": "1F1B/1x4", "GPipe": "GPipe/1x4", "Interleaved1F1B": "Interleaved1F1B/1x4x2-"}


@pytest.mark.parametrize("name", NAMES)
def test_every_instruction_is_seen_and_nothing_is_computed_otherwise(
    name: str, sessions: list[InMemorySession]
) -> None:
    script, plain = enabled(name), Script(name)
    assert script.train(4) == plain.train(4)
    for one, other in zip(script.parts, plain.parts, strict=True):
        for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    (session,) = sessions
    # The first one learns shapes, and what ends an iteration.
    assert whole(session.iterations) == [False, True, True, True]
    last = session.iterations[-1]
    assert last.schedule.startswith(NAMES[name])
    names = [op.name for op in last.operations if isinstance(op, Constant)]
    assert names == [*(["reduce_grad_1"] if len(script.parts) == 2 else []), "reduce_grad", "end_of_batch"]
    chunks = {op.chunk for op in last.operations if isinstance(op, Compute)}
    assert chunks == set(range(len(script.parts)))


def test_the_session_is_the_schedules_own(sessions: list[InMemorySession]) -> None:
    script = enabled()
    script.train()
    assert perseus_plugin.enable(script.schedule, BLOCK) is sessions[0]
    assert sessions[0].placement.device == "cpu"
    assert sessions[0].facts is not None
    assert sessions[0].facts["microbatch"] == "float32(2, 4), float32(2, 4)"


def test_evaluation_runs_at_full_clocks_and_what_learns_shapes_again_is_not_measured(
    sessions: list[InMemorySession],
) -> None:
    script = enabled("1F1B")  # PyTorch's own `eval` fails where a rank has neighbouring stages
    script.train(2)
    before = sessions[0].full_clocks
    script.run("eval")
    assert sessions[0].full_clocks == before + 1
    script.train(2)
    assert whole(sessions[0].iterations) == [False, True, False, True]


def test_with_accumulation_every_run_is_an_iteration(sessions: list[InMemorySession]) -> None:
    script = enabled()
    for _ in range(3):
        script.run()
        script.train()
    assert whole(sessions[0].iterations)[-4:] == [True] * 4


@pytest.mark.parametrize("name", ["forward_one_chunk", "backward_one_chunk", "perform_reduce_grad"])
@pytest.mark.parametrize("comes", ["before", "between"])
def test_what_others_put_there_runs_and_stays(name: str, comes: str, sessions: list[InMemorySession]) -> None:
    script, calls = Script(), []

    def put() -> None:
        beneath = getattr(script.stages[0], name)

        def theirs(*args: Any, **kwargs: Any) -> Any:
            calls.append(name)
            return beneath(*args, **kwargs)

        vars(script.stages[0])[name] = theirs

    if comes == "before":
        put()
    perseus_plugin.enable(script.schedule, BLOCK)
    script.train(2)
    if comes == "between":
        put()
    calls.clear()
    script.train(2)
    assert len(calls) == 2 * (1 if name == "perform_reduce_grad" else script.microbatches)
    assert whole(sessions[0].iterations)[-2:] == [True, True]
    sessions[0].close()
    calls.clear()
    script.train(1)
    assert calls


def test_at_its_end_all_is_as_it_was(sessions: list[InMemorySession]) -> None:
    script = Script()
    schedule_had, stage_had = dict(vars(script.schedule)), dict(vars(script.stages[0]))
    perseus_plugin.enable(script.schedule, BLOCK)
    script.train(2)
    sessions[0].close()
    for had, now in ((schedule_had, vars(script.schedule)), (stage_had, vars(script.stages[0]))):
        assert set(now) <= set(had), "something was left"
    steps = len(sessions[0].iterations)
    script.train(2)
    assert len(sessions[0].iterations) == steps


def test_an_error_of_the_script_costs_its_iteration(sessions: list[InMemorySession]) -> None:
    script = enabled()
    script.train(2)
    stock = script.schedule._loss_fn

    def fails(*_: Any) -> torch.Tensor:
        raise ValueError("the script fails on purpose")

    script.schedule._loss_fn = fails
    with pytest.raises(ValueError, match="on purpose"):
        script.run()
    script.schedule._loss_fn = stock
    script.schedule._internal_losses.clear()
    assert sessions[0].iterations[-1].over
    assert whole(sessions[0].iterations)[-1] is False
    script.train(2)
    assert whole(sessions[0].iterations)[-1] is True


def test_a_schedule_that_runs_otherwise_is_named_once_and_runs_at_full_clocks(
    sessions: list[InMemorySession], caplog: pytest.LogCaptureFixture
) -> None:
    script = Script()
    lists = script.schedule.pipeline_order_with_comms[0]
    perseus_plugin.enable(script.schedule, BLOCK)
    script.train(2)
    # Two forwards change places after the streams were made.
    at = [number for number, action in enumerate(lists) if str(action) in ("0F0", "0F1")]
    lists[at[0]], lists[at[1]] = lists[at[1]], lists[at[0]]
    script.train(3)
    assert whole(sessions[0].iterations)[-3:] == [False] * 3
    assert caplog.text.count("this schedule of PyTorch is not one that perseus can follow") == 1
    assert "its instruction 0 is forward of microbatch 1 instead of forward of microbatch 0" in caplog.text


def test_a_schedule_without_lists_is_named_and_trains(
    sessions: list[InMemorySession], caplog: pytest.LogCaptureFixture
) -> None:
    script = Script()
    script.schedule.__class__ = type("Odd", (type(script.schedule),), {})
    lists, script.schedule.pipeline_order_with_comms = script.schedule.pipeline_order_with_comms, None
    perseus_plugin.enable(script.schedule, BLOCK)
    with pytest.raises(AssertionError):  # PyTorch's own
        script.run()
    assert "Odd: it keeps no lists of the actions that it runs" in caplog.text
    script.schedule.pipeline_order_with_comms = lists
    script.train(3)
    assert whole(sessions[0].iterations)[-1]


def test_a_second_schedule_runs_at_full_clocks_until_the_first_is_gone(
    sessions: list[InMemorySession], caplog: pytest.LogCaptureFixture
) -> None:
    script, other = enabled(), enabled("1F1B")
    script.train(2)
    before = sessions[0].full_clocks
    other.train(2)
    assert len(sessions) == 1
    assert sessions[0].full_clocks == before + 2
    assert caplog.text.count("a second schedule trains in this process") == 1
    del script
    gc.collect()
    assert sessions[0].closed
    other.train(3)
    assert whole(sessions[1].iterations)[-2:] == [True, True]


def test_optimizers_of_another_schedule_are_not_waited_for(sessions: list[InMemorySession]) -> None:
    script, other = enabled(), enabled("1F1B")
    for _ in range(3):
        script.train(2)
        other.train()
    assert whole(sessions[0].iterations) == [False, *[True] * 5]


def test_steps_after_the_run_of_another_schedule_are_not_waited_for(sessions: list[InMemorySession]) -> None:
    script, other = enabled("1F1B"), enabled("1F1B")
    for _ in range(4):
        script.run()
        other.run()
        for optimizer in script.optimizers + other.optimizers:
            optimizer.step()
    assert whole(sessions[0].iterations) == [False, True, True, True]


def run_compiled(script: Script) -> tuple[list[float], dict[str, int]]:
    """Losses, and how often what was compiled.

    But for how many frames compiled whole: what is left of torch's own wrapper after a step calls the hooks, and where
    one of them is not to be compiled, as ours, that rest runs as it is. Nothing of a step is in it.
    """
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    step = torch.compile(lambda: [one.step() for one in script.optimizers], backend="eager")
    losses: list[float] = []
    for _ in range(3):
        losses += script.run()
        step()
    return losses, {"frames": counters["frames"]["total"], **counters["stats"]}


def test_a_compiled_step_of_an_optimizer_is_compiled_as_without(sessions: list[InMemorySession]) -> None:
    (usual_losses, usual), (losses, compiled) = run_compiled(Script()), run_compiled(enabled())
    hold(losses == usual_losses, "losses are those without the plugin")
    assert whole(sessions[0].iterations) == [False, True, True]
    assert compiled == usual


def test_a_session_that_cannot_start_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with sessions_in_memory(error=PerseusError("the disk is full")):
        script = enabled()
        script.train(3)
    assert caplog.text.count("perseus is off: it could not start: the disk is full") == 1


def test_hooks_that_cannot_be_put_end_the_session_and_nothing_else(
    sessions: list[InMemorySession], caplog: pytest.LogCaptureFixture
) -> None:
    script = enabled()
    script.stages[1].forward_one_chunk = Untold(script.stages[1].forward_one_chunk)
    assert script.train(2) == Script().train(2)
    assert sessions[0].closed
    assert "perseus is off: it could not start" in caplog.text


def test_a_pipeline_of_one_rank_is_said_and_left_alone(
    sessions: list[InMemorySession], caplog: pytest.LogCaptureFixture
) -> None:
    script = Script()
    perseus_plugin.enable(script.schedule, {})
    script.train(2)
    assert not sessions
    assert caplog.text.count("this job's pipeline has one rank") == 1
    assert "_step_microbatches" not in vars(script.schedule)


class Pair:
    """A function registered for a type of action, which calls the stage's method."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, action: Any, context: Any) -> None:
        self.ran.append(str(action))
        schedule = context.schedule_ref
        schedule._stages[action.stage_index].perform_reduce_grad(schedule._n_microbatches)


def test_a_registered_function_is_one_operation(sessions: list[InMemorySession]) -> None:
    from torch.distributed.pipelining.schedules import _ComputationType

    script, function = Script(), Pair()
    script.schedule.register_custom_function(_ComputationType.REDUCE_GRAD, function)
    perseus_plugin.enable(script.schedule, BLOCK)
    script.train(3)
    assert whole(sessions[0].iterations) == [False, True, True]
    assert function.ran == ["1REDUCE_GRAD", "0REDUCE_GRAD"] * 3
    assert script.schedule._comp_type_to_function_map[_ComputationType.REDUCE_GRAD] is function


def test_a_session_that_ends_within_an_optimizers_step_does_not_stop_it(
    sessions: list[InMemorySession], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = enabled()
    script.train(2)
    monkeypatch.setattr(sessions[0], "end_iteration", sessions[0].close)
    after: list[Any] = []
    handle = torch.optim.Optimizer.register_step_post_hook(script.optimizers[0], lambda *_: after.append(1))
    script.train(2)
    handle.remove()
    assert sessions[0].closed
    assert len(after) == 2


def test_a_replay_of_a_run_is_an_iteration_that_nobody_looks_into(sessions: list[InMemorySession]) -> None:
    """On an emulated GPU a run stands for it, which takes its time by the tap."""
    script = enabled()
    with perseus_plugin.replaying(script.schedule):
        pass  # there is no session yet
    script.train(3)
    (session,) = sessions
    with perseus_plugin.replaying(script.schedule):
        script.run()
    for optimizer in script.optimizers:
        optimizer.step()
    with perseus_plugin.replaying(script.schedule):
        pass  # a real GPU: no Python runs
    for optimizer in script.optimizers:
        optimizer.step()
    script.train(1)
    assert [one.replayed for one in session.iterations] == [False, False, False, True, True, False]
    assert [one.complete for one in session.iterations if not one.replayed] == [False, True, True, True]
    played, real = (one for one in session.iterations if one.replayed)
    assert (played.ended, real.begun) == (len(played.operations) - 1, 0), "all but the batch's end"
    assert all(one.undisturbed and one.over for one in session.iterations[1:])
    with pytest.raises(ZeroDivisionError), perseus_plugin.replaying(script.schedule):
        raise ZeroDivisionError
    assert not session.iterations[-1].undisturbed
    script.train(1)
    assert whole(session.iterations)[-1]


def test_nothing_of_ours_is_captured(sessions: list[InMemorySession], monkeypatch: pytest.MonkeyPatch) -> None:
    script = enabled()
    script.train(2)
    full_clocks = sessions[0].full_clocks
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with perseus_plugin.replaying(script.schedule):
        script.run()
    for optimizer in script.optimizers:
        optimizer.step()
    assert (len(sessions[0].iterations), sessions[0].full_clocks) == (2, full_clocks)
    monkeypatch.undo()
    script.train(1)
    assert whole(sessions[0].iterations) == [False, True, True], "what was captured says nothing of what follows a run"


def test_what_is_not_enabled_is_replayed_without_us() -> None:
    for anything in (Script().schedule, None, 3):
        with perseus_plugin.replaying(anything):
            pass
