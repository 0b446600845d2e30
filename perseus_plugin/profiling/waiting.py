"""What a GPU draws while it waits, by its SM clock. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True)
class WaitingPower:
    """Power of one stage's GPU while it waits (blocking power), as a function of the SM clock.

    Between the clocks it is read off the straight line, outside of them it is that of the nearest.

    Attributes:
        clocks_mhz: shape (clocks,), rising; at least one.
        power_w: shape (clocks,).
    """

    clocks_mhz: tuple[int, ...]
    power_w: tuple[float, ...]

    @classmethod
    def constant(cls, power_w: float) -> WaitingPower:
        """The same at every clock."""
        return cls((1,), (power_w,))

    @property
    def lowest_w(self) -> float:
        """The least that waiting takes, at whatever clock."""
        return min(self.power_w)

    @property
    def is_constant(self) -> bool:
        """Whether the clock makes no difference."""
        return max(self.power_w) == min(self.power_w)

    def at_w(self, frequency_mhz: float) -> float:
        """While the clock is this."""
        return float(np.interp(frequency_mhz, self.clocks_mhz, self.power_w))

    def cheapest_mhz(self, among: Sequence[int]) -> int:
        """The clock to wait at: of the cheapest the highest, from which it is the shortest way back.

        Args:
            among: clocks to choose from; at least one.
        """
        return max(among, key=lambda clock: (-self.at_w(clock), clock))
