from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests.examples import MANY, USUAL

# No deadline per example: the suite must hold on slow and busy machines. CI tries the same examples every time:
# new ones are found by whoever works on the code, not by whoever lands next.
settings.register_profile("perseus", deadline=None, max_examples=USUAL, derandomize=bool(os.environ.get("CI")))
settings.register_profile("many", settings.get_profile("perseus"), max_examples=MANY)
settings.load_profile("perseus")
# Small matrices on many threads wait for each other where tests run side by side; set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# DeepSpeed looks for an accelerator when it is imported, and finds one by compiling code unless told.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

# Where tests run side by side nothing waits for these at the end; xdist puts groups before them, the largest first.
LONGEST = (
    "e2e/test_shared_budget",
    "e2e/test_stragglers",
    "e2e/test_pipelining",
    "e2e/test_megatron",
    "e2e/test_report",
    "e2e/test_quickstart",
    "e2e/test_life",
    "e2e/test_nvml",
    "test_megatron_examples",
    "test_patches",
    "test_extending",
    "session/test_graphed_steps",
    "session/test_live_targets",
    "session/test_one_job",
    "session/test_faults",
    "session/test_signals",
    "session/test_frozen_store",
    "cli/verification/test_verify",
    "session/test_session",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first."""

    def place(item: pytest.Item) -> int:
        file = item.nodeid.partition(".py")[0].removeprefix("tests/")
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What is there by now stays, tests and all that they import: no collection of garbage need look at it again."""
    gc.freeze()


def pytest_make_parametrize_id(val: object) -> str | None:
    """Values of thousands of characters are named by their first."""
    return f"{val[:40]!r}..." if isinstance(val, str | bytes) and len(val) > 200 else None


@pytest.fixture(autouse=True)
def fresh_logging() -> Iterator[logging.Logger]:
    """The package's logger as in a program that has set nothing up; a session under test changes it."""
    logger = logging.getLogger("perseus_plugin")
    before = (logger.handlers[:], logger.propagate, logger.level)
    logger.handlers, logger.propagate = [], True
    logger.setLevel(logging.NOTSET)
    yield logger
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
