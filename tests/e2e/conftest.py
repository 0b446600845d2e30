"""Fixtures of the end-to-end tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.observed import Observed, observe
from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]


@pytest.fixture(scope="session")
def observed(simulated_nvml: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """The job that many tests look at; mark them `look_at_the_observed_job`."""
    return observe(simulated_nvml, tmp_path_factory.mktemp("observed"))
