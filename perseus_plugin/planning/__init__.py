"""Choosing a clock for every instruction: the exact relaxation, its rounding, the frontier, the plan.

`plan`, `targets` and `zeus` load no solver; `planner` and what it uses load OR-Tools.
"""
