"""All jobs that share a budget: looked at, and told, one round after the other."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from perseus_plugin.cli.sharing.member import Look, Member
from perseus_plugin.errors import ConfigError, PerseusError
from perseus_plugin.planning.power.sharing import Division, next_budgets

_CONFIRMED = 1e-6  # share to within which a job holds what it was told


@dataclass(frozen=True)
class Round:
    """What one round has found and done.

    Attributes:
        budget_w: that was shared.
        looks: by job, as it was found.
        told_w: by job that could be told.
        division: that this leads to.
        problems: by job, why it did not take what it was told.
    """

    budget_w: float
    looks: Mapping[str, Look]
    told_w: Mapping[str, float]
    division: Division
    problems: Mapping[str, str]

    @property
    def held_w(self) -> float:
        """The most that all may draw together at this moment."""
        return math.fsum(look.holding.held_w + look.holding.beyond_w for look in self.looks.values())

    @property
    def on_the_way(self) -> bool:
        """Whether jobs have yet to do what they were told, so that others can be told more."""
        return any(
            abs(self.looks[name].holding.held_w - watts) > _CONFIRMED * watts for name, watts in self.told_w.items()
        ) or any(abs(self.division.watts[name] - watts) > _CONFIRMED * watts for name, watts in self.told_w.items())

    @property
    def shortfall_w(self) -> float:
        """How much more than the budget the lowest budgets, and what cannot be changed, come to; 0: they fit."""
        fixed_w = math.fsum(look.holding.held_w for look in self.looks.values() if look.holding.job is None)
        fixed_w += math.fsum(look.holding.beyond_w for look in self.looks.values())
        return max(0.0, fixed_w + self.division.lowest_w - self.budget_w)


@dataclass
class Table:
    """See the module's docstring.

    Args:
        patterns: folders of jobs, or patterns of such; looked for again in every round.
        weights: by folder as it is given, or its last name; 1 for all others.
        make: a member of a folder and its weight.
    """

    patterns: Sequence[str]
    weights: Mapping[str, float] = field(default_factory=dict)
    make: Callable[[Path, float], Member] = Member
    _members: dict[Path, Member] = field(default_factory=dict, init=False)

    def round(self, budget_w: float) -> Round:
        """Look at all jobs, and tell those that can be told what they may draw."""
        self._find()
        looks = {member.name: member.look() for member in self._members.values()}
        told, division = next_budgets([look.holding for look in looks.values()], budget_w)
        problems = {}
        # Who is to draw less hears of it first.
        by_rise = sorted(
            self._members.values(), key=lambda one: told.get(one.name, 0.0) - looks[one.name].holding.held_w
        )
        for member in by_rise:
            if member.name in told:
                try:
                    member.tell(told[member.name])
                except PerseusError as error:
                    problems[member.name] = str(error)
        return Round(budget_w, looks, told, division, problems)

    def _find(self) -> None:
        for pattern in self.patterns:
            # Not Path.glob, which takes no patterns that begin at the root.
            for found in sorted(glob.glob(pattern)) if glob.has_magic(pattern) else [pattern]:  # noqa: PTH207
                # Under one name, however often and however it is given.
                folder, known_as = Path(found), Path(found).resolve()
                if known_as not in self._members and (folder.is_dir() or not glob.has_magic(pattern)):
                    weight = self.weights.get(str(folder), self.weights.get(folder.name, 1.0))
                    self._members[known_as] = self.make(folder, weight)


def parse_weights(told: Sequence[str]) -> dict[str, float]:
    """`JOB=2`, each.

    Raises:
        ConfigError: one is something else.
    """
    weights = {}
    for one in told:
        name, equals, value = one.rpartition("=")
        try:
            weight = float(value)
        except ValueError:
            weight = math.nan
        if not equals or not (math.isfinite(weight) and weight > 0):
            raise ConfigError(f"--weight: got {one!r}; allowed: JOB=NUMBER, such as perseus_out=2, above 0")
        weights[str(Path(name))] = weight
    return weights
