"""Measuring time and energy of instructions at several clocks, and the table that holds the result."""
