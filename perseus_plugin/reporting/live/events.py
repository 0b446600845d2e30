"""`events.jsonl`: one JSON line per thing that happened, with its time; may be written from any thread.

A line is an object with `time` (Unix seconds), `event` (what happened), and what else is known of it.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path
from typing import Any

from perseus_plugin.errors import ReportError, os_problem
from perseus_plugin.files import append, parse_json, read_bytes

logger = logging.getLogger(__name__)

EVENTS_FILE = "events.jsonl"
_MAX_BYTES = 16 * 2**20


class EventLog:
    """Appends to `events.jsonl`. A file that cannot be written, or has grown too large, is said once and then left.

    Args:
        output_dir: folder of the file.
    """

    def __init__(self, output_dir: Path) -> None:
        self.path = output_dir / EVENTS_FILE
        self._lock = threading.Lock()
        self._left_bytes = _MAX_BYTES

    def write(self, event: str, **facts: Any) -> None:
        """Append one line: `time` (Unix seconds), `event` and the facts."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **facts}, allow_nan=False) + "\n"
        with self._lock:
            if self._left_bytes <= 0:
                return
            self._left_bytes -= len(line)
            try:
                append(self.path, line)
            except OSError as error:
                self._left_bytes = 0
                logger.warning(
                    "cannot write %s: %s; training goes on. See to space and permissions of perseus.output_dir",
                    self.path.name,
                    os_problem(error),
                )
                return
            if self._left_bytes <= 0:
                logger.warning(
                    "%s has reached %d bytes; nothing more is written to it, all else goes on. Report stragglers less "
                    "often, or move the file away before the next start",
                    self.path.name,
                    _MAX_BYTES,
                )


def read_events(path: Path) -> tuple[list[dict[str, Any]], int]:
    """The events, and how many lines are none; what follows the last line end was cut off and is not counted.

    Raises:
        ReportError: the file cannot be read.
    """
    try:
        lines = read_bytes(path).decode(errors="replace").split("\n")[:-1]
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: cannot be read: {error}") from error
    lines = [line for line in lines if line]
    events = [event for line in lines if (event := _event(line)) is not None]
    return events, len(lines) - len(events)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = parse_json(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    return event if isinstance(event.get("time"), (int, float)) else None
