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
            then = datetime.combine(
                now.date(), datetime.strptime(text, "%H:%M" if len(text) < 6 else "%H:%M:%S").time()
            )
            return (then if then > now else then + timedelta(days=1)).timestamp()
        try:
            seconds = float(text)
        except ValueError:
            seconds = datetime.fromisoformat(text).timestamp()
        if math.isfinite(seconds):
            return seconds
    except (ValueError, OverflowError):
        pass
    raise ConfigError(f"{option}: got {text!r}; allowed: {MOMENTS}")


def end_of(until: str | None, lasting_s: float | None) -> float | None:
    """Unix seconds at which something ends by `--until` or `--for`; None: it has no end.

    Raises:
        ConfigError: both are given, or it is no moment.
    """
    if until is not None and lasting_s is not None:
        raise ConfigError("give either --until or --for")
    if lasting_s is not None:
        return time.time() + lasting_s
    return None if until is None else moment(until, "--until")


def on_clock(unix_s: float) -> str:
    """A moment for people, in local time."""
    return datetime.fromtimestamp(unix_s).astimezone().strftime("%Y-%m-%d %H:%M:%S")
