"""What a running job is to aim at: who has said what, what of it is in force, and what became of the rest. Pure.

Each source has one say: what it said last. A say has a wish (how fast), a limit (a power budget), or both.

- A limit binds whatever is wished: the wish is followed as far as it keeps the limit, and beyond that the job is as
  fast as the limit allows.
- Of wishes, and of limits, that of the highest standing is in force: a command's (a person, a scheduler, a program)
  before a signal's, a signal's before the configuration's. Of the same standing the newest is.
- One that has an end gives way then, one that is taken back at once; what stood behind it is in force again.
- One that cannot be planned for is refused, and what its source had in force before is its word again: a limit that is
  too tight must not end in none.
"""

from __future__ import annotations

import enum
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model

from perseus_plugin.errors import PerseusError, PlanError, validation_problem
from perseus_plugin.iteration.bounds import MOST_S, MOST_SLOWDOWN
from perseus_plugin.iteration.words import parse_share, parse_watts
from perseus_plugin.planning.power.budget import PowerBudget
from perseus_plugin.planning.targets import Prices, Target

CONFIG = "perseus block"
"""Source of what the configuration says."""
EVERYONE = ""
"""In the place of a source: all that have said something by a command."""
LAST_TIME = 1e10  # Unix seconds: some three hundred years
_OUTCOMES_KEPT = 256
_SOURCES_AT_MOST = 64


_FORBID = ConfigDict(extra="forbid", allow_inf_nan=False)


class TargetError(PerseusError):
    """What is said is refused; the message is the reason."""


class Standing(enum.IntEnum):
    """Whose word stands above whose."""

    CONFIG = 0
    SIGNAL = 1
    COMMAND = 2


def _share(told: object) -> object:
    return parse_share(told) if isinstance(told, str) else told


def _budget(told: object) -> object:
    """Watts of the job in numbers or words, or the whole of a budget as an object."""
    if isinstance(told, (str, int, float)) and not isinstance(told, bool):
        return PowerBudget(parse_watts(told))
    return _object(PowerBudget, told, "power_budget_w")


def _prices(told: object) -> object:
    return _object(Prices, told, "money")


def _object(kind: type[Any], told: object, name: str) -> object:
    """From plain data where it is some; in a model of its own, as a strict one takes no lists and objects for ours."""
    if not isinstance(told, dict):
        return told
    model: type[BaseModel] = create_model("told", __config__=_FORBID, **{name: (kind, ...)})  # type: ignore[call-overload]
    try:
        return getattr(model.model_validate({name: told}), name)
    except ValidationError as error:
        raise PlanError(validation_problem(error, model)) from None


