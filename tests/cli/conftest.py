from __future__ import annotations

from ..nvml_simulator.building import simulated_nvml

__all__ = ["simulated_nvml"]
