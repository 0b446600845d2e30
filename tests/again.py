"""Run tests side by side; the few that fail, once more with nothing beside them.

    python -m tests.again --numprocesses 3 ...    (what pytest takes)

Emulated time passes while processes wait for cores: with three jobs on two cores, a measurement may be so far off that
a job does not do what it would have done by itself. A test that fails then is not passed over, and not believed either:
it runs again alone, and what that says counts. Each is named at the end, to be read. Where more fail than `MOST`, or
one in a way that no busy machine is to blame for (`NoAccidentError`), nothing is tried again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

import pytest

MOST = 3


class NoAccidentError(AssertionError):
    """What a busy machine cannot bring about: training that differs, a clock that stays locked."""


def hold(promise: bool, what: str) -> None:
    """Assert what has to hold on any machine, the first time.

    Raises:
        NoAccidentError: it does not.
    """
    if not promise:
        raise NoAccidentError(what)


class Failures:
    """Hears what pytest reports, of all its processes.

    Attributes:
        tests: those that failed, by name.
        no_accident: those of them that are not to be tried again.
    """

    def __init__(self) -> None:
        self.tests: list[str] = []
        self.no_accident: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if not report.failed:
            return
        self.tests.append(report.nodeid)
        if NoAccidentError.__name__ in report.longreprtext or "crashed while running" in report.longreprtext:
            self.no_accident.append(report.nodeid)


def main(arguments: Sequence[str]) -> int:
    """Returns pytest's exit status, of the second run where there was one."""
    failures = Failures()
    status = int(pytest.main([*arguments], plugins=[failures]))
    if status != pytest.ExitCode.TESTS_FAILED or failures.no_accident or len(failures.tests) > MOST:
        return status
    names = "\n".join(f"    {test}" for test in failures.tests)
    print(f"\nOnce more, with nothing beside them:\n{names}\n", flush=True)
    alone = [
        sys.executable,
        "-m",
        "pytest",
        *arguments,
        "--numprocesses",
        "0",
        "--last-failed",
        "--last-failed-no-failures",
        "none",
    ]
    status = subprocess.run(alone, check=False).returncode
    if not status:
        print(f"\nFailed beside others, passed alone; CONTRIBUTING.md says what to do about it:\n{names}", flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
