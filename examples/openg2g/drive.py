"""OpenG2G, a simulator of data centres and the grid, drives a training job: it takes power where voltage falls.

The job is a data centre of OpenG2G's at the end of a feeder that OpenDSS computes. After a while a works beside it is
turned on: the voltage falls below its limit, a controller lowers the job's power budget, the job follows, and the
voltage is back within its limit. The works is turned off, the controller takes its word back, and the job is as fast as
before. The simulation runs in real time, as the job does. Should it die, its word ends by itself.

    pip install 'openg2g[opendss]'    # 0.2.0.post1 was tried
    python examples/openg2g/drive.py perseus_out

It knows the job by its socket only (docs/targets.md) and needs nothing of perseus_plugin. As one job of a few GPUs
moves no feeder, the site runs as many jobs like it as draw `--site-mw` together.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from openg2g.clock import SimulationClock
from openg2g.common import ThreePhase
from openg2g.controller.base import Controller
from openg2g.coordinator import Coordinator
from openg2g.datacenter.base import DatacenterBackend, DatacenterState
from openg2g.datacenter.command import DatacenterCommand
from openg2g.events import EventEmitter
from openg2g.grid.command import GridCommand
from openg2g.grid.load import ExternalLoad
from openg2g.grid.opendss import OpenDSSGrid

sys.path.append(str(Path(__file__).resolve().parents[1] / "targets"))
from client import ask

SOURCE = "grid"
SITE = "site"  # a bus of the feeder
SECOND = Fraction(1)
HOLDS_S, RENEWED_S = 30.0, 10.0  # how long a word holds, and how often it is said again


@dataclass(frozen=True)
class SetPowerBudget(DatacenterCommand):
    """So many watts may the whole site draw; None: as many as it likes."""

    power_w: float | None
    target: DatacenterBackend = field(kw_only=True)


class TrainingSite(DatacenterBackend[DatacenterState]):
    """A site whose jobs are all like one that runs.

    Args:
        folder: of that job.
        site_w: that all of them draw together when the simulation begins.
    """

    def __init__(self, folder: str, site_w: float) -> None:
        super().__init__(name="training")
        self._folder, self._site_w = folder, site_w
        self._jobs = 0.0

    @property
    def dt_s(self) -> Fraction:
        """It is asked once a second."""
        return SECOND

    def reset(self) -> None:
        """How many jobs there are is seen when the simulation begins."""
        self._jobs = 0.0

    def step(self, clock: SimulationClock, events: EventEmitter) -> DatacenterState:
        """What the job has drawn lately, times the jobs."""
        drawn_w = ask(self._folder, {"do": "targets"})["drawn"]["power_w"]
        self._jobs = self._jobs or self._site_w / drawn_w
        each_w = self._jobs * drawn_w / 3
        return DatacenterState(time_s=clock.time_s, power_w=ThreePhase(each_w, each_w, each_w))

    def apply_control(self, command: DatacenterCommand, events: EventEmitter) -> None:
        """Tell the job."""
        assert isinstance(command, SetPowerBudget)
        if command.power_w is None:
            ask(self._folder, {"do": "clear_target", "source": SOURCE})
        else:
            budget = {"power_budget_w": command.power_w / self._jobs, "for_s": HOLDS_S, "source": SOURCE}
            ask(self._folder, {"do": "target", "target": budget})
        events.emit("training.power_budget", {"power_w": command.power_w})


class VoltageKeeper(Controller[TrainingSite, OpenDSSGrid]):
    """Lowers the site's power budget while the voltage is low.

    Args:
        site, grid: what it controls, and looks at.
        low, back: voltages (per unit) below which it begins, and above which it ends; the second must not be reached by
            the lower power alone.
        share: of the power that is drawn when it begins.
    """

    def __init__(self, site: TrainingSite, grid: OpenDSSGrid, low: float, back: float, share: float) -> None:
        self._site, self._grid, self._low, self._back, self._share = site, grid, low, back, share
        self.budget_w: float | None = None
        self._said_s = 0.0

    @property
    def dt_s(self) -> Fraction:
        """It looks once a second."""
        return SECOND

    def reset(self) -> None:
        """Nothing is said."""
        self.budget_w, self._said_s = None, 0.0

    def step(self, clock: SimulationClock, events: EventEmitter) -> list[DatacenterCommand | GridCommand]:
        """What is to be said now."""
        voltage, now_s = voltage_at(self._grid), clock.time_s
        if self.budget_w is None and voltage < self._low:
            drawn = self._site.state.power_w
            self.budget_w = self._share * (drawn.a + drawn.b + drawn.c)
        elif self.budget_w is not None and voltage > self._back:
            self.budget_w = None
        elif self.budget_w is None or now_s < self._said_s + RENEWED_S:
            return []
        self._said_s = now_s
        return [SetPowerBudget(self.budget_w, target=self._site)]


class Works(ExternalLoad):
    """Draws its power (kW in each phase) for a while."""

    def __init__(self, power_kw: float, begin_s: float, end_s: float) -> None:
        self._power_kw, self._begin_s, self._end_s = power_kw, begin_s, end_s

    def power_kw(self, t: float) -> float:
        """See the class."""
        return self._power_kw if self._begin_s <= t < self._end_s else 0.0


def voltage_at(grid: OpenDSSGrid) -> float:
    """The lowest of the site's three phases, per unit."""
    phases = grid.state.voltages[SITE]
    return min(phases.a, phases.b, phases.c)


