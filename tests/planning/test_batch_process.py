"""Rank 0's side of the process that plans single batches; what it answers is in `test_batches_as_run`."""

from __future__ import annotations

import threading
from pathlib import Path

from perseus_plugin.planning.batch_process import BatchProcess, PlannedStep


def answer_of(python: Path | None) -> PlannedStep:
    woken = threading.Event()
    process = BatchProcess(woken.set, None if python is None else str(python))
    try:
        process.plan([[1.0, 2.0]], 7, 1)
        assert woken.wait(60)
        answer = process.poll()
    finally:
        process.close()
    assert isinstance(answer, PlannedStep)
    assert not process.busy
    return answer


def test_it_answers() -> None:
    assert answer_of(None).why_not == "nothing has been learned"


def test_it_runs_in_the_python_that_plans(tmp_path: Path) -> None:
    python = tmp_path / "python"
    absent = answer_of(python)
    assert absent.lost
    assert absent.why_not.startswith("the process that plans batches cannot be started: ")
    assert "No such file or directory" in absent.why_not
    python.write_text("#!/bin/sh\nread line\nprintf '{\"replicas\": [], '\n")
    with python.open("a") as script:
        script.write('printf \'"why_not": "another Python"}\\n\'\n')
    python.chmod(0o755)
    assert answer_of(python) == PlannedStep([], why_not="another Python")
    python.write_text("#!/bin/sh\nread line\necho nonsense; exec sleep 1000\n")
    assert answer_of(python).why_not.startswith("the process that plans batches gave no answer: JSONDecodeError(")
