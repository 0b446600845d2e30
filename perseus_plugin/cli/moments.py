"""Moments in time as people write and read them."""

from __future__ import annotations

import math
import re
import time
from datetime import datetime, timedelta

from perseus_plugin.errors import ConfigError

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
