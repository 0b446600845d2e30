"""Fixtures of the end-to-end tests, and their order."""

from __future__ import annotations

import pytest

from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first: where tests run side by side nothing waits for it at the end."""
    items.sort(key=lambda item: "test_quickstart" not in item.nodeid)
