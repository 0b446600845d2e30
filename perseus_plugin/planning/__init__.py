"""Choosing a clock for every instruction: the exact relaxation, its rounding, the frontier, the plan."""
