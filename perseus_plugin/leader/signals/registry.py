"""The kinds of signals there are, and all signals of a job, made from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from perseus_plugin.errors import ConfigError, shown
from perseus_plugin.leader.signals.base import Signal, SignalKind
from perseus_plugin.leader.signals.sources import carbon_signal, price_signal, schedule_signal

# A new kind is one line here.
SIGNALS: dict[str, SignalKind] = {
    "schedule": schedule_signal,
    "price": price_signal,
    "carbon": carbon_signal,
}
ENTRY_POINTS = "perseus_plugin.signals"
"""Group of entry points by which other packages bring signals of theirs; names that are taken are not looked at."""


def make_signal(told: Mapping[str, Any], where: str) -> Signal:
    """Make a signal.

    Args:
        told: its `source`, and that kind's options.
        where: how the configuration calls it, for error messages.

    Raises:
        ConfigError: there is no such source, or something in its options is wrong.
    """
    source, options = told.get("source"), {key: value for key, value in told.items() if key != "source"}
    outside = {point.name: point for point in entry_points(group=ENTRY_POINTS) if point.name not in SIGNALS}
    if not isinstance(source, str) or source not in {*SIGNALS, *outside}:
        names = ", ".join(f'"{name}"' for name in (*SIGNALS, *outside))
        raise ConfigError(f"{where}.source: got {shown(source)}; allowed: one of {names}")
    try:
        return (SIGNALS.get(source) or _loaded(outside[source]))(options, where)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{where}: the signal {source!r} cannot be made: {error!r}") from error


def where_of(number: int) -> str:
    """How the configuration calls a signal."""
    return f"perseus.signals[{number}]"


def _loaded(point: EntryPoint) -> SignalKind:
    kind: SignalKind = point.load()
    return kind
