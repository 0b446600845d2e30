"""What goes into a replay of measured iterations and what comes out, as plain data; needs no solver."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

LATE_BY = 0.02
"""An instruction is late when it begins so much of its own time after its latest start: less is jitter."""

PerStage: TypeAlias = tuple[tuple[float, ...], ...]
"""Per stage a value for each of its instructions, in program order."""


@dataclass(frozen=True)
class Samples:
    """Iterations that were measured.

    Attributes:
        durations_s: per iteration and replica how long each instruction takes at full clocks.
        as_run_s: how long each took at the clock it ran at; may be left away together with `starts_s`.
        starts_s: when each began, since its own rank's begin of the iteration.
        times_s: per iteration and replica how long it took; may be left away.
    """

    durations_s: tuple[tuple[PerStage, ...], ...]
    as_run_s: tuple[tuple[PerStage, ...], ...] = ()
    starts_s: tuple[tuple[PerStage, ...], ...] = ()
    times_s: tuple[tuple[float, ...], ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Samples:
        """From plain JSON data."""

        def frozen(iterations: Any) -> tuple[tuple[PerStage, ...], ...]:
            return tuple(
                tuple(tuple(tuple(stage) for stage in replica) for replica in iteration) for iteration in iterations
            )

        times_s = tuple(tuple(replicas) for replicas in data["times_s"])
        return cls(frozen(data["durations_s"]), frozen(data["as_run_s"]), frozen(data["starts_s"]), times_s)


@dataclass(frozen=True)
class Overheads:
    """What iterations take beside the work that is known: instructions and constant-time work.

    Attributes:
        transfer_s: how long a transfer between stages takes.
        end_s: what an iteration takes once, beside all else.
        iteration_s: how long iterations took when that was measured; 0: they were not.
        beside_s: of that, what is neither computing nor other work that is timed: transfers, and what is there once.
    """

    transfer_s: float = 0.0
    end_s: float = 0.0
    iteration_s: float = 0.0
    beside_s: float = 0.0

    @property
    def share(self) -> float | None:
        """`beside_s` as a share of the iteration; None: not measured."""
        return self.beside_s / self.iteration_s if self.iteration_s > 0 else None


@dataclass(frozen=True)
class Replayed:
    """A plan, held against iterations that were measured. Ratios are against the same iterations at full clocks.

    Attributes:
        iterations: how many there were.
        margin: the plan's.
        catch_up: whether ranks that are late catch up.
        time_ratio_mean: time of all iterations together.
        time_ratio_quantile: time of an iteration at the quantile that was asked for.
        saving_mean: share of energy saved over all of them.
        saving_interval: where that share would be over many more such iterations, to 95 %.
        raised: share of instructions that ran faster than planned, to catch up.
        kept: whether the iterations keep to their time.
        obstacle: what stands in the way of saving, where the plan is full clocks for that reason.
        hinges: without one of the iterations another plan would save clearly more.
    """

    iterations: int
    margin: float
    catch_up: bool
    time_ratio_mean: float
    time_ratio_quantile: float
    saving_mean: float
    saving_interval: tuple[float, float]
    raised: float = 0.0
    kept: bool = True
    obstacle: str = ""
    hinges: bool = False

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Replayed:
        """From plain JSON data."""
        low, high = data["saving_interval"]
        return cls(**{**data, "saving_interval": (low, high)})


@dataclass(frozen=True)
class StageCatchUp:
    """What the ranks of one stage need to know to catch up; see `messages.CatchUpPart`."""

    latest_starts_s: tuple[float, ...]
    usual_delays_s: tuple[float, ...]
    kinds: tuple[str, ...]
    options: Mapping[str, tuple[tuple[int, float, float], ...]]
    size_weight: float

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> StageCatchUp:
        """From plain JSON data."""
        return cls(
            tuple(data["latest_starts_s"]),
            tuple(data["usual_delays_s"]),
            tuple(data["kinds"]),
            {
                kind: tuple((clock, time_s, watts) for clock, time_s, watts in rows)
                for kind, rows in data["options"].items()
            },
            data["size_weight"],
        )


@dataclass(frozen=True)
class InForce:
    """A plan that is followed, to be held against newer iterations.

    Attributes:
        clocks_mhz: per stage.
        catch_up: per stage; empty where ranks do not catch up.
        margin: the plan's.
        transfer_s: what it took a transfer between stages to take.
        wait_clocks_mhz: per stage its waits with a clock of their own: the position of the instruction before, -1 for
            none, and the clock; empty: there are none.
    """

    clocks_mhz: tuple[tuple[int, ...], ...]
    catch_up: tuple[StageCatchUp, ...]
    margin: float
    transfer_s: float = 0.0
    wait_clocks_mhz: tuple[tuple[tuple[int, int], ...], ...] = ()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> InForce:
        """From plain JSON data."""
        return cls(
            tuple(tuple(clocks) for clocks in data["clocks_mhz"]),
            tuple(StageCatchUp.from_dict(stage) for stage in data["catch_up"]),
            data["margin"],
            data["transfer_s"],
            tuple(tuple((after, clock) for after, clock in stage) for stage in data["wait_clocks_mhz"]),
        )
