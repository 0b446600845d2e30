"""A job as `perseus share` sees it: files, a socket, and targets that come in force some iterations later."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.leader.aiming import FULL_CLOCKS
from perseus_plugin.leader.job_socket import JobSocket
from perseus_plugin.leader.target_book import Goal, TargetBook
from perseus_plugin.leader.target_desk import TargetDesk
from perseus_plugin.planning.targets import Target
from perseus_plugin.reporting.live.power import Drawn
from perseus_plugin.reporting.live.summary import build_summary

SWITCH = 2  # iterations from an order to the first that follows it


class JobAtSocket:
    """See the module's docstring.

    Args:
        folder: of its files.
        points: (watts, seconds) of its frontier, one GPU per stage; the first is full clocks too.
        ranks: two stages, so there are half as many pipelines.
        now: Unix time.

    Attributes:
        draws: times what it may, or what its frontier says.
        says_it_draws: times what its profile says.
    """

    def __init__(
        self, folder: Path, points: Sequence[tuple[float, float]], ranks: int, now: Callable[[], float]
    ) -> None:
        self.folder, self._now, self._points = folder, now, points
        self.full_w = ranks / 2 * points[0][0]
        self.lowest_w = ranks / 2 * points[-1][0]
        folder.mkdir()
        self.write_frontier()
        self.summary = build_summary(
            [],
            None,
            world_size=ranks,
            stages=2,
            gpu="test GPU",
            emulated=True,
            backend="test",
            state="running",
            planning_time_s=0.0,
            dropped_plans=0,
        )
        self._write_summary()
        self._desk = TargetDesk(LocalExchange(), now=now)
        self.book = TargetBook(Target.slowdown(0.0))
        self.iteration, self._switch, self.phase = 10, 0, "following"
        self.draws, self.says_it_draws, self._drawn = 1.0, 1.0, list[float]()
        self._before, self._goal = self.book.goal, self.book.goal
        self._show()
        self._socket: JobSocket | None = JobSocket(folder, self._desk.request)

    def write_frontier(self) -> None:
        """Its frontier is there."""
        full_w, full_s = self._points[0]
        content = {
            "schema": "perseus-frontier",
            "version": 1,
            "baseline": {"iteration_time_s": full_s, "energy_j": full_w * full_s},
            "points": [
                {"deadline_s": s, "iteration_time_s": s, "energy_j": w * s, "energy_lower_bound_j": w * s}
                for w, s in self._points
            ],
        }
        (self.folder / "frontier.json").write_text(json.dumps(content))

    @property
    def drawn_w(self) -> float:
        """What it draws in the iteration that runs; nothing once it has ended."""
        if self._socket is None:
            return 0.0
        goal = self._goal if self.iteration >= self._switch else self._before
        if goal.limit is None or goal.limit.job_w is None:
            return self.draws * self.full_w
        return self.draws * max(min(goal.limit.job_w, self.full_w), self.lowest_w)

    def step(self) -> None:
        """An iteration goes by; what was said is decided on."""
        self.iteration += 1
        for entry in self._desk.collect():
            self.book.take(entry)
        self.book.expire(self._now())
        goal: Goal = FULL_CLOCKS if self.phase == "given up" else self.book.goal
        limit = None if goal.limit is None or goal.limit.or_nearest else goal.limit.job_w
        if limit is not None and limit < self.lowest_w * (1 - 1e-9):
            self.book.refuse(f"the lowest budget is {self.lowest_w} W")
        elif self.iteration >= self._switch:
            if goal != self._goal:
                self._before, self._goal, self._switch = self._goal, goal, self.iteration + SWITCH
            self.book.reached(self._switch)
        self._drawn.append(self.drawn_w)
        if self.iteration % 2 == 0:
            self._desk.measured(Drawn(sum(self._drawn[-2:]) / 2, 2.0, 2))
        self._show()

    def give_up(self) -> None:
        """It cannot control its GPUs any more."""
        self.phase = "given up"

    def end(self, state: str = "finished") -> None:
        """It ends, or is killed, which it cannot write into its summary."""
        self.summary = self.summary.model_copy(update={"state": state})
        self._write_summary()
        if self._socket is not None:
            self._socket.close()
        self._socket = None

    def _write_summary(self) -> None:
        path = self.folder / "summary.json"
        path.write_text(self.summary.to_json())
        os.utime(path, (self._now(), self._now()))

    def _show(self) -> None:
        self._desk.show(self.book, self._goal, self.phase, self.iteration, self.says_it_draws)
