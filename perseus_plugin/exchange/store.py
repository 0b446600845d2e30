"""What ranks tell each other, through the job's own c10d store; nothing else talks across ranks.

Small JSON values under keys of our own prefix. Never a collective, nothing in the training's streams or groups, and no
call that waits for a peer, except `wait_for`, which says so.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol

from perseus_plugin.errors import PerseusError
from perseus_plugin.files import parse_json

_CALL_TIMEOUT = timedelta(seconds=5)
_LOST_AFTER_S = 5.0  # who took a place in a list and has not filled it since has died


class ExchangeError(PerseusError):
    """The store does not answer, or holds something that is not ours."""


class Exchange(Protocol):
    """Values that every rank of the job can read."""

    def publish(self, key: str, value: Any) -> None:
        """Set a JSON-serialisable value; the last one wins."""
        ...

    def fetch(self, key: str) -> Any | None:
        """The value, or None when nobody has published it yet. Does not wait."""
        ...

    def append(self, name: str, value: Any) -> None:
        """Put a JSON-serialisable value at the end of a list that any rank may append to."""
        ...

    def take_new(self, name: str) -> list[Any]:
        """What was appended since the last call, in order; for one reader per list. Does not wait.

        A look at a list that nothing was appended to is one call to the store, however many ranks may append.
        """
        ...


class StoreExchange:
    """An exchange over a `torch.distributed` store.

    Args:
        store: the job's store; a client of our own is made from it where it can be cloned, so that our calls from
            another thread never wait behind the training's.
        prefix: put before every key.

    Raises:
        ExchangeError: from every method, when the store does not answer in time or holds no valid JSON.
    """

    def __init__(self, store: Any, prefix: str) -> None:
        self._store = _own_client(store)
        self._prefix = prefix
        self._taken: dict[str, int] = {}
        self._missing_since_s: float | None = None

    def publish(self, key: str, value: Any) -> None:
        data = json.dumps(value, separators=(",", ":"), allow_nan=True).encode()
        try:
            self._store.set(self._key(key), data)
        except Exception as error:
            raise ExchangeError(f"cannot publish {key!r} in the job's store: {error}") from error

    def fetch(self, key: str) -> Any | None:
        data = self._read(key)
        return None if data is None else _parsed(key, data)

    def append(self, name: str, value: Any) -> None:
        place = self._add(f"{name}/count", 1)
        self.publish(f"{name}/{place}", value)

    def take_new(self, name: str) -> list[Any]:
        count, taken = self._add(f"{name}/count", 0), self._taken.get(name, 0)
        values: list[Any] = []
        while taken < count:
            key = f"{name}/{taken + 1}"
            # One that is empty is only being set: its place was counted before.
            data = self._read(key)
            value = _parsed(key, data) if data else None
            if value is None and not self._is_lost():
                break
            if value is not None:
                values.append(value)
                self._delete(key)
            self._missing_since_s = None
            taken += 1
        self._taken[name] = taken
        return values

    def _read(self, key: str) -> bytes | None:
        try:
            if not self._store.check([self._key(key)]):
                return None
            data: bytes = self._store.get(self._key(key))
        except Exception as error:
            raise ExchangeError(f"cannot fetch {key!r} from the job's store: {error}") from error
        return data

    def _is_lost(self) -> bool:
        """Whether the next place in the list has been empty for so long that it will stay so."""
        now_s = time.monotonic()
        if self._missing_since_s is None:
            self._missing_since_s = now_s
        return now_s - self._missing_since_s > _LOST_AFTER_S

    def _add(self, key: str, amount: int) -> int:
        try:
            return int(self._store.add(self._key(key), amount))
        except Exception as error:
            raise ExchangeError(f"cannot count {key!r} in the job's store: {error}") from error

    def _delete(self, key: str) -> None:
        # Not every store can delete; what was taken then stays there and is not looked at again.
        with suppress(Exception):
            self._store.delete_key(self._key(key))

    def _key(self, key: str) -> str:
        return f"{self._prefix}/{key}"


def _parsed(key: str, data: bytes) -> Any:
    try:
        return parse_json(data)
    except ValueError as error:
        raise ExchangeError(f"{key!r} in the job's store is not valid JSON: {error}") from error


class LocalExchange:
    """An exchange within one process, for jobs of one rank and for tests; values pass through JSON all the same."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lists: dict[str, list[str]] = {}

    def publish(self, key: str, value: Any) -> None:
        self._values[key] = json.dumps(value)

    def fetch(self, key: str) -> Any | None:
        text = self._values.get(key)
        return None if text is None else json.loads(text)

    def append(self, name: str, value: Any) -> None:
        self._lists.setdefault(name, []).append(json.dumps(value))

    def take_new(self, name: str) -> list[Any]:
        return [json.loads(text) for text in self._lists.pop(name, [])]


def wait_for(exchange: Exchange, keys: Iterable[str], timeout_s: float, interval_s: float = 0.02) -> dict[str, Any]:
    """Wait until all keys have values, or the time is up; returns those that have."""
    missing = list(keys)
    found: dict[str, Any] = {}
    deadline_s = time.monotonic() + timeout_s
    while missing:
        for key in list(missing):
            value = exchange.fetch(key)
            if value is not None:
                found[key] = value
                missing.remove(key)
        if not missing or time.monotonic() >= deadline_s:
            break
        time.sleep(interval_s)
    return found


def open_exchange(name: str) -> Exchange:
    """The exchange of this job: its default store, or a local one when `torch.distributed` is not initialised.

    Waits until all ranks are there, before training starts.

    Args:
        name: the same on every rank.

    Raises:
        ExchangeError: the ranks do not find each other in time.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return LocalExchange()
    store = dist.distributed_c10d._get_default_store()
    lobby = StoreExchange(store, f"perseus/{name}")
    session = meet(lobby, dist.get_rank(), dist.get_world_size())
    return StoreExchange(store, f"perseus/{name}/{session}")


def meet(lobby: Exchange, rank: int, world_size: int, timeout_s: float = 60.0) -> str:
    """Agree on a name that no earlier run has used: a restarted job may find its old keys in the same store.

    Every rank says hello with a number of its own, and rank 0 answers each such number with the name, until every
    rank has said that it is there. What an earlier run left has other numbers.

    Raises:
        ExchangeError: not within `timeout_s`.
    """
    if rank != 0:
        mine = secrets.token_hex(8)
        lobby.publish(f"hello/{rank}", mine)
        key = f"welcome/{mine}"
        session = wait_for(lobby, [key], timeout_s).get(key)
        if not isinstance(session, str):
            raise ExchangeError(f"rank 0 did not answer within {timeout_s:.0f} s")
        lobby.publish(f"{session}/here/{rank}", True)
        return session
    session = secrets.token_hex(8)
    missing = set(range(1, world_size))
    deadline_s = time.monotonic() + timeout_s
    while missing:
        for other in sorted(missing):
            if lobby.fetch(f"{session}/here/{other}") is not None:
                missing.discard(other)
                continue
            number = lobby.fetch(f"hello/{other}")
            if number is not None:
                lobby.publish(f"welcome/{number}", session)
        if missing and time.monotonic() > deadline_s:
            raise ExchangeError(f"rank {min(missing)} did not come within {timeout_s:.0f} s")
        time.sleep(0.02 if world_size < 64 else 0.2)
    return session


def _own_client(store: Any) -> Any:
    """A client of our own with a short timeout; the given store (timeout untouched) where it cannot be cloned."""
    try:
        clone = store.clone()
    except (AttributeError, NotImplementedError, RuntimeError):
        return store
    clone.set_timeout(_CALL_TIMEOUT)
    return clone
