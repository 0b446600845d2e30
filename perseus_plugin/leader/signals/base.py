"""The seam to signals: a target, and what energy is worth, as functions of time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.bill import Worth


class Signal(Protocol):
    """What somebody outside wants of the job, and what energy is worth to them, by time.

    Everything is a function of its arguments alone: the same moment has the same answer, whenever and however often it
    is asked for, and every answer comes at once. What changes over the years is read when the signal is made; where one
    of `files` has changed since, another signal is made from the same options, on rank 0, while the job runs. Times are
    Unix seconds.
    """

    @property
    def files(self) -> Sequence[Path]:
        """What it was made from."""
        ...

    def target(self, unix_s: float) -> Target | None:
        """What it asks for at this moment: a power budget limits the job, anything else is a wish. None: nothing."""
        ...

    def worth(self, unix_s: float) -> Worth:
        """What energy is worth at this moment, as far as it tells."""
        ...

    def next_change(self, unix_s: float) -> float:
        """The first moment after this one at which one of the two may be another; infinity: they stay."""
        ...


class SignalKind(Protocol):
    """Makes signals of one kind."""

    def __call__(self, options: Mapping[str, Any], where: str) -> Signal:
        """Make one.

        Args:
            options: what the configuration says of it beside its `source`. Where that is a `file`, it is a whole path.
            where: how the configuration calls the options, for error messages.

        Raises:
            ConfigError: something in them, or in a file that they name, is wrong.
        """
        ...


@dataclass(frozen=True)
class SignalInMemory:
    """From pairs of a moment and what holds from then on; before the first, nothing does.

    Attributes:
        targets: with rising moments.
        worths: with rising moments.
    """

    targets: Sequence[tuple[float, Target | None]] = ()
    worths: Sequence[tuple[float, Worth]] = ()

    @property
    def files(self) -> Sequence[Path]:
        """See `Signal`."""
        return ()

    def target(self, unix_s: float) -> Target | None:
        """See `Signal`."""
        return next((target for since, target in reversed(self.targets) if since <= unix_s), None)

    def worth(self, unix_s: float) -> Worth:
        """See `Signal`."""
        return next((worth for since, worth in reversed(self.worths) if since <= unix_s), Worth())

    def next_change(self, unix_s: float) -> float:
        """See `Signal`."""
        moments = [since for since, _ in (*self.targets, *self.worths)]
        return min((since for since in moments if since > unix_s), default=math.inf)
