"""Choosing a clock for every instruction: the exact relaxation, its rounding, the frontier, the plan.

The names below load OR-Tools only when they are used for planning; `plan` and its file do not need it.
"""
