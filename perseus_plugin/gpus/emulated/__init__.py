"""Emulated GPUs: a calibrated model of time, power and clock changes in a file that processes share."""
