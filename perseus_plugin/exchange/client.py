"""A client of the job's c10d store of which every call ends, whatever becomes of the store's host."""

from __future__ import annotations

import json
import queue
import threading
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeAlias

from perseus_plugin.errors import PerseusError
from perseus_plugin.files import parse_json

CALL_LIMIT_S, START_LIMIT_S = 5.0, 60.0
_PARTS = 20  # of a time limit
_JOINED_WITHIN_S = 1.0  # where the store's host does not answer, the thread stays where it is
_LOST_AFTER_S = 5.0  # who took a place in a list and has not filled it since has died

_Call: TypeAlias = Callable[[Any, str], Any]


@dataclass
class _Watch:
    """Counters that the thread looks at by itself: see `StoreClient.watch`."""

    places: list[str]
    seen: list[int]
    every_s: float
    may_look: Callable[[], bool]
    changed: Callable[[], None]
    due_s: float


_Calls: TypeAlias = "queue.SimpleQueue[tuple[Future[Any], _Call, str] | _Watch | None]"


class ExchangeError(PerseusError):
    """The store does not answer, or holds something that is not ours."""


class UnansweredError(ExchangeError):
    """The store's host is there and does not answer."""


class StoreClient:
    """Small JSON values under keys of our own prefix, and lists of them; may be used from any thread.

    The time limits of torch's clients hold only while the store's host answers at all. Calls are therefore made on a
    daemon thread; once one is not answered in time the store is given up, and every later call fails at once.

    Args:
        store: the job's store; a client of our own is made from it where it can be cloned, so that our calls never wait
            behind the training's.
        prefix: put before every key.
        limit_s: until a call must be answered, once all ranks are there.
        start_limit_s: the same before that, see `enter`: a host that is called by all ranks at once, and looks up the
            name of each, answers late.

    Raises:
        ExchangeError: from every method, when the store does not answer in time or holds no valid JSON.
    """

    def __init__(
        self, store: Any, prefix: str, limit_s: float = CALL_LIMIT_S, start_limit_s: float = START_LIMIT_S
    ) -> None:
        self._prefix, self._call_limit_s, self._limit_s = prefix, limit_s, start_limit_s
        self._closed, self._unanswered = False, ""
        self._taken: dict[str, int] = {}
        self._missing_since_s: dict[str, float] = {}
        self._calls: _Calls = queue.SimpleQueue()
        self._thread = threading.Thread(target=_serve, args=(store, self._calls), name="perseus-store", daemon=True)
        self._thread.start()
        # At the interpreter's end too: a thread that comes out of torch then aborts the process.
        self._end = weakref.finalize(self, _end, self._thread, self._calls)

    def enter(self, name: str) -> None:
        """All ranks are there: all keys are below this one from now on."""
        self._prefix, self._limit_s = f"{self._prefix}/{name}", self._call_limit_s

    def publish(self, key: str, value: Any) -> None:
        """Set a JSON-serialisable value; the last one wins."""
        data = json.dumps(value, separators=(",", ":"), allow_nan=True).encode()
        self._call(f"publish {key!r} in", key, lambda store, place: store.set(place, data))

    def fetch(self, key: str) -> Any | None:
        """The value, or None when nobody has published it yet. Does not wait."""
        data = self._read(key)
        return None if data is None else _parsed(key, data)

    def withdraw(self, key: str) -> None:
        """Remove a value; where the store can remove nothing, it is None from now on."""
        try:
            self._call(f"withdraw {key!r} from", key, _remove)
        except ExchangeError:
            self.publish(key, None)

    def count(self, name: str, amount: int = 0) -> int:
        """Add to a counter; returns what it then is."""
        return int(self._call(f"count {name!r} in", name, lambda store, place: store.add(place, amount)))

    def counts(self, names: Sequence[str]) -> list[int]:
        """What some counters are, asked for in one go: each takes the interpreter from other threads some times."""
        further = [self._key(name) for name in names[1:]]
        counted = self._call(
            f"count {', '.join(map(repr, names))} in",
            names[0],
            lambda store, place: [store.add(one, 0) for one in (place, *further)],
        )
        return [int(one) for one in counted]

    def watch(
        self, seen: Mapping[str, int], every_s: float, may_look: Callable[[], bool], changed: Callable[[], None]
    ) -> None:
        """Have the thread look at counters by itself, in the place of those that it looked at before.

        While nothing changes one thread wakes for a look, where asking for `counts` wakes two.

        Args:
            seen: what they were, by name.
            every_s: from now to the first look, and from look to look.
            may_look: asked before each look, on the thread.
            changed: called once, on the thread, when one is something else, or cannot or may not be looked at; it looks
                no more then.
        """
        places = [self._key(name) for name in seen]
        self._calls.put(_Watch(places, list(seen.values()), every_s, may_look, changed, time.monotonic() + every_s))

    def append(self, name: str, value: Any) -> None:
        """Put a JSON-serialisable value at the end of a list that any rank may append to."""
        self.publish(f"{name}/{self.count(f'{name}/count', 1)}", value)

    def take_new(self, name: str, count: int | None = None) -> list[Any]:
        """What was appended since the last call, in order; for one reader per list. Does not wait.

        A look at a list that nothing was appended to is one call to the store, however many ranks may append, and none
        where it is known how far the list's counter is (`NAME/count`).
        """
        count = self.count(f"{name}/count") if count is None else count
        taken = self._taken.get(name, 0)
        values: list[Any] = []
        while taken < count:
            key = f"{name}/{taken + 1}"
            # One that is empty is only being set: its place was counted before.
            data = self._read(key)
            value = _parsed(key, data) if data else None
            if value is None and not self._is_lost(key):
                break
            if value is not None:
                values.append(value)
                with suppress(ExchangeError):  # what stays there is not looked at again
                    self._call(f"remove {key!r} from", key, _remove)
            self._missing_since_s.pop(key, None)
            taken += 1
        self._taken[name] = taken
        return values

    def taken(self, name: str) -> int:
        """How far `take_new` has come in a list."""
        return self._taken.get(name, 0)

    def close(self) -> None:
        """Let the thread end, once it has done what was asked of it before; idempotent."""
        self._end()
        self._closed = True

    def _is_lost(self, key: str) -> bool:
        """Whether this place in a list has been empty for so long that it will stay so."""
        now_s = time.monotonic()
        return now_s - self._missing_since_s.setdefault(key, now_s) > _LOST_AFTER_S

    def _read(self, key: str) -> bytes | None:
        data: bytes | None = self._call(f"fetch {key!r} from", key, _present)
        return data

    def _call(self, doing: str, key: str, call: _Call) -> Any:
        """Have the thread call this with the store and the place of this key in it."""
        answer: Future[Any] = Future()
        if not (self._closed or self._unanswered):
            self._calls.put((answer, call, self._key(key)))
            try:
                # In parts: while this process itself is stopped, or one thread keeps the others waiting, none ends.
                for _ in range(_PARTS):
                    with suppress(NotInTime):
                        return answer.result(self._limit_s / _PARTS)
                self._unanswered = f"its host has not answered for {self._limit_s:g} s"
            except Exception as error:
                raise ExchangeError(f"cannot {doing} the job's store: {error}") from error
        if self._unanswered:
            raise UnansweredError(f"cannot {doing} the job's store: {self._unanswered}")
        raise ExchangeError(f"cannot {doing} the job's store: our client of it is closed")

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def _end(thread: threading.Thread, calls: _Calls) -> None:
    calls.put(None)
    if thread is not threading.current_thread():
        thread.join(_JOINED_WITHIN_S)


