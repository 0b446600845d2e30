"""What each iteration runs at: warm-up, the profiling sweep, and the switches agreed on later.

Pure: an iteration number in, a directive out. Every rank builds the same timetable, so that nothing need be said until
there is a plan.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from perseus_plugin.iteration.references import is_reference

_SWITCHES_KEPT = 8  # the one in force, and those that have not begun yet: never more than a few


class RanAs(str, enum.Enum):
    """What an iteration runs, or ran, as: the one vocabulary for it. Files and messages have words of their own."""

    WARM_UP = "warm-up"
    PROFILING = "profiling"
    FULL = "full"
    PLAN = "plan"
    STRAGGLER = "straggler"
    """Under a plan for a straggler's pace."""
    REFERENCE = "reference"
    """At full clocks amid iterations under a plan."""
    UNKNOWN = "unknown"
    """At whatever clock somebody else has set."""


@dataclass(frozen=True, slots=True)
class FullClock:
    """No lock: the iteration runs as without the plugin.

    Attributes:
        reason: why, for people.
        ran_as: what it counts as.
    """

    reason: str
    ran_as: RanAs = RanAs.FULL

    @property
    def identity(self) -> object:
        """Equal for iterations that run alike."""
        return None


WARM_UP = FullClock("warm-up", RanAs.WARM_UP)
"""Before the first sweep."""

PLANNING = FullClock("planning")
"""After a sweep, until there is a plan."""

REFERENCE = FullClock("reference", RanAs.REFERENCE)
"""Full clocks amid iterations under a plan, for the plan to be compared with."""

NOT_OURS = FullClock("another session or job sets the clock of this GPU", RanAs.UNKNOWN)
"""Nothing is asked for; what the iteration runs at is not known here."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """The whole iteration at one clock, to be measured.

    Attributes:
        block: index into the sweep's list of clocks.
        frequency_mhz: the clock.
        kept: False while the clock settles.
        round: of profiling, see `Round`.
        paired: other stages run at other clocks.
    """

    block: int
    frequency_mhz: int
    kept: bool
    round: int = 0
    paired: bool = False

    @property
    def identity(self) -> object:
        """Equal for iterations that run alike."""
        return (self.round, self.block, self.frequency_mhz)

    @property
    def ran_as(self) -> RanAs:
        """What it counts as."""
        return RanAs.PROFILING

    def is_full(self, top_mhz: int) -> bool:
        """Whether the whole job runs at this clock, the highest."""
        return self.frequency_mhz == top_mhz and not self.paired


@dataclass(frozen=True, slots=True)
class Follow:
    """The iteration follows the plan of its schedule in this set of plans; without one it runs at full clocks.

    Attributes:
        version: of the set.
        straggler: it is followed because of a straggler; changes nothing but what the iteration counts for.
        since: see `messages.News`.
        limited: no iteration may run at full clocks, as they draw more than is allowed.
        batch: this one follows a plan of its own, made for its batch, in the place of that in the set.
    """

    version: int
    straggler: bool = False
    since: int = 0
    limited: bool = False
    batch: bool = False

    @property
    def ran_as(self) -> RanAs:
        """What it counts as."""
        return RanAs.STRAGGLER if self.straggler else RanAs.PLAN

    @property
    def has_references(self) -> bool:
        """Whether iterations at full clocks are run amid those that follow."""
        # At a straggler's pace full clocks are no measure: the straggler is waited for either way.
        return not (self.straggler or self.limited)

    @property
    def identity(self) -> object:
        """Equal for iterations that run alike."""
        return self.version


Directive: TypeAlias = FullClock | Sweep | Follow


@dataclass(frozen=True, slots=True)
class Round:
    """A sweep: blocks of iterations, each at one clock.

    Attributes:
        first: first iteration.
        clocks_mhz: in the order they are tried.
        number: which round of profiling it is, from 0.
        paired: in each block only every other stage tries a clock, the others run at the highest, see `paired_clocks`.
    """

    first: int
    clocks_mhz: tuple[int, ...]
    number: int = 0
    paired: bool = False


@dataclass(frozen=True)
class Timetable:
    """Which directive holds for which iteration. Immutable, so that another thread can replace it whole.

    Attributes:
        sweep: the profiling sweep; what comes before it is warm-up.
        settle_steps: iterations discarded at each of its clocks.
        steps_per_clock: iterations kept at each of them.
        switches: (first iteration, directive), by rising iteration; the last one that has begun holds.
        reference_share: of iterations under a plan, see `iteration.references`.
    """

    sweep: Round
    settle_steps: int
    steps_per_clock: int
    switches: tuple[tuple[int, Directive], ...] = ()
    reference_share: float = 0.0

    @property
    def steps_per_block(self) -> int:
        """Iterations per clock, settling included."""
        return self.settle_steps + self.steps_per_clock

    @property
    def sweep_end(self) -> int:
        """First iteration after the sweep."""
        return self.sweep.first + self.steps_per_block * len(self.sweep.clocks_mhz)

    def at(self, iteration: int) -> Directive:
        """The directive of this iteration."""
        for first, directive in reversed(self.switches):
            if iteration >= first:
                return REFERENCE if self._is_reference(directive, iteration) else directive
        if iteration < self.sweep.first:
            return WARM_UP if self.sweep.number == 0 else PLANNING
        if iteration < self.sweep_end:
            block, step = divmod(iteration - self.sweep.first, self.steps_per_block)
            round_ = self.sweep
            return Sweep(block, round_.clocks_mhz[block], step >= self.settle_steps, round_.number, round_.paired)
        return PLANNING

    def _is_reference(self, directive: Directive, iteration: int) -> bool:
        if not isinstance(directive, Follow) or not directive.has_references:
            return False
        return is_reference(iteration - directive.since, self.reference_share)

    def switched(self, first: int, directive: Directive) -> Timetable:
        """The timetable with one more switch; earlier ones that begin later are superseded."""
        kept = tuple(switch for switch in self.switches if switch[0] < first)
        return replace(self, switches=(*kept[-_SWITCHES_KEPT:], (first, directive)))

    def swept_again(self, first: int, clocks_mhz: tuple[int, ...], paired: bool = False) -> Timetable:
        """The timetable with another round of the sweep, and full clocks until it begins."""
        return replace(self, sweep=Round(first, clocks_mhz, self.sweep.number + 1, paired), switches=())


def paired_clocks(clocks_mhz: Sequence[int], top_mhz: int, stage: int) -> tuple[int, ...]:
    """What a stage runs at in the blocks of a paired round, two for every clock that is tried.

    In the first of them the stages of even number try the clock, in the second the others; who does not try runs at the
    highest clock. So every step's size is seen at the highest clock by half of the stages.
    """
    return tuple(clock if stage % 2 == turn else top_mhz for clock in clocks_mhz for turn in (0, 1))


def nearest_clocks(supported_mhz: Sequence[int], wanted_mhz: Sequence[int]) -> tuple[int, ...]:
    """Each wanted clock moved to the nearest supported one, in the same order; two may fall together."""
    return tuple(min(supported_mhz, key=lambda clock: abs(clock - wanted)) for wanted in wanted_mhz)
