"""Moments in time as people write and read them."""

from __future__ import annotations

import math
import re
import sys
import time
from datetime import datetime, timedelta

from perseus_plugin.errors import ConfigError

_LONGEST = 100.0
_STRAGGLER = re.compile(r"\s*(\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)\s*(x|s|)\s*")
_TIME_OF_DAY = re.compile(r"\d{1,2}:\d\d")
MOMENTS = "18:30 (the next time that it is), ISO 8601 or Unix seconds"


def moment(text: str, option: str) -> float:
    """Unix seconds of a moment; a time of day is the next one in local time.

    Raises:
        ConfigError: it is none.
    """
    try:
        if _TIME_OF_DAY.fullmatch(text):
            now = datetime.now()
            then = datetime.combine(now.date(), datetime.strptime(text, "%H:%M").time())
            return (then if then > now else then + timedelta(days=1)).timestamp()
        try:
            seconds = float(text)
        except ValueError:
            # Python 3.10 knows no Z.
            seconds = datetime.fromisoformat(re.sub("[Zz]$", "+00:00", text)).timestamp()
        if math.isfinite(seconds):
            return seconds
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{option}: got {text!r}; allowed: {MOMENTS}")


def straggler_factor(text: str, option: str = "--straggler") -> float:
    """How many times full clocks an iteration or an instruction takes: `1.2x` or `1.2`.

    Raises:
        ConfigError: it is none, or so many that something else must be meant.
    """
    found = _STRAGGLER.fullmatch(text)
    if found is None or found[2] == "s" or not 1 <= float(found[1]) <= _LONGEST:
        raise ConfigError(f"{option}: got {text!r}; allowed: times full clocks from 1 to {_LONGEST:g}, such as 1.2x")
    return float(found[1])


def straggler_s(text: str, full_clock_s: float) -> float:
    """How long an iteration takes with a straggler, from times full clocks (`1.2x`) or seconds (`0.5s`).

    Raises:
        ConfigError: it is neither.
    """
    found = _STRAGGLER.fullmatch(text)
    if found is None:
        raise ConfigError(
            f"--straggler: got {text!r}; allowed: times full clocks, such as 1.2x, or seconds, such as 0.5s"
        )
    if found[2] == "x":
        return straggler_factor(text) * full_clock_s
    if not found[2]:
        print(
            f"perseus: --straggler {text}: a number alone means seconds in this version and will mean times full "
            f"clocks in the next one; write {text}s, or {float(found[1]) / full_clock_s:.4g}x",
            file=sys.stderr,
        )
    return float(found[1])


def end_of(until: str | None, lasting_s: float | None) -> float | None:
    """Unix seconds at which something ends by `--until` or `--for`; None: it has no end.

    Raises:
        ConfigError: both are given, or it is no moment, or no time that lasts.
    """
    if until is not None and lasting_s is not None:
        raise ConfigError("give either --until or --for")
    if lasting_s is not None:
        if not 0 < lasting_s < math.inf:
            raise ConfigError(f"--for: got {lasting_s:g}; allowed: seconds above 0")
        return time.time() + lasting_s
    return None if until is None else moment(until, "--until")


def on_clock(unix_s: float) -> str:
    """A moment for people, in local time."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