class Say(BaseModel):
    """What a source says, as it comes from outside; without a wish and a limit it takes back what the source said.

    Attributes:
        slowdown: wish: share by which an iteration may be longer than at full clocks, or words such as `10 %`.
        deadline_s: wish: an iteration may take so long.
        cheapest: wish: least energy, however long an iteration takes.
        money: wish: least cost, at these prices.
        full: wish: full clocks, nothing is slowed, for stragglers neither.
        power_budget_w: limit: average power that the job may draw, in watts or words such as `180kW`; or an object as
            `PowerBudget`.
        until: Unix time at which it ends by itself.
        for_s: or so many seconds after it was said.
        source: who says so.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    slowdown: Annotated[float, Field(ge=0, le=MOST_SLOWDOWN), BeforeValidator(_share)] | None = None
    deadline_s: Annotated[float, Field(gt=0, le=MOST_S)] | None = None
    cheapest: bool = False
    money: Annotated[Prices, BeforeValidator(_prices)] | None = None
    full: bool = False
    power_budget_w: Annotated[PowerBudget, BeforeValidator(_budget)] | None = None
    until: Annotated[float, Field(le=LAST_TIME)] | None = None
    for_s: Annotated[float, Field(gt=0, le=LAST_TIME)] | None = None
    source: Annotated[str, Field(min_length=1, max_length=64)] = "python"

    @property
    def wish(self) -> Target | None:
        """What is wished; None: nothing."""
        if self.slowdown is not None:
            return Target.slowdown(self.slowdown)
        if self.deadline_s is not None:
            return Target.deadline(self.deadline_s)
        if self.money is not None:
            return Target.money(self.money)
        return Target.cheapest() if self.cheapest else Target.full() if self.full else None


def check_say(value: object, now_s: float) -> Say:
    """Check what has arrived.

    Args:
        value: a say as plain data.
        now_s: Unix time.

    Raises:
        TargetError: naming the first thing that is wrong, the value given and what is allowed.
    """
    try:
        said = Say.model_validate(value)
    except ValidationError as error:
        raise TargetError(f"malformed target: {validation_problem(error, Say)}") from None
    except PlanError as error:
        raise TargetError(f"malformed target: {error}") from None
    wishes = [said.slowdown is not None, said.deadline_s is not None, said.cheapest, said.money is not None, said.full]
    if sum(wishes) > 1:
        raise TargetError("malformed target: allowed: one of slowdown, deadline_s, cheapest, money and full")
    if said.until is not None and said.for_s is not None:
        raise TargetError("malformed target: allowed: either until or for_s")
    if said.until is not None and said.until <= now_s:
        raise TargetError(f"until: got {said.until:.0f}, which has passed")
    if not said.source.isprintable() or said.source == CONFIG:
        raise TargetError(f"source: allowed: printable text other than {CONFIG!r}")
    return said


@dataclass(frozen=True)
class Entry:
    """What one source said last.

    Attributes:
        number: counts up over all that is said; 0: of the configuration.
        source: who said it.
        standing: above whose word it stands.
        wish: how fast; None: it says nothing of that.
        limit: what must not be exceeded; None: it says nothing of that.
        since, until: Unix times; until None: it has no end.
    """

    number: int
    source: str
    standing: Standing
    wish: Target | None = None
    limit: PowerBudget | None = None
    since: float = 0.0
    until: float | None = None

    @property
    def key(self) -> tuple[Standing, str]:
        """Whose newest word it is."""
        return self.standing, self.source

    @property
    def says_nothing(self) -> bool:
        """It takes back what its source said."""
        return self.wish is None and self.limit is None

    def to_dict(self) -> dict[str, Any]:
        """For people and programs; plain JSON data."""
        return {
            "number": self.number,
            "source": self.source,
            "standing": self.standing.name.lower(),
            "wish": None if self.wish is None else self.wish.to_dict(),
            "limit": None if self.limit is None else asdict(self.limit),
            "says": " and ".join(described(of) for of in (self.wish, self.limit) if of is not None) or "nothing",
            "since": self.since,
            "until": self.until,
        }


@dataclass(frozen=True)
class Goal:
    """What plans are made for: a wish, within a limit.

    Attributes:
        wish, limit: see `Entry`.
        draws: how many times what a plan says GPUs are known to draw.
    """

    wish: Target
    limit: PowerBudget | None = None
    draws: float = 1.0

    @property
    def is_full(self) -> bool:
        """Nothing is to be slowed, and no plan is needed for that."""
        return self.wish.kind == "full" and self.limit is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"wish": self.wish.to_dict(), "limit": None if self.limit is None else asdict(self.limit)}

    def __str__(self) -> str:
        return described(self.wish) + ("" if self.limit is None else f", within {described(self.limit)}")


@dataclass(frozen=True)
class Outcome:
    """What became of something that was said.

    Attributes:
        number, source, says: what it was; see `Entry`.
        state: waiting for its plan; in force; behind what stands above it; or gone: superseded by a newer word of its
            source, refused, or ended (its time was over, or it was taken back).
        iteration: from which on it is, or was, in force; None: it never was.
        reason: why, for people.
    """

    number: int
    source: str
    says: str
    state: Literal["waiting", "in force", "behind", "superseded", "refused", "ended"]
    iteration: int | None = None
    reason: str = ""


class TargetBook:
    """See the module's docstring.

    Args:
        wish: the configuration's.
        limit: the configuration's, None: it has none.
    """

    def __init__(self, wish: Target, limit: PowerBudget | None = None) -> None:
        configured = Entry(0, CONFIG, Standing.CONFIG, wish, limit)
        self._entries: dict[tuple[Standing, str], Entry] = {configured.key: configured}
        self._before: dict[tuple[Standing, str], Entry] = {}  # what the newest word of a source took the place of
        self._now_s = 0.0
        self._outcomes: OrderedDict[int, Outcome] = OrderedDict()
        self._changed: dict[int, None] = {}

    def copy(self) -> TargetBook:
        """One that changes by itself."""
        made = object.__new__(TargetBook)
        made._entries, made._outcomes, made._changed = dict(self._entries), self._outcomes.copy(), dict(self._changed)
        made._before, made._now_s = dict(self._before), self._now_s
        return made

    # What is said.

    def take(self, entry: Entry) -> None:
        """Something is said: it stands in the place of what its source said before."""
        for before in list(self._entries.values()):
            everyone = entry.source == EVERYONE and before.standing is Standing.COMMAND
            if not before.number or (before.key != entry.key and not everyone):
                continue
            if entry.says_nothing:
                self._before.pop(before.key, None)
                self._leave(before, "ended", "taken back")
                continue
            if self._outcomes[before.number].state in ("in force", "behind"):
                self._before[before.key] = before
            self._leave(before, "superseded", f"{entry.source} said something newer (number {entry.number})")
        if entry.says_nothing:
            self._note(Outcome(entry.number, entry.source or "everyone", "nothing", "ended", reason="nothing is said"))
        elif len(self._entries) > _SOURCES_AT_MOST:
            self._note(_of(entry, "refused", reason=f"{_SOURCES_AT_MOST} sources have a word here already"))
        else:
            self._entries[entry.key] = entry
            self._note(_of(entry, "waiting"))

    def expire(self, unix_s: float) -> None:
        """It is so late now."""
        self._now_s = unix_s
        for entry in list(self._entries.values()):
            if entry.until is not None and entry.until <= unix_s:
                self._before.pop(entry.key, None)
                self._leave(entry, "ended", "its time is over")

    @property
    def next_end(self) -> float:
        """Unix time at which the next word ends; infinity: none does."""
        return min((entry.until for entry in self._entries.values() if entry.until is not None), default=float("inf"))

    def refuse_all(self, reason: str) -> None:
        """Nothing can be aimed at any more."""
        for entry in [entry for entry in self._entries.values() if entry.number]:
            self._leave(entry, "refused", reason)

    def refuse(self, reason: str) -> bool:
        """What is to be in force cannot be planned for; whether that was a source's to say, and not only ours."""
        wished, limiting = self._ruling
        to_blame = limiting if limiting is not None else wished
        if not to_blame.number:
            to_blame = wished
        if to_blame.number:
            self._leave(to_blame, "refused", reason)
            before = self._before.pop(to_blame.key, None)
            if before is not None and (before.until is None or before.until > self._now_s):
                self._entries[before.key] = before
                self._note(_of(before, "waiting", reason=f"number {to_blame.number} was refused"))
        return bool(to_blame.number)

    # What follows from it.

    @property
    def goal(self) -> Goal:
        """What is to be aimed at."""
        wished, limiting = self._ruling
        assert wished.wish is not None  # the configuration has one
        return Goal(wished.wish, None if limiting is None else limiting.limit)

    def ordered(self, iteration: int) -> None:
        """Something else is in force from this iteration on: what was to begin then or later never will."""
        for outcome in list(self._outcomes.values()):
            if outcome.state != "in force" and outcome.iteration is not None and outcome.iteration >= iteration:
                self._note(replace(outcome, iteration=None))

    def reached(self, iteration: int) -> None:
        """The goal is in force from this iteration on."""
        ruling = {entry.number: entry for entry in self._ruling if entry is not None}
        for entry in self._entries.values():
            before = self._outcomes.get(entry.number)
            if before is None:
                continue
            if entry.number not in ruling:
                above = ", ".join(sorted({one.source for one in ruling.values()}))
                self._note(replace(before, state="behind", reason=f"it stands behind {above}"))
            elif before.state != "in force":
                self._note(replace(before, state="in force", iteration=iteration, reason=""))

    @property
    def entries(self) -> Sequence[Entry]:
        """All that is said, the configuration's word first."""
        return list(self._entries.values())

    @property
    def outcomes(self) -> Mapping[int, Outcome]:
        """What became of what was said, by number; the newest some hundreds."""
        return self._outcomes

    def take_changed(self) -> list[Outcome]:
        """Outcomes that are other ones than at the last call."""
        changed, self._changed = [self._outcomes[number] for number in self._changed], {}
        return changed

    @property
    def _ruling(self) -> tuple[Entry, Entry | None]:
        """Whose wish is in force, and whose limit."""
        by_standing = sorted(self._entries.values(), key=lambda entry: (entry.standing, entry.number), reverse=True)
        wished = next(entry for entry in by_standing if entry.wish is not None)
        return wished, next((entry for entry in by_standing if entry.limit is not None), None)

    def _leave(self, entry: Entry, state: Literal["superseded", "refused", "ended"], reason: str) -> None:
        del self._entries[entry.key]
        self._note(replace(self._outcomes.get(entry.number) or _of(entry, state), state=state, reason=reason))

    def _note(self, outcome: Outcome) -> None:
        if self._outcomes.get(outcome.number) == outcome:
            return
        self._outcomes[outcome.number] = outcome
        self._changed[outcome.number] = None
        standing = {entry.number for entry in self._entries.values()}
        while len(self._outcomes) > _OUTCOMES_KEPT + len(standing):
            oldest = next(number for number in self._outcomes if number not in standing)
            del self._outcomes[oldest]
            self._changed.pop(oldest, None)


def _of(entry: Entry, state: Any, reason: str = "") -> Outcome:
    return Outcome(entry.number, entry.source, entry.to_dict()["says"], state, reason=reason)


def described(of: Target | PowerBudget) -> str:
    """A wish or a limit for people."""
    if isinstance(of, PowerBudget):
        groups = [f"{group.watts:g} W for {group.name}" for group in of.groups]
        return ", ".join([*([] if of.job_w is None else [f"{of.job_w:g} W"]), *groups]) or "limits on peaks"
    match of.kind:
        case "slowdown":
            return f"slowdown {100 * of.value:g} %"
        case "deadline":
            return f"iterations of {of.value:g} s"
        case "money":
            assert of.prices is not None  # such a target has them
            return f"least cost at {of.prices.per_kwh:g} per kWh and {of.prices.per_gpu_hour:g} per GPU-hour"
        case "cheapest":
            return "least energy"
        case "full":
            return "full clocks"
    return of.kind.replace("_", " ")
