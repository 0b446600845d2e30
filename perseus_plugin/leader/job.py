"""What a session is about on one rank: found out before it starts, and the same from then on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perseus_plugin.config import PerseusConfig
from perseus_plugin.control.selection import Selection
from perseus_plugin.exchange.messages import Placement
from perseus_plugin.exchange.store import Exchange
from perseus_plugin.iteration.timetable import Timetable
from perseus_plugin.leader.signals.desk import SignalDesk
from perseus_plugin.profiling.known import Known


@dataclass(frozen=True)
class Job:
    """See the module's docstring.

    Attributes:
        config: the `perseus` block.
        placement: where this rank sits.
        exchange: to all ranks.
        output_dir: where this session's files go.
        selection: the rank's GPU, and whether its clock will be set.
        known: what is known of instructions before anything is measured.
        timetable: with the first round of the sweep.
        full_sweep_mhz: the sweep to make if a kept profile turns out not to fit.
        facts: what makes this rank's part of the job what it is, for the records.
        signals: what is asked of the job by time, on rank 0; None: nothing is.
    """

    config: PerseusConfig
    placement: Placement
    exchange: Exchange
    output_dir: Path
    selection: Selection
    known: Known
    timetable: Timetable
    full_sweep_mhz: tuple[int, ...] = ()
    facts: Mapping[str, str] | None = None
    signals: SignalDesk | None = None

    @property
    def gpu_facts(self) -> dict[str, Any]:
        """The rank's GPU, as records and metrics name it."""
        return {
            "gpu": self.selection.name,
            "backend": self.selection.backend,
            "emulated": self.selection.emulated,
        }

    @property
    def summary_facts(self) -> dict[str, Any]:
        """What the job runs on, for its summary and its publishers."""
        return {"world_size": self.placement.world_size, "stages": self.placement.stages, **self.gpu_facts}

    @property
    def top_mhz(self) -> int:
        """The highest clock of the sweep; 0 without one."""
        return max(self.timetable.sweep.clocks_mhz, default=0)

    @property
    def plans(self) -> bool:
        """Whether plans will be made; not where no clock can be set."""
        return bool(self.timetable.sweep.clocks_mhz)
