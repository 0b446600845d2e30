"""Fixtures of the end-to-end tests."""

from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]
