from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# No deadline per example: the suite must hold on slow and busy machines.
settings.register_profile("perseus", deadline=None)
# CI tries the same examples every time; new ones are found by whoever works on the code, not by whoever lands next.
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "perseus")
# Small matrices on many threads wait for each other where tests run side by side; set before numpy is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# DeepSpeed looks for an accelerator when it is imported, and finds one by compiling code unless told.
os.environ.setdefault("DS_ACCELERATOR", "cpu")


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
