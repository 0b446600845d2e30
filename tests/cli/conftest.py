from __future__ import annotations

from tests.nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]
