"""What ranks tell each other, through the job's own c10d store; nothing else talks between machines.

Small JSON values under keys of our own prefix. Never a collective, nothing in the training's streams or groups, and no
call that waits for a peer, except `wait_for`, which says so.

Calls to the store grow with what there is to tell, and with machines: one rank of each (see `node`) looks at one
counter now and then, for all of them, and sends what they have for rank 0 in one piece. All ranks of a job run one
version of the plugin, so what goes between them has none.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from perseus_plugin.exchange.client import ExchangeError, StoreClient
from perseus_plugin.exchange.node import Message, Node

ANNOUNCED = ("news", "trouble", "reuse", "calibration", "seats", "batches")
"""What may be told to all: keys of `Exchange.tell_all`."""
LOOK_EVERY_S = 0.5
RARELY_S = 2.0
INBOX_EVERY_S = 0.2
PATIENT_S = 5.0
"""How often a node looks for news, the same where no plans are made, how often rank 0 looks for what it is told, and a
node sends what is in no hurry.

Where nobody has told anything in a hurry for `_LIVELY_S`, rank 0 looks for both at once, and at one counter: who tells
all ranks tells it so. Whoever looks as rarely as a node has the client's thread look until it sees something: all this
takes the interpreter from the training thread. The own thread asks again after `_OWN_LOOK_S`, which tells whether the
store's host still answers.
"""
_OWN_LOOK_S = 5.0
_LIVELY_S = 2.0
_TOGETHER_S = 0.1  # what ranks of a node tell within that goes in one piece
_LOOKS_PER_S = 1000.0  # of all nodes; in larger jobs each looks more rarely
_SENDS_PER_S = 50.0
_COUNT_NODES_EVERY_S = 30.0
_MOST_BYTES = 1 << 20  # in one piece; torch's store takes 8 MiB
_MOST_IN_PACKET = 100_000  # the kernel's usual limit is twice that
_INBOX, _TURN, _NODES = "inbox", "turn", "nodes"
_HURRIED = "hurried"  # in a piece that holds something that is in a hurry: more may follow
_AT_ONCE = "at once"  # in a piece that did not wait: what others bring later under its keys was told before


class Exchange(Protocol):
    """Values that go from rank to rank of the job; from every method an `ExchangeError` when that is not possible."""

    def publish(self, key: str, value: Any) -> None:
        """Set a JSON-serialisable value that any rank may fetch; the last one wins."""
        ...

    def fetch(self, key: str) -> Any | None:
        """The value, or None when nobody has published it yet. Does not wait."""
        ...

    def withdraw(self, key: str) -> None:
        """Nobody needs this value any more."""
        ...

    def tell(self, key: str, value: Any, *, patient: bool = False, at_once: bool = False) -> None:
        """Tell rank 0 a JSON-serialisable value; the last one under a key wins.

        Args:
            key: of this rank, unlike those of others.
            value: to be told.
            patient: it is in no hurry.
            at_once: do not return before it is on its way: nothing may follow, and what is still on its way is older.
        """
        ...

    def told(self, key: str) -> Any | None:
        """On rank 0: the value, or None. Asks nobody."""
        ...

    def forget_told(self, prefix: str) -> None:
        """On rank 0: what was told under keys that begin so is not needed any more."""
        ...

    def append(self, name: str, value: Any) -> None:
        """Put a JSON-serialisable value at the end of a list that any rank may append to and rank 0 reads.

        Rank 0 is woken for what others append; what it appends itself it reads afterwards.
        """
        ...

    def take_new(self, name: str) -> list[Any]:
        """On rank 0: what was appended since the last call; of each rank in its order. Asks nobody."""
        ...

    def tell_all(self, key: str, value: Any) -> None:
        """Tell every rank a value under a key of `ANNOUNCED`; the last one wins."""
        ...

    def heard(self, key: str) -> Any | None:
        """What was told to all under this key, or None. Asks nobody."""
        ...

    @property
    def news_take_s(self) -> float:
        """Until all ranks have heard what is told to all."""
        ...

    def look_rarely(self) -> None:
        """Nobody waits for what this rank is told from now on: no plans are made."""
        ...

    def on_news(self, wake: Callable[[], None]) -> None:
        """Call this, from any thread, when something new was told or heard."""
        ...

    def close(self) -> None:
        """Send what is still to be sent; nothing works afterwards. Idempotent."""
        ...


class StoreExchange:
    """An exchange over a `torch.distributed` store.

    Args:
        client: of the job's store; closed with the exchange.
        rank: this one, in the whole job.
        node: a name for this job's ranks to find those on their machine by, see `Node`; empty: each by itself.
        leader: the rank that is told, called rank 0 here.
    """

    def __init__(self, client: StoreClient, rank: int = 0, node: str = "", leader: int = 0) -> None:
        self._client, self._rank, self._is_told = client, rank, rank == leader
        self._lock = threading.Lock()
        self._told: dict[str, Any] = {}
        self._told_at_once: set[str] = set()
        self._heard: dict[str, Any] = {}
        self._error: ExchangeError | None = None
        self._wake: Callable[[], None] = lambda: None
        self._outbox: queue.SimpleQueue[tuple[str, Any, bool]] = queue.SimpleQueue()
        self._appended = 0
        # The thread's own.
        self._pending: dict[str, Any] = {}
        self._hurried = False
        self._turn, self._nodes, self._counted = 0, 1, False
        self._look_at_s = self._inbox_at_s = self._count_at_s = 0.0
        self._lively_until_s = time.monotonic() + _LIVELY_S
        self._least_s = LOOK_EVERY_S
        self._send_at_s = float("inf")
        self._closing = threading.Event()
        self._node = Node(node, self._for_members)
        self._thread = threading.Thread(target=self._run, name="perseus-exchange", daemon=True)
        self._thread.start()

    def publish(self, key: str, value: Any) -> None:
        self._client.publish(key, value)

    def fetch(self, key: str) -> Any | None:
        return self._client.fetch(key)

    def withdraw(self, key: str) -> None:
        self._client.withdraw(key)

    def tell(self, key: str, value: Any, *, patient: bool = False, at_once: bool = False) -> None:
        self._fail_if_lost()
        if self._is_told:
            self._take({key: json.loads(json.dumps(value))}, hurried=not patient, at_once=at_once)
            if at_once:  # so do the others, and rank 0 waits for that
                self._lively_until_s = float("inf")
                self._inbox_at_s = 0.0
                self._node.wake()
        elif at_once:
            self._client.append(_INBOX, {_HURRIED: True, _AT_ONCE: True, key: value})
        else:
            self._outbox.put((key, value, patient))
            self._node.wake()

    def told(self, key: str) -> Any | None:
        self._fail_if_lost()
        return self._told.get(key)

    def forget_told(self, prefix: str) -> None:
        with self._lock:
            self._told = {key: value for key, value in self._told.items() if not key.startswith(prefix)}

    def append(self, name: str, value: Any) -> None:
        self._appended += 1
        self.tell(f"{name}/{self._rank}/{self._appended}", value, patient=self._is_told)

    def take_new(self, name: str) -> list[Any]:
        self._fail_if_lost()
        with self._lock:
            return [self._told.pop(key) for key in list(self._told) if key.startswith(f"{name}/")]

    def tell_all(self, key: str, value: Any) -> None:
        assert key in ANNOUNCED
        self._fail_if_lost()
        self._client.publish(f"all/{key}", value)
        self._client.count(_TURN, 1)  # afterwards: who sees it finds the value
        if not self._is_told:
            self._client.append(_INBOX, {_HURRIED: True})
        self._look_at_s = 0.0
        self._node.wake()

    def heard(self, key: str) -> Any | None:
        self._fail_if_lost()
        return self._heard.get(key)

    @property
    def news_take_s(self) -> float:
        return self._look_every_s + 0.2

    def look_rarely(self) -> None:
        self._least_s = RARELY_S

    def on_news(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        wake()

    def close(self) -> None:
        self._closing.set()
        self._node.wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()  # every call that it makes ends
        self._client.close()

    def _fail_if_lost(self) -> None:
        if self._error is not None:
            raise self._error

    # The thread.

    @property
    def _look_every_s(self) -> float:
        return max(self._least_s, self._nodes / _LOOKS_PER_S)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._step(time.monotonic())
            while self._node.leads and (messages := self._node.receive(0.0)):
                for message in messages:
                    self._post(message)
            self._empty_outbox()
            self._send()
        except Exception as error:
            self._lose(error)
        finally:
            self._node.close()

    def _step(self, now_s: float) -> None:
        self._empty_outbox()
        due_s = [self._look_at_s] if self._node.leads else []
        due_s += [self._inbox_at_s] if self._is_told else []
        until_s = min(*due_s, self._send_at_s, now_s + PATIENT_S)
        for message in self._node.receive(until_s - now_s):
            if "lost" in message:
                raise ExchangeError(str(message["lost"]))
            if "look" in message:
                self._hear(self._found())
            if isinstance(heard := message.get("heard"), dict):
                self._hear(heard)
            self._post(message)
        now_s = time.monotonic()
        looks = self._node.leads and now_s >= self._look_at_s
        takes = self._is_told and now_s >= self._inbox_at_s
        if looks or takes:
            self._look(now_s, looks, takes)
        if now_s >= self._send_at_s:
            self._send()

    def _empty_outbox(self) -> None:
        with suppress(queue.Empty):
            while True:
                key, value, patient = self._outbox.get_nowait()
                message: Message = {"key": key, "value": value, "patient": patient}
                if self._node.leads or not self._node.send(message):
                    self._post(message)

    def _post(self, message: Message) -> None:
        """To be sent to rank 0 by this rank, its own or another's."""
        if "key" not in message:
            return
        self._pending[str(message["key"])] = message.get("value")
        patient = bool(message.get("patient"))
        self._hurried = self._hurried or not patient
        wait_s = max(PATIENT_S, self._nodes / _SENDS_PER_S) if patient else _TOGETHER_S
        self._send_at_s = min(self._send_at_s, time.monotonic() + wait_s)

    def _send(self) -> None:
        pending, self._pending, self._send_at_s = self._pending, {}, float("inf")
        hurried, self._hurried = self._hurried, False
        if self._is_told:
            self._take(pending, hurried)
            return
        marks: dict[str, Any] = {_HURRIED: True} if hurried else {}
        bundle, size = dict(marks), 0
        for key, value in pending.items():
            length = len(json.dumps(value))
            if size and size + length > _MOST_BYTES:
                self._client.append(_INBOX, bundle)
                bundle, size = dict(marks), 0
            bundle[key] = value
            size += length
        if bundle:
            self._client.append(_INBOX, bundle)

    def _look(self, now_s: float, looks: bool, takes: bool) -> None:
        """For news, for what this rank 0 is told, or for both."""
        if looks and now_s >= self._count_at_s:
            self._count_at_s = now_s + _COUNT_NODES_EVERY_S
            self._nodes = max(1, self._client.count(_NODES, 0 if self._counted else 1))
            self._counted = True
        # Set before it is asked, and made no later afterwards: what is told meanwhile on this rank is to be looked at.
        own_look_at_s = now_s + max(_OWN_LOOK_S, self._look_every_s)
        if looks:
            self._look_at_s = own_look_at_s
        if takes:
            self._inbox_at_s = own_look_at_s
        counted = self._client.counts([_TURN] * looks + [f"{_INBOX}/count"] * takes)
        if looks and counted[0] != self._turn:
            self._hear(self._found())
            self._turn = counted[0]
            self._node.send(self._for_members())
            self._lively_until_s = max(self._lively_until_s, now_s + _LIVELY_S)
        if takes:
            for bundle in self._client.take_new(_INBOX, counted[-1]):
                if self._take_bundle(bundle):
                    self._lively_until_s = max(self._lively_until_s, now_s + _LIVELY_S)
        if self._is_told and now_s < self._lively_until_s:
            self._look_at_s = min(self._look_at_s, now_s + self._look_every_s)
            self._inbox_at_s = min(self._inbox_at_s, now_s + INBOX_EVERY_S)
            return
        place, seen = (f"{_INBOX}/count", self._client.taken(_INBOX)) if self._is_told else (_TURN, self._turn)
        self._client.watch({place: seen}, self._look_every_s, self._may_look, self._look_now)

    def _may_look(self) -> bool:
        """Where a script has taken our descriptors for its own, what asks the store may be one of them."""
        return self._node.is_ours

    def _look_now(self) -> None:
        self._look_at_s = self._inbox_at_s = 0.0
        self._node.wake()

    def _found(self) -> dict[str, Any]:
        found = {key: self._client.fetch(f"all/{key}") for key in ANNOUNCED}
        return {key: value for key, value in found.items() if value is not None}

    def _for_members(self) -> Message:
        """What was told to all; where that is too much for a packet, each looks for itself."""
        message = {"heard": self._heard}
        return message if len(json.dumps(message)) <= _MOST_IN_PACKET else {"look": True}

    def _hear(self, values: dict[str, Any]) -> None:
        self._heard = {**self._heard, **values}
        self._wake()

    def _take_bundle(self, bundle: Any) -> bool:
        """Returns whether something in it is in a hurry."""
        if not isinstance(bundle, dict):
            raise ExchangeError(f"{_INBOX!r} in the job's store holds what is not ours")
        hurried, at_once = bool(bundle.pop(_HURRIED, False)), bool(bundle.pop(_AT_ONCE, False))
        self._take(bundle, hurried, at_once)
        return hurried

    def _take(self, values: dict[str, Any], hurried: bool, at_once: bool = False) -> None:
        """What is in no hurry is found by who looks for it; nobody is woken for it."""
        with self._lock:
            if at_once:
                self._told_at_once.update(values)
            self._told.update({key: of for key, of in values.items() if at_once or key not in self._told_at_once})
        if hurried:
            self._wake()

    def _lose(self, error: Exception) -> None:
        self._error = error if isinstance(error, ExchangeError) else ExchangeError(f"between ranks: {error!r}")
        if self._node.leads:
            with suppress(ExchangeError):
                self._node.send({"lost": str(error)})
        self._wake()


