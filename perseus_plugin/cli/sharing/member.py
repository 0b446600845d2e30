"""One of the jobs that share a budget, as it is seen from outside: its folder, and what it says over its socket."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from perseus_plugin.errors import PerseusError, plain
from perseus_plugin.leader.job_socket import ask, is_served
from perseus_plugin.planning.curve import FRONTIER_FILE, load_curve
from perseus_plugin.planning.power.sharing import Holding, SharingJob, SpeedCurve
from perseus_plugin.reporting.record.summary import SUMMARY_FILE, Summary, load_summary

SOURCE = "share"
"""What `perseus share` is called as a source of targets."""
SUMMARY_EVERY_S = 30.0
"""A job that lives writes its summary at least so often."""
_MORE = 1.1
"""What a job is told next, as a multiple of what it has refused."""
_LEAST_DRAWS = 0.5
"""Times what is planned that GPUs may be said to draw; its inverse is the most."""
_BEYOND = 0.01
"""Share of what a job may draw from which on more is no matter of how well that is measured."""
_LATE_S = 6.0
"""Ranks tell of what they have drawn after no longer than that."""
_FOLLOWING, _GIVEN_UP = "following", "given up"

State = Literal["shares", "no frontier yet", "cannot be told", "left to others", "refuses", "silent", "ended"]


@dataclass(frozen=True)
class Look:
    """A job at one moment.

    Attributes:
        state: what can be done with it.
        holding: what it takes part in the division as.
        reason: for people; empty where there is nothing to say.
    """

    state: State
    holding: Holding
    reason: str = ""


@dataclass
class Member:
    """See the module's docstring.

    Args:
        folder: the job's output folder.
        weight: how much its work counts.
        lasting_s: how long a budget that it is told lasts.
        now: Unix time.
    """

    folder: Path
    weight: float = 1.0
    lasting_s: float = 60.0
    now: Callable[[], float] = time.time
    _told: tuple[float, float] | None = field(default=None, init=False)  # watts, and until when
    _held_w: float | None = field(default=None, init=False)
    _gone: bool = field(default=False, init=False)
    _floor_w: float = field(default=0.0, init=False)
    _refused: object = field(default=None, init=False)  # number of what it has refused last
    _read: tuple[object, SharingJob | None] = field(default=(None, None), init=False)
    _draws: float = field(default=1.0, init=False)  # times what its frontier says, as it knows itself
    _seen: _Seen = field(default_factory=lambda: _Seen(), init=False)

    @property
    def name(self) -> str:
        """For people."""
        return str(self.folder)

    def look(self) -> Look:
        """What the job is like now."""
        summary = self._summary()
        try:
            reply = ask(self.folder, {"do": "targets"})
        except PerseusError as error:
            return self._unheard(summary, _full_w(summary, self._job(summary)), str(error))
        self._gone = False
        draws = _number(reply.get("draws", 1.0))
        draws = draws if _LEAST_DRAWS <= draws <= 1 / _LEAST_DRAWS else 1.0
        # Less is not worth another plan of every job.
        self._draws = draws if abs(draws / self._draws - 1) > _BEYOND else self._draws
        job = self._job(summary)
        full_w = _full_w(summary, job)
        lowest_w = 0.0 if job is None else job.curve.lowest_w
        held_w = held(reply, full_w, self._held_w, lowest_w)
        others = [one for one in _entries(reply) if one["limit"] is not None and _commands(one) != SOURCE]
        phase = _part(reply, "in_force").get("phase")
        self._held_w = held_w
        self._seen.look(reply, full_w, lowest_w, self.now())
        if phase == _GIVEN_UP:
            return self._fixed("cannot be told", full_w, "it stays at full clocks")
        if job is None:
            return self._fixed("no frontier yet", held_w, f"{FRONTIER_FILE} is not there")
        if others:
            return self._fixed("left to others", held_w, f"{plain(str(others[-1].get('source')))} has limited it")
        last = _newest(reply)
        if last.get("state") == "refused" and self._told is not None:
            if self.now() >= self._told[1]:
                self._floor_w = 0.0  # all is tried again
            elif self._told[0] >= job.curve.most_w:
                return self._fixed("refuses", held_w, plain(str(last.get("reason"))))
            elif last.get("number") != self._refused:
                # It gets less far down than its frontier says. One that is told nothing would run at full clocks.
                self._refused, self._floor_w = last.get("number"), _MORE * self._told[0]
        job = replace(job, curve=job.curve.above(self._floor_w))
        return Look("shares", Holding(self.name, job, held_w, self._seen.beyond_w))

    def tell(self, watts: float) -> None:
        """Tell the job what it may draw from now on.

        Raises:
            PerseusError: it does not take that.
        """
        # What it may hold from now on, whether its answer comes or not.
        self._held_w = max(watts, self._held_w or 0.0)
        self._told = watts, self.now() + self.lasting_s
        ask(self.folder, {"do": "target", "target": _say(watts, self.lasting_s)})

    def _unheard(self, summary: Summary | None, full_w: float, why: str) -> Look:
        """It does not answer: what it was told last holds until that has expired."""
        served = is_served(self.folder)
        if not served and (self._gone or (summary is not None and summary.state != "running")):
            return self._ended()
        if self._told is not None and self._held_w is not None:
            held_w, until_s = self._held_w, self._told[1]
        else:
            held_w, until_s = full_w, self._written_s() + SUMMARY_EVERY_S + self.lasting_s
        if self.now() < until_s:
            return self._fixed("silent", held_w, f"kept for it for {until_s - self.now():.0f} s: {why}")
        if served:
            return self._fixed("silent", full_w, f"it may be at full clocks: {why}")
        return self._ended()

    def _ended(self) -> Look:
        self._gone, self._told, self._held_w, self._read = True, None, None, (None, None)
        self._seen = _Seen()
        return Look("ended", Holding(self.name, None, 0.0))

    def _fixed(self, state: State, held_w: float, reason: str) -> Look:
        if held_w == 0:
            reason += ", and what it draws is not known, and not in the sum"
        return Look(state, Holding(self.name, None, held_w, self._seen.beyond_w), reason)

    def _summary(self) -> Summary | None:
        try:
            return load_summary(self.folder / SUMMARY_FILE)
        except PerseusError:
            return None

    def _job(self, summary: Summary | None) -> SharingJob | None:
        path = self.folder / FRONTIER_FILE
        try:
            status = path.stat()
            seen = (status.st_mtime_ns, status.st_ino)
            if seen != self._read[0] and summary is not None:
                curve = SpeedCurve.from_frontier(load_curve(path), summary.ranks / summary.stages)
                self._floor_w = 0.0
                self._read = (seen, SharingJob(self.name, curve, self.weight * summary.ranks))
        except FileNotFoundError:
            pass  # a job that makes another one has none meanwhile: the one before holds until that is there
        except (OSError, PerseusError):
            pass  # it is made anew for a newer plan: until then the one before is as good
        job = self._read[1]
        return None if job is None else replace(job, curve=job.curve.drawn(self._draws))

    def _written_s(self) -> float:
        try:
            return (self.folder / SUMMARY_FILE).stat().st_mtime
        except OSError:
            return -math.inf


@dataclass
class _Seen:
    """What a job was seen to draw beyond what it may: by figures that are of what is in force alone.

    Attributes:
        beyond_w: until it is seen otherwise.
    """

    beyond_w: float = 0.0
    _may_w: float = math.nan
    _since_s: float = 0.0
    _until_s: float = 0.0

    def look(self, reply: Mapping[str, Any], full_w: float, lowest_w: float, now_s: float) -> None:
        """What it tells now, to `targets`; see `held`."""
        in_force, drawn = _part(reply, "in_force"), _part(reply, "drawn")
        follows = in_force.get("phase") == _FOLLOWING
        may_w = _watts(in_force, full_w, lowest_w) if follows else full_w
        if may_w != self._may_w or not follows or _is_on_its_way(reply):
            self._may_w, self._since_s = may_w, now_s
        self.beyond_w = self.beyond_w if follows else 0.0
        power_w, over_s, until_s = (_number(drawn.get(name)) for name in ("power_w", "over_s", "until"))
        if until_s <= self._until_s or not until_s - over_s - _LATE_S > self._since_s or not power_w > 0:
            return
        self._until_s = until_s
        beyond_w = power_w - may_w if power_w > (1 + _BEYOND) * may_w else 0.0
        if not beyond_w or abs(beyond_w - self.beyond_w) > _BEYOND * may_w:
            self.beyond_w = beyond_w


def _is_on_its_way(reply: Mapping[str, Any]) -> bool:
    """Whether something is ordered and not yet in force."""
    iteration = _number(reply.get("iteration"))
    return any(_number(one.get("iteration")) > iteration for one in _listed(reply, "outcomes"))


def held(reply: Mapping[str, Any], full_w: float, before_w: float | None, lowest_w: float = 0.0) -> float:
    """The most that a job may draw until it is known otherwise.

    Args:
        reply: of the job, to `targets`.
        full_w: what it draws at full clocks.
        before_w: the same as this at the last look, None: there was none.
        lowest_w: what it draws at the lowest, where a limit that it can only come near to asks for less.
    """
    in_force = _part(reply, "in_force")
    watts = [_watts(in_force, full_w, lowest_w) if in_force.get("phase") == _FOLLOWING else full_w]
    watts += [
        _watts(one, full_w, lowest_w)
        for one in _entries(reply)
        if one.get("source") == SOURCE and one["limit"] is not None
    ]
    if _is_on_its_way(reply):
        # Ordered, and not yet in force: what was before still is.
        watts.append(full_w if before_w is None else before_w)
    return max(watts)


def _say(watts: float, lasting_s: float) -> dict[str, Any]:
    return {"power_budget_w": watts, "for_s": lasting_s, "source": SOURCE}


def _full_w(summary: Summary | None, job: SharingJob | None) -> float:
    """What a job draws at full clocks, by its frontier or as it was measured; 0: not known."""
    if job is not None:
        return job.curve.full_w
    if summary is None or not summary.energy_j.full_clock or not summary.iteration_time_s.full_clock:
        return 0.0
    return summary.energy_j.full_clock / summary.iteration_time_s.full_clock


def _newest(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    """What became of what we said last."""
    ours = [one for one in _listed(reply, "outcomes") if one.get("source") == SOURCE]
    return max(ours, key=lambda one: _number(one.get("number")), default={})


def _entries(reply: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """What sources say, and what of that no iteration has seen yet."""
    for one in (*_listed(reply, "entries"), *_listed(reply, "heard")):
        yield {"limit": None, **one}


def _commands(entry: Mapping[str, Any]) -> object:
    """Whose command it is; ours for what stands below commands anyway."""
    return entry.get("source") if entry.get("standing") == "command" else SOURCE


def _watts(said: Mapping[str, Any], full_w: float, lowest_w: float) -> float:
    limit = said.get("limit")
    if not isinstance(limit, dict) or limit.get("job_w") is None:
        return full_w
    watts = max(_number(limit["job_w"]), lowest_w if limit.get("or_nearest") else -math.inf)
    # A limit above what it draws at full clocks keeps nothing from others.
    return min(watts, full_w) if full_w > 0 else watts


def _part(reply: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = reply.get(name)
    return part if isinstance(part, dict) else {}


def _listed(reply: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    told = reply.get(name)
    return [one for one in told if isinstance(one, dict)] if isinstance(told, list) else []


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else -math.inf