def _serve(store: Any, calls: _Calls) -> None:
    is_ours = False
    watch: _Watch | None = None
    while True:
        try:
            asked = calls.get(timeout=None if watch is None else max(0.0, watch.due_s - time.monotonic()))
        except queue.Empty:
            assert watch is not None  # else nothing limits the wait
            if _has_changed(store, watch):
                watch.changed()
                watch = None
            continue
        if asked is None:
            return
        if isinstance(asked, _Watch):
            watch = asked
            continue
        answer, call, place = asked
        try:
            if not is_ours:
                store, is_ours = _own_client(store), True
            answer.set_result(call(store, place))
        except BaseException as error:
            answer.set_exception(error)
        del asked, answer, call


def _has_changed(store: Any, watch: _Watch) -> bool:
    try:
        if not watch.may_look() or [store.add(place, 0) for place in watch.places] != watch.seen:
            return True
    except Exception:  # whoever asks next is told
        return True
    watch.due_s = time.monotonic() + watch.every_s
    return False


def _remove(store: Any, place: str) -> None:
    store.delete_key(place)


def _present(store: Any, place: str) -> Any:
    """What is there, if anything: `get` alone would wait for it."""
    return store.get(place) if store.check([place]) else None


def _own_client(store: Any) -> Any:
    """A client of our own with a short timeout; the given store (timeout untouched) where it cannot be cloned."""
    try:
        clone = store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
    clone.set_timeout(timedelta(seconds=CALL_LIMIT_S))
    return clone


def _parsed(key: str, data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise ExchangeError(f"{key!r} in the job's store is not valid JSON: {error}") from error
