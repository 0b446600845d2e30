"""The colours of all pictures, whoever draws them."""

from __future__ import annotations

TEXT = "#1c2733"
MUTED = "#5b6875"
GRID = "#e3e7eb"
WAITING = "#e4e8ec"
BOUND = "#8995a1"
BLUE, RED, GREEN, VIOLET, AMBER = "#2f6fb2", "#c8442c", "#2f8f57", "#8e6bb8", "#d08a1d"
SERIES = (BLUE, RED, GREEN, VIOLET, AMBER, "#17899b", "#b5507f", "#6b7682")
"""Of lines that are of one kind, one after the other."""
CLOCKS = ["#5aa5d6", "#9bd0c3", "#f2e394", "#f6b26b", "#ea6a47"]
"""From the lowest clock to the highest; dark text is legible on all of them."""
