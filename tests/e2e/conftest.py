"""Fixtures of the end-to-end tests, and their order."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.observed import Observed, observe
from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]

LONGEST = ("test_quickstart", "test_stragglers", "test_megatron", "test_life", "test_nvml")


@pytest.fixture(scope="session")
def observed(simulated_nvml: Path, tmp_path_factory: pytest.TempPathFactory) -> Observed:
    """The job that many tests look at; mark them `look_at_the_observed_job`."""
    return observe(simulated_nvml, tmp_path_factory.mktemp("observed"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: where tests run side by side nothing waits for them at the end."""

    def place(item: pytest.Item) -> int:
        names = [place for place, name in enumerate(LONGEST) if f"e2e/{name}.py" in item.nodeid]
        return names[0] if names else len(LONGEST)

    items.sort(key=place)