class LocalExchange:
    """An exchange within one process, for jobs of one rank and for tests; values pass through JSON all the same."""

    news_take_s = 0.2

    def __init__(self) -> None:
        self._values: dict[str, str] = {}
        self._lists: dict[str, list[str]] = {}
        self._wakes: list[Callable[[], None]] = []

    def publish(self, key: str, value: Any) -> None:
        self._values[key] = json.dumps(value)

    def fetch(self, key: str) -> Any | None:
        text = self._values.get(key)
        return None if text is None else json.loads(text)

    def withdraw(self, key: str) -> None:
        self._values.pop(key, None)

    def tell(self, key: str, value: Any, *, patient: bool = False, at_once: bool = False) -> None:
        self.publish(key, value)
        self._wake()

    def told(self, key: str) -> Any | None:
        return self.fetch(key)

    def forget_told(self, prefix: str) -> None:
        for key in [key for key in list(self._values) if key.startswith(prefix)]:
            self.withdraw(key)

    def append(self, name: str, value: Any) -> None:
        self._lists.setdefault(name, []).append(json.dumps(value))
        self._wake()

    def take_new(self, name: str) -> list[Any]:
        return [json.loads(text) for text in self._lists.pop(name, [])]

    def tell_all(self, key: str, value: Any) -> None:
        self.publish(key, value)
        self._wake()

    def heard(self, key: str) -> Any | None:
        return self.fetch(key)

    def look_rarely(self) -> None:
        pass

    def on_news(self, wake: Callable[[], None]) -> None:
        self._wakes.append(wake)

    def close(self) -> None:
        pass

    def _wake(self) -> None:
        for wake in self._wakes:
            wake()


