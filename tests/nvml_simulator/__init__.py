"""A simulated NVML: a C library with NVML's SONAME on top of emulated GPUs' state files."""
