from __future__ import annotations

from .building import simulated_nvml

__all__ = ["simulated_nvml"]
