"""Solvers that take the processor for hours end when the user wants them to."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.iteration.graph import build_graph
from perseus_plugin.iteration.schedules import SCHEDULES
from perseus_plugin.planning.cp_sat import cp_model, without_pandas
from perseus_plugin.planning.planner import Planner
from perseus_plugin.planning.solvers import ending_on_ctrl_c, interruptible
from perseus_plugin.planning.window import WindowLimits, regrets, solve_window
from perseus_plugin.planning.work import Work
from tests.planning.jobs import bundled_profile


def test_ctrl_c_ends_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(build_graph(SCHEDULES["1f1b"](4, 16)), bundled_profile(4), blocking_power_w=60.0)
    problem = planner.problem
    relaxed = planner.relaxation.solve(problem.full_clock_time_s)
    begun, solve = threading.Event(), cp_model.CpSolver.solve

    def told(solver: cp_model.CpSolver, *given: Any) -> object:
        begun.set()
        return solve(solver, *given)

    def interrupt() -> None:
        begun.wait()
        os.kill(os.getpid(), signal.SIGINT)

    # Whoever started the tests may have had it ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    monkeypatch.setattr(cp_model.CpSolver, "solve", told)
    threading.Thread(target=interrupt).start()
    work = Work(1e6)
    try:
        with pytest.raises(KeyboardInterrupt):
            solve_window(
                problem,
                problem.choice(problem.full_clocks),
                relaxed.deadline_s,
                problem.instruction_nodes,
                regrets(problem, relaxed.instruction_price_w),
                WindowLimits(100.0, 1e6),
                work,
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert work.done == 0, "it was not left to end by itself"


def test_what_a_solver_raises_is_raised() -> None:
    def fails() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        interruptible(fails, lambda: None)
    assert interruptible(lambda: 5, lambda: None) == 5


def test_others_have_the_solver_with_its_series() -> None:
    import pandas
    from ortools.sat.python import cp_model as of_others

    assert of_others.CpModel().new_bool_var_series("x", pandas.Index([1, 2])).size == 2


def test_a_solver_that_needs_pandas_to_be_loaded_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "of_another_version.py").write_text("import pandas as pd\nSIZE = pd.Index([1, 2]).size\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert without_pandas("of_another_version").SIZE == 2


def test_a_ctrl_c_that_was_swallowed_is_heard_again_and_one_that_is_on_its_way_is_not_disturbed() -> None:
    tidied = 0

    def swallow() -> None:
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(60)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt), ending_on_ctrl_c() as interrupted:  # noqa: PT012
            assert not interrupted()
            swallow()
            try:
                time.sleep(60)
            finally:
                assert interrupted()
                signal.raise_signal(signal.SIGALRM)
                tidied = 1
        assert tidied
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)
    finally:
        signal.signal(signal.SIGINT, before)