def wait_for(
    look: Callable[[str], Any | None], keys: Iterable[str], timeout_s: float, longest_pause_s: float = 0.02
) -> dict[str, Any]:
    """Wait until all keys have values, or the time is up; returns those that have.

    Args:
        look: for the value of a key.
        keys: to look for.
        timeout_s: until then.
        longest_pause_s: between looks; pauses grow to that.
    """
    missing = list(keys)
    found: dict[str, Any] = {}
    deadline_s = time.monotonic() + timeout_s
    pause_s = min(0.02, longest_pause_s)
    while missing:
        for key in list(missing):
            value = look(key)
            if value is not None:
                found[key] = value
                missing.remove(key)
        if not missing or time.monotonic() >= deadline_s:
            break
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, longest_pause_s)
    return found


def open_exchange(name: str, leader: int = 0) -> Exchange:
    """The exchange of this job: its default store, or a local one when `torch.distributed` is not initialised.

    Waits until all ranks are there, before training starts.

    Args:
        name: the same on every rank.
        leader: the rank that is told, the same on every rank.

    Raises:
        ExchangeError: the ranks do not find each other in time.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        return LocalExchange()
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    client = StoreClient(store, f"perseus/{name}")
    try:
        session = meet(client, rank, dist.get_world_size())
        client.enter(session)
        return StoreExchange(client, rank, f"perseus/{session}", leader)
    except BaseException:
        client.close()
        raise


class Lobby(Protocol):
    """Where ranks meet, see `StoreClient`."""

    def publish(self, key: str, value: Any) -> None: ...
    def fetch(self, key: str) -> Any | None: ...


def meet(lobby: Lobby, rank: int, world_size: int, timeout_s: float = 60.0) -> str:
    """Agree on a name that no earlier run has used: a restarted job may find its old keys in the same store.

    Every rank says hello with a number of its own, and rank 0 answers each such number with the name, until every
    rank has said that it is there; then it says so. What an earlier run left has other numbers.

    Raises:
        ExchangeError: not within `timeout_s`.
    """
    if rank != 0:
        mine = secrets.token_hex(8)
        lobby.publish(f"hello/{rank}", mine)
        key = f"welcome/{mine}"
        session = wait_for(lobby.fetch, [key], timeout_s, max(0.5, world_size / 2000)).get(key)
        if not isinstance(session, str):
            raise ExchangeError(f"rank 0 did not answer within {timeout_s:.0f} s")
        lobby.publish(f"{session}/here/{rank}", True)
        if not wait_for(lobby.fetch, [f"{session}/all"], timeout_s, max(0.5, world_size / 2000)):
            raise ExchangeError(f"not all ranks came within {timeout_s:.0f} s")
        return session
    session = secrets.token_hex(8)
    missing = set(range(1, world_size))
    answered: dict[int, Any] = {}
    deadline_s, pause_s = time.monotonic() + timeout_s, 0.02
    while missing:
        for other in sorted(missing):
            if other in answered and lobby.fetch(f"{session}/here/{other}") is not None:
                missing.discard(other)
                continue
            number = lobby.fetch(f"hello/{other}")
            if number is not None and number != answered.get(other):
                lobby.publish(f"welcome/{number}", session)
                answered[other] = number
        if missing and time.monotonic() > deadline_s:
            raise ExchangeError(f"rank {min(missing)} did not come within {timeout_s:.0f} s")
        time.sleep(pause_s)
        pause_s = min(1.5 * pause_s, max(0.5, world_size / 500))
    lobby.publish(f"{session}/all", True)
    return session