def wait_until_it_follows_a_plan(folder: str) -> None:
    """A job measures its instructions before it can keep a budget; after that, until figures are of the plan alone."""
    seen: list[object] = []
    while len(seen) < 3:
        told = ask(folder, {"do": "targets"})
        following = told.get("in_force", {}).get("phase") == "following" and told["drawn"] is not None
        if following and told["drawn"] not in seen:
            seen.append(told["drawn"])
        time.sleep(0.5)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", help="the job's output folder")
    parser.add_argument("--site-mw", type=float, default=2.4, help="that the site draws at first")
    parser.add_argument("--works-mw", type=float, default=2.4, help="that the works draws")
    parser.add_argument("--begin", type=int, default=15, help="second at which it is turned on")
    parser.add_argument("--end", type=int, default=45, help="second at which it is turned off")
    parser.add_argument("--seconds", type=int, default=65, help="of the whole simulation")
    parser.add_argument("--share", type=float, default=0.8, help="of its power that the site keeps meanwhile")
    parser.add_argument("--low", type=float, default=0.95, help="voltage (per unit) to keep")
    parser.add_argument("--back", type=float, default=0.97, help="voltage (per unit) at which all is well again")
    parser.add_argument("--log", help="where to write every second, a JSON object a line")
    options = parser.parse_args()
    folder = str(Path(options.folder).resolve())  # OpenDSS changes the working folder
    log = Path(options.log).resolve() if options.log else None
    wait_until_it_follows_a_plan(folder)

    site = TrainingSite(folder, 1e6 * options.site_mw)
    grid = OpenDSSGrid(dss_case_dir=Path(__file__).parent, dss_master_file="feeder.dss", dt_s=SECOND)
    grid.attach_dc(site, bus=SITE)
    grid.attach_load(Works(1e3 * options.works_mw / 3, options.begin, options.end), bus=SITE)
    keeper = VoltageKeeper(site, grid, options.low, options.back, options.share)
    simulation = Coordinator(
        datacenters=[site], grid=grid, controllers=[keeper], total_duration_s=options.seconds, live=True
    )
    lines = []
    print("second  voltage  site MW  budget MW  in force")
    for tick in simulation.run_iter():
        power = site.state.power_w
        site_mw = (power.a + power.b + power.c) / 1e6
        budget_mw = None if keeper.budget_w is None else keeper.budget_w / 1e6
        told = ask(folder, {"do": "targets"})
        says, mine = told["in_force"]["says"], [one for one in told["outcomes"] if one["source"] == SOURCE]
        if mine and mine[-1]["state"] == "refused":
            says += f" (refused: {mine[-1]['reason']})"
        line = {"t_s": tick.t_s, "voltage": voltage_at(grid), "site_mw": site_mw, "budget_mw": budget_mw, "says": says}
        lines.append(line)
        if tick.sim_events or tick.t_s % 5 == 0:
            budget = "-" if budget_mw is None else f"{budget_mw:.3f}"
            print(f"{tick.t_s:6.0f}  {line['voltage']:7.4f}  {site_mw:7.3f}  {budget:>9}  {says}", flush=True)
    if log is not None:
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
