"""GPUs behind one small protocol: real ones through NVML or zeusd, and emulated ones."""
