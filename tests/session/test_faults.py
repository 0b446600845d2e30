"""What a driver can do to a job that trains: training goes on, it is said once, no clock stays locked.

Jobs of threads with real sessions, helpers and planner. What else can happen, and these too, in jobs of a framework:
tests/e2e/test_nvml.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from perseus_plugin.gpus.emulated.device import EmulatedGpu
from perseus_plugin.gpus.emulated.state import GPU_LOST, NO_PERMISSION
from tests.one_job import OneJob, Step
from tests.waiting import came_true, processes_naming

from .test_one_job import SHORT

# What the driver of the last rank's GPU does from some moment on, and what is said of it.
FAULTS: dict[str, tuple[int, str]] = {
    "lose-gpu": (GPU_LOST, "lost"),
    "take-permission": (NO_PERMISSION, "permission"),
}
SLOW_CALL_S = 0.5
"""That of the first rank's GPU takes so long for each call meanwhile, of which nothing is said."""


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """All that ranks warn of. Less would depend on which of them has set its level last."""
    heard: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("perseus_plugin")
    logger.addHandler(handler)
    yield heard
    logger.removeHandler(handler)


@pytest.mark.parametrize("name", FAULTS)
def test_training_goes_on_through_a_fault(name: str, tmp_path: Path, warnings: list[str]) -> None:
    faults, message = FAULTS[name]
    gpus = [EmulatedGpu.create(tmp_path / "emulated_gpus" / f"rank{rank}") for rank in range(2)]

    def said() -> list[str]:
        # By the rank itself; rank 0 hears of it and says so too.
        return [words for words in warnings if message in words and words[:7] != "rank 1:"]

    def iterations() -> Iterator[bool]:
        """After each: whether the job is over."""
        while not (tmp_path / "plan.json").exists():
            yield False
        yield from [False] * 3
        gpus[0].set_faults(0, call_s=SLOW_CALL_S)
        gpus[1].set_faults(faults)
        while not said():
            yield False
        yield from [False] * 6

    story = iterations()
    ran = OneJob(tmp_path, [Step()] * 10_000, plugin=SHORT, until=lambda: next(story, True)).run()
    assert len(ran.times_s) < 10_000
    assert len(said()) == 1
    gpus[1].set_faults(0)  # a driver that refuses takes no reset either
    assert came_true(lambda: [gpu.locked_mhz() for gpu in gpus] == [None, None]), "a helper gave up too early"
    assert came_true(lambda: not processes_naming(str(tmp_path))), "a helper lives on"
