from __future__ import annotations

from collections.abc import Sequence

import pytest

from perseus_plugin.integrations.torch_pipelining.optimizers import OptimizerSteps


def ends(steps: OptimizerSteps, runs: Sequence[tuple[int, int]]) -> list[int | None]:
    """After how many steps that follow it each run's iteration ends; None: not before the next one begins.

    Args:
        runs: for each, the steps of optimizers within it and after it.
    """
    found: list[int | None] = []
    for within, after in runs:
        steps.run_begins()
        for _ in range(within):
            steps.stepped()
        steps.run_ended()
        end = 0 if steps.all_stepped else None
        for number in range(1, after + 1):
            steps.stepped()
            end = number if end is None and steps.all_stepped else end
        found.append(end)
    return found


def test_the_first_run_has_no_known_end() -> None:
    assert ends(OptimizerSteps(), [(0, 1)]) == [None]


@pytest.mark.parametrize("optimizers", [1, 2, 5])
def test_an_iteration_ends_with_the_last_optimizer(optimizers: int) -> None:
    assert ends(OptimizerSteps(), [(0, optimizers)] * 4) == [None, *[optimizers] * 3]


def test_with_accumulation_only_the_last_run_waits_for_optimizers() -> None:
    # The second run is taken for one like the first; what the script does is known after one turn.
    assert ends(OptimizerSteps(), [(0, 0), (0, 0), (0, 2)] * 3) == [None, 0, 0, 0, 0, 2, 0, 0, 2]


def test_without_optimizers_an_iteration_ends_with_its_run() -> None:
    steps = OptimizerSteps()
    assert ends(steps, [(0, 0)] * 1000) == [None, *[0] * 999]
    assert len(steps._follow) == 1, "it remembers every run"


def test_optimizers_that_step_within_the_backward_are_not_waited_for() -> None:
    assert ends(OptimizerSteps(), [(9, 0)] * 4) == [None, 0, 0, 0]


def test_a_step_that_is_left_out_is_noticed_and_makes_no_iteration_end_early() -> None:
    runs = [(0, 1)] * 3 + [(0, 0)] + [(0, 1)] * 4
    assert ends(OptimizerSteps(), runs) == [None, 1, 1, None, None, None, 1, 1]


def test_a_step_after_something_else_is_not_waited_for() -> None:
    steps = OptimizerSteps()
    found = []
    for _ in range(4):
        steps.run_begins()
        steps.run_ended()
        steps.stepped()
        found.append(steps.all_stepped)
        steps.elsewhere()
        steps.stepped()
    assert found == [False, True, True, True]


def test_another_number_of_runs_is_learned() -> None:
    runs = [(0, 0), (0, 1)] * 3 + [(0, 0), (0, 0), (0, 1)] * 3
    assert ends(OptimizerSteps(), runs)[-3:] == [0, 0, 1]
