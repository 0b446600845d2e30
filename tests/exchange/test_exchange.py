"""Ranks of one job over one store: who hears what, how often the store is asked, and what happens when it fails."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as TimeoutOfFuture
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, TCPStore

from perseus_plugin.exchange import client as client_module
from perseus_plugin.exchange import node as node_module
from perseus_plugin.exchange import store as store_module
from perseus_plugin.exchange.client import ExchangeError, StoreClient
from perseus_plugin.exchange.messages import CALIBRATION, NEWS, REUSE
from perseus_plugin.exchange.node import Node
from perseus_plugin.exchange.store import Exchange, LocalExchange, StoreExchange, meet, wait_for
from tests.exchange.frozen import store_host
from tests.waiting import came_true, wait_until


class CountingStore:
    """Counts what one rank asks of a store that all share."""

    def __init__(self, store: Any) -> None:
        self._store = store
        self.calls: list[str] = []
        self.counters: list[str] = []

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._store, name)
        if name == "clone":
            raise AttributeError(name)

        def counted(*arguments: Any) -> Any:
            self.calls.append(name)
            if name == "add":
                self.counters.append(arguments[0])
            return method(*arguments)

        return counted


class Ranks:
    """Ranks of one job; each has an exchange over the same store.

    Args:
        count: how many.
        per_node: of them, on one machine.
        beside: how many more there could be on rank 0's machine.
        leader: the rank that is told.
    """

    def __init__(self, count: int, per_node: int, beside: int = 0, leader: int = 0) -> None:
        self.store = HashStore()
        self.asked = [CountingStore(self.store) for _ in range(count)]
        job = secrets.token_hex(8)
        self.exchanges = [
            StoreExchange(StoreClient(asked, "p"), rank, f"perseus-test/{job}/{(rank + beside) // per_node}", leader)
            for rank, asked in enumerate(self.asked)
        ]

    def __getitem__(self, rank: int) -> StoreExchange:
        return self.exchanges[rank]

    def all_hear(self, key: str, value: Any) -> bool:
        return came_true(lambda: all(one.heard(key) == value for one in self.exchanges))

    def close(self) -> None:
        for exchange in self.exchanges:
            exchange.close()


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_EVERY_S", "INBOX_EVERY_S"):
        monkeypatch.setattr(store_module, name, 0.02)
    monkeypatch.setattr(node_module, "_REJOIN_S", 0.1)


@pytest.fixture
def ranks_of() -> Iterator[Callable[..., Ranks]]:
    made: list[Ranks] = []

    def make(count: int, per_node: int, beside: int = 0, leader: int = 0) -> Ranks:
        made.append(Ranks(count, per_node, beside, leader))
        return made[-1]

    yield make
    for ranks in made:
        ranks.close()


RanksOf = Callable[..., Ranks]


# Who hears what.


@pytest.mark.parametrize("per_node", [1, 2, 4])
def test_all_hear_what_is_told_to_all_and_rank_0_what_it_is_told(ranks_of: RanksOf, per_node: int) -> None:
    ranks = ranks_of(4, per_node)
    for rank in range(4):
        ranks[rank].tell(f"facts/{rank}", {"rank": rank})
    found = wait_for(ranks[0].told, [f"facts/{rank}" for rank in range(4)], 20)
    assert found == {f"facts/{rank}": {"rank": rank} for rank in range(4)}
    ranks[0].tell_all(NEWS, {"sequence": 1})
    assert ranks.all_hear(NEWS, {"sequence": 1})
    ranks[3].tell_all(REUSE, [True])
    ranks[0].tell_all(NEWS, {"sequence": 2})
    assert ranks.all_hear(REUSE, [True])
    assert ranks.all_hear(NEWS, {"sequence": 2})


@pytest.mark.parametrize("per_node", [1, 2, 4])
@pytest.mark.parametrize("leader", [1, 3])
def test_another_rank_is_told_where_it_leads(ranks_of: RanksOf, per_node: int, leader: int) -> None:
    ranks = ranks_of(4, per_node, leader=leader)
    for rank in range(4):
        ranks[rank].tell(f"facts/{rank}", rank)
        ranks[rank].append("reports", rank)
    keys = [f"facts/{rank}" for rank in range(4)]
    assert wait_for(ranks[leader].told, keys, 20) == {f"facts/{rank}": rank for rank in range(4)}
    reports: set[int] = set()
    assert came_true(lambda: reports.update(ranks[leader].take_new("reports")) or len(reports) == 4)
    assert [ranks[rank].told(key) for rank in range(4) if rank != leader for key in keys] == [None] * 12
    ranks[leader].tell_all(NEWS, {"sequence": 1})
    assert ranks.all_hear(NEWS, {"sequence": 1})
    ranks[0].tell("last", True, at_once=True)
    assert came_true(lambda: ranks[leader].told("last") is True)


def test_what_is_too_large_for_the_node_is_heard_by_all_and_by_who_joins_later(ranks_of: RanksOf) -> None:
    ranks = ranks_of(3, 3)
    large = "x" * 300_000  # more than fits into the kernel's buffer of a socket
    ranks[0].tell_all(REUSE, large)
    assert ranks.all_hear(REUSE, large)
    ranks[0].tell_all(NEWS, {"sequence": 1})
    assert ranks.all_hear(NEWS, {"sequence": 1})
    leader = next(one for one in ranks.exchanges if one._node.leads)
    later = StoreExchange(StoreClient(ranks.asked[0], "p"), 3, leader._node._name)
    assert came_true(lambda: later.heard(REUSE) == large)
    later.close()


def test_the_last_value_wins_and_what_is_forgotten_is_gone(ranks_of: RanksOf) -> None:
    ranks = ranks_of(2, 2)
    for number in range(3):
        ranks[1].tell("stats/1", number)
    wait_until(lambda: ranks[0].told("stats/1") == 2)
    assert ranks[0].told("stats/1") == 2, "reading takes nothing away"
    ranks[1].tell("recheck/1/1", "a")
    wait_until(lambda: ranks[0].told("recheck/1/1") == "a")
    ranks[0].forget_told("recheck/")
    assert ranks[0].told("recheck/1/1") is None
    assert ranks[0].told("stats/1") == 2


@pytest.mark.parametrize("per_node", [1, 4])
def test_what_is_appended_is_taken_once_and_of_each_rank_in_its_order(ranks_of: RanksOf, per_node: int) -> None:
    ranks = ranks_of(4, per_node)
    for number in range(20):
        for rank in range(4):
            ranks[rank].append("list", [rank, number])
            ranks[rank].append("other", rank)
    taken: list[list[int]] = []
    assert came_true(lambda: bool(taken.extend(ranks[0].take_new("list"))) or len(taken) == 80)
    for rank in range(4):
        assert [number for who, number in taken if who == rank] == list(range(20))
    assert ranks[0].take_new("list") == []


def test_one_process_is_told_and_hears_the_same_way() -> None:
    exchange: Exchange = LocalExchange()
    exchange.tell("stats/0", (1, 2))
    exchange.tell_all(NEWS, {"sequence": 1})
    exchange.append("list", 1)
    assert (exchange.told("stats/0"), exchange.heard(NEWS), exchange.take_new("list")) == ([1, 2], {"sequence": 1}, [1])
    exchange.forget_told("stats/")
    exchange.publish("plan", 1)
    exchange.withdraw("plan")
    assert (exchange.told("stats/0"), exchange.fetch("plan"), exchange.take_new("list")) == (None, None, [])


def test_who_waits_is_woken(ranks_of: RanksOf) -> None:
    ranks = ranks_of(2, 1)
    woken = [threading.Event(), threading.Event()]
    for rank in range(2):
        ranks[rank].on_news(woken[rank].set)
        woken[rank].clear()
    ranks[1].tell("stats/1", 1)
    assert woken[0].wait(20)
    ranks[0].tell_all(NEWS, 1)
    assert woken[1].wait(20)


def test_what_is_told_at_once_is_there_even_if_nothing_follows(ranks_of: RanksOf) -> None:
    ranks = ranks_of(3, 3)
    ranks[2].tell("stats/2", "last", at_once=True)
    ranks[1].tell("windows/1", "in a hurry")
    ranks[1].tell("stats/1", "patient", patient=True)
    for rank in (1, 2):
        ranks[rank].close()
    keys = ["stats/2", "windows/1", "stats/1"]
    assert wait_for(ranks[0].told, keys, 20).keys() == set(keys)


def test_once_rank_0_has_said_its_last_it_soon_hears_what_the_others_say_last(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOOK_EVERY_S", 3600.0)
    monkeypatch.setattr(store_module, "_LIVELY_S", 0.0)
    ranks = ranks_of(2, 1)
    wait_until(lambda: ranks[0]._inbox_at_s > time.monotonic() + 1800.0)
    ranks[1].tell("stats/1", "before", at_once=True)
    ranks[0].tell("stats/0", "last", at_once=True)
    wait_until(lambda: ranks[0].told("stats/1") == "before")
    ranks[1].tell("windows/1", "in a hurry")
    wait_until(lambda: ranks[0].told("windows/1") == "in a hurry")
    ranks[1].tell("stats/1", "last", at_once=True)
    wait_until(lambda: ranks[0].told("stats/1") == "last")


# How often the store is asked.


def test_while_there_is_nothing_new_one_rank_of_a_node_asks_one_thing_and_the_others_nothing(ranks_of: RanksOf) -> None:
    ranks = ranks_of(8, 4)
    ranks[0].tell_all(NEWS, 1)
    assert ranks.all_hear(NEWS, 1)
    leads = [rank for rank in range(8) if ranks[rank]._node.leads]
    assert len(leads) == 2, "one of each node"
    before = [len(asked.calls) for asked in ranks.asked]
    assert came_true(lambda: all(len(ranks.asked[rank].calls) >= before[rank] + 5 for rank in leads))
    for rank in range(8):
        new = ranks.asked[rank].calls[before[rank] :]
        assert set(new) <= {"add"}, "looks at counters"
        assert new == [] or rank in leads or rank == 0


def test_what_is_told_is_seen_while_the_threads_of_exchanges_rest(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "_OWN_LOOK_S", 3600.0)
    monkeypatch.setattr(store_module, "_LIVELY_S", 0.0)
    ranks = ranks_of(4, 2)

    def rest() -> bool:
        leads = [one for one in ranks.exchanges if one._node.leads]
        looks_at_s = [one._look_at_s for one in leads] + [ranks[0]._inbox_at_s]
        return min(looks_at_s) > time.monotonic() + 1800.0

    for number in range(3):
        assert came_true(rest)
        ranks[number].tell_all(NEWS, number)
        assert ranks.all_hear(NEWS, number)
        assert came_true(rest)
        ranks[3].tell("windows/3", number)
        assert came_true(lambda number=number: ranks[0].told("windows/3") == number)


def test_rank_0_looks_at_one_counter_but_after_it_was_told_something_in_a_hurry(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "LOOK_EVERY_S", 0.1)
    monkeypatch.setattr(store_module, "INBOX_EVERY_S", 0.001)
    monkeypatch.setattr(store_module, "_LIVELY_S", 0.0)
    monkeypatch.setattr(store_module, "_OWN_LOOK_S", 3600.0)
    ranks = ranks_of(2, 1)
    counters = ranks.asked[0].counters

    def looks() -> tuple[int, int]:
        return counters.count("p/turn"), counters.count("p/inbox/count")

    wait_until(lambda: looks()[1] >= 10)
    turns, inboxes = looks()
    assert turns <= inboxes / 2
    monkeypatch.setattr(store_module, "_LIVELY_S", 3600.0)
    monkeypatch.setattr(store_module, "PATIENT_S", 0.01)
    ranks[1].tell("stats/1", 1, patient=True)
    wait_until(lambda: ranks[0].told("stats/1") == 1)
    assert ranks[0]._lively_until_s < time.monotonic(), "nothing follows"
    turns, inboxes = looks()
    ranks[1].tell("windows/1", 1)
    assert came_true(lambda: looks()[0] >= turns + 5 and looks()[1] - inboxes > 2 * (looks()[0] - turns))


@pytest.mark.parametrize("leader", [0, 1])
def test_rank_0_is_woken_for_what_others_append_and_not_for_its_own(ranks_of: RanksOf, leader: int) -> None:
    ranks = ranks_of(2, 1, leader=leader)
    woken = threading.Event()
    ranks[leader].on_news(woken.set)
    woken.clear()
    ranks[leader].append("works", 1)
    assert not woken.is_set()
    assert ranks[leader].take_new("works") == [1]
    ranks[1 - leader].append("works", 2)
    assert woken.wait(20)
    assert ranks[leader].take_new("works") == [2]


def test_who_waits_for_news_is_not_woken_for_what_is_in_no_hurry(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "PATIENT_S", 0.01)
    ranks = ranks_of(3, 2)
    woken = threading.Event()
    ranks[0].on_news(woken.set)
    woken.clear()
    for rank in range(3):
        ranks[rank].tell(f"stats/{rank}", 1, patient=True)
    assert came_true(lambda: all(ranks[0].told(f"stats/{rank}") == 1 for rank in range(3)))
    assert not woken.is_set()
    for tell in (
        lambda: ranks[0].tell("windows/0", 1),
        lambda: ranks[1].tell("windows/1", 1),
        lambda: ranks[2].tell("windows/2", 1),
        lambda: ranks[2].tell("stats/2", 2, at_once=True),
        lambda: ranks[2].tell_all(NEWS, 1),
    ):
        woken.clear()
        tell()
        assert woken.wait(20.0)


@pytest.mark.parametrize("per_node", [1, 2, 3])
def test_what_is_told_at_once_is_the_last_word_of_a_rank(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch, per_node: int
) -> None:
    monkeypatch.setattr(store_module, "PATIENT_S", 3600.0)
    ranks = ranks_of(3, per_node)
    for rank in range(3):
        ranks[rank].tell(f"stats/{rank}", "before", patient=True)
        ranks[rank].tell(f"stats/{rank}", "last", at_once=True)
    assert came_true(lambda: all(ranks[0].told(f"stats/{rank}") == "last" for rank in range(3)))
    ranks[1].tell("facts/1", "later")
    ranks[2].close()
    ranks[1].close()  # with what they had not sent yet
    assert came_true(lambda: ranks[0].told("facts/1") == "later")
    assert [ranks[0].told(f"stats/{rank}") for rank in range(3)] == ["last"] * 3


def test_what_ranks_of_a_node_tell_goes_in_one_piece(ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_TOGETHER_S", 2.0)
    ranks = ranks_of(5, 4, beside=3)
    assert not any("set" in asked.calls for asked in ranks.asked)
    for number in range(5):
        for rank in range(1, 5):
            ranks[rank].tell(f"windows/{rank}", number)
    assert came_true(lambda: all(ranks[0].told(f"windows/{rank}") == 4 for rank in range(1, 5)))
    assert sum(asked.calls.count("set") for asked in ranks.asked) <= 2, "two, if the machine is very busy"


def test_a_large_job_looks_and_tells_more_rarely(ranks_of: RanksOf) -> None:
    ranks = ranks_of(1, 1)
    small_s = ranks[0].news_take_s
    StoreClient(ranks.store, "p").count("nodes", 5000)
    ranks[0]._count_at_s = 0.0
    assert came_true(lambda: ranks[0].news_take_s > 5.0)
    assert small_s < 1.0


def test_where_no_plans_are_made_the_store_is_looked_at_more_rarely(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "RARELY_S", 3600.0)
    monkeypatch.setattr(store_module, "_OWN_LOOK_S", 0.01)
    monkeypatch.setattr(store_module, "_LIVELY_S", 0.0)
    ranks = ranks_of(1, 1)
    ranks[0].look_rarely()
    assert came_true(lambda: ranks[0]._look_at_s > time.monotonic() + 1800.0)
    ranks[0].tell_all(NEWS, 1)
    assert ranks.all_hear(NEWS, 1)


def test_waiting_for_a_value_is_a_few_looks_and_not_thousands(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s, looks = 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    def look(key: str) -> None:
        nonlocal looks
        looks += 1

    monkeypatch.setattr(store_module.time, "sleep", sleep)
    monkeypatch.setattr(store_module.time, "monotonic", lambda: now_s)
    assert wait_for(look, ["key"], 60.0, 0.5) == {}
    assert looks < 150


@pytest.mark.parametrize("world_size", [2, 16])
def test_starting_is_a_few_calls_per_rank(world_size: int) -> None:
    store = HashStore()
    asked = [CountingStore(store) for _ in range(world_size)]
    clients = [StoreClient(one, "p") for one in asked]
    threads = [
        threading.Thread(target=meet, args=(clients[rank], rank, world_size, 20.0)) for rank in range(1, world_size)
    ]
    for thread in threads:
        thread.start()
    meet(clients[0], 0, world_size, 20.0)
    for thread in threads:
        thread.join()
    rounds = 8  # looks with growing pauses; machines are busy
    assert sum(len(one.calls) for one in asked) <= world_size * (6 + 4 * rounds)


# What is no more needed does not stay.


def test_the_store_does_not_grow_with_what_is_told(ranks_of: RanksOf) -> None:
    ranks = ranks_of(3, 1)

    def replan(version: int) -> None:
        ranks[0].publish(f"plan/{version}/0", {"version": version})
        ranks[0].tell_all(NEWS, {"version": version})
        assert ranks.all_hear(NEWS, {"version": version})
        for rank in range(3):
            ranks[rank].tell(f"recheck/{version}/{rank}", version)
            ranks[rank].append("stragglers", version)
        assert len(wait_for(ranks[0].told, [f"recheck/{version}/{rank}" for rank in range(3)], 20)) == 3
        ranks[0].forget_told("recheck/")
        ranks[0].withdraw(f"plan/{version}/0")
        ranks[0].take_new("stragglers")

    replan(1)
    wait_until(lambda: not any(len(one.calls) == 0 for one in ranks.asked))
    before = ranks.store.num_keys()
    for version in range(2, 12):
        replan(version)
    assert came_true(lambda: ranks.store.num_keys() <= before)
    assert len(ranks[0]._told) < 12


# A node.


def test_when_who_leads_has_gone_another_one_does(ranks_of: RanksOf) -> None:
    ranks = ranks_of(4, 4)
    ranks[0].tell_all(NEWS, 1)
    assert ranks.all_hear(NEWS, 1)
    (leader,) = [rank for rank in range(4) if ranks[rank]._node.leads]
    ranks[leader].close()
    others = [ranks[rank] for rank in range(4) if rank != leader]
    StoreExchange.tell_all(others[0], NEWS, 2)
    assert came_true(lambda: all(one.heard(NEWS) == 2 for one in others))
    assert came_true(lambda: sum(one._node.leads for one in others) == 1)
    client = StoreClient(ranks.store, "p")
    told = client.count("inbox/count")
    others[1].tell("stats/9", 1)
    assert came_true(lambda: client.count("inbox/count") > told)


def test_a_message_too_large_for_the_node_goes_to_the_store_itself(ranks_of: RanksOf) -> None:
    ranks = ranks_of(2, 2)
    value = ["x" * 1_000_000] * 3
    ranks[1].tell("estimate/0/1", value)
    assert came_true(lambda: ranks[0].told("estimate/0/1") == value)
    ranks[1].tell("stats/1", 1)
    assert came_true(lambda: ranks[0].told("stats/1") == 1)


def node(name: str) -> Node:
    return Node(name, lambda: {"heard": {}})


def test_processes_of_other_users_are_not_talked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"perseus-test/{secrets.token_hex(8)}"
    first = node(name)
    monkeypatch.setattr(node_module.os, "geteuid", lambda: os.getuid() + 1)
    second = node(name)
    assert second.leads, "it does not follow somebody else's"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
        stranger.settimeout(20.0)
        stranger.connect(f"\0{name}")
        for _ in range(2):  # the second one has called before
            first.receive(20.0)
        assert stranger.recv(100) == b"", "nor is it let in"
    for one in (first, second):
        one.close()


def test_who_comes_before_another_serves_follows_it_later() -> None:
    name = f"perseus-test/{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as first:
        first.bind(f"\0{name}")
        second = node(name)
        assert second.leads, "nobody answers yet"
        first.listen()
        assert second.receive(10.0) == []
        assert not second.leads, "who waits for what others say wakes to try again"
    third = node(name)  # it comes first: the second waits before it tries again
    assert third.leads
    assert came_true(lambda: third.receive(0.0) + second.receive(0.0) == [{"heard": {}}])
    assert not second.leads
    for one in (second, third):
        one.close()


@pytest.mark.parametrize("packet", [b"{", b"[1]", b"\xff", b"[" * 100_000])
def test_what_is_no_message_is_not_taken(packet: bytes) -> None:
    name = f"perseus-test/{secrets.token_hex(8)}"
    leader = node(name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as peer:
        peer.connect(f"\0{name}")
        leader.receive(20.0)
        peer.send(packet)
        assert leader.receive(20.0) == []
    member = node(name)
    leader.receive(20.0)
    assert member.send({"key": "k"})
    while not (messages := leader.receive(20.0)):
        pass
    assert messages == [{"key": "k"}], "others are served"
    for one in (member, leader):
        one.close()


def test_a_script_that_takes_our_descriptors_for_its_own_keeps_its_files(tmp_path: Path) -> None:
    name = f"perseus-test/{secrets.token_hex(8)}"
    leader, member = node(name), node(name)
    leader.receive(20.0)
    taken = [one.fileno() for one in member._inodes]
    for descriptor in taken:
        os.close(descriptor)
    files = [os.open(tmp_path / str(number), os.O_RDWR | os.O_CREAT) for number in range(len(taken))]
    assert set(files) == set(taken), "the system gives the lowest that are free"
    with pytest.raises(ExchangeError, match="has closed descriptors"):
        member.send({"key": "k"})
    member.wake()
    member.close()
    for number, descriptor in enumerate(files):
        os.close(descriptor)  # still the script's
        assert (tmp_path / str(number)).read_bytes() == b""
    leader.close()


def test_a_script_that_takes_our_descriptors_for_its_own_keeps_what_its_sockets_get() -> None:
    member = node("")
    theirs, others = socket.socketpair()
    for one in member._inodes:
        os.dup2(theirs.fileno(), one.fileno())
    member.wake()
    others.setblocking(False)
    with pytest.raises(BlockingIOError):
        others.recv(1)
    taken = [one.fileno() for one in member._inodes]
    member.close()
    others.sendall(b"for the script")
    assert theirs.recv(64) == b"for the script"
    for number in taken:
        os.close(number)
    theirs.close()
    others.close()


def test_where_a_script_has_taken_our_descriptors_the_store_is_not_even_looked_at(
    ranks_of: RanksOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the client talks to the store by may be one of them."""
    monkeypatch.setattr(store_module, "_OWN_LOOK_S", 1.0)
    monkeypatch.setattr(store_module, "_LIVELY_S", 0.0)
    ranks = ranks_of(1, 1)
    counters, exchange = ranks.asked[0].counters, ranks[0]
    assert came_true(lambda: len(counters) > 20), "while its own thread rests"
    theirs, others = socket.socketpair()
    taken = [one.fileno() for one in exchange._node._inodes]
    for number in taken:
        os.dup2(theirs.fileno(), number)
    before = len(counters)
    assert came_true(lambda: exchange._error is not None)
    assert len(counters) <= before + 2, "but for a look that was under way"
    for number in taken:
        os.close(number)
    theirs.close()
    others.close()


# A store that fails.


def test_every_call_to_a_frozen_store_ends() -> None:
    with store_host() as host:
        store = TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False)
        client = StoreClient(store, "p", limit_s=0.5)
        client.publish("key", 1)
        host.freeze()
        client.enter("frozen")  # with this it has half a second, and not a minute
        with pytest.raises(ExchangeError, match=r"cannot fetch 'key' from .*: its host has not answered for 0.5 s"):
            client.fetch("key")
        for use in (lambda: client.publish("key", 2), lambda: client.count("n"), lambda: client.append("list", 1)):
            with pytest.raises(ExchangeError, match="has not answered"):
                use()
        late = StoreClient(store, "p", start_limit_s=0.5)  # a client of its own cannot be made any more either
        with pytest.raises(ExchangeError, match="has not answered"):
            late.fetch("key")


def test_all_ranks_of_a_node_learn_that_the_store_is_frozen() -> None:
    with store_host() as host:
        job = secrets.token_hex(8)
        store = TCPStore("127.0.0.1", host.port, is_master=False, wait_for_workers=False)
        clients = [StoreClient(store, "p", limit_s=1.0) for _ in range(3)]
        ranks = [StoreExchange(client, rank, f"perseus-test/{job}") for rank, client in enumerate(clients, 1)]
        ranks[0].tell_all(NEWS, 1)
        assert came_true(lambda: all(one.heard(NEWS) == 1 for one in ranks))
        host.freeze()
        for client in clients:
            client.enter("frozen")  # with this they have a second, and not a minute

        def lost(one: StoreExchange) -> bool:
            try:
                one.heard(CALIBRATION)
            except ExchangeError as error:
                return "has not answered" in str(error)
            return False

        assert came_true(lambda: all(lost(one) for one in ranks))
        for one in ranks:
            with pytest.raises(ExchangeError, match="has not answered"):
                one.tell("stats/1", 1)
            one.close()


def test_whoever_tells_or_hears_learns_that_the_store_has_failed(ranks_of: RanksOf) -> None:
    class Gone:
        def add(self, *_: Any) -> int:
            raise RuntimeError("connection reset")

    exchange = StoreExchange(StoreClient(Gone(), "p"))
    assert came_true(lambda: exchange._error is not None)
    for use in (
        lambda: exchange.heard(NEWS),
        lambda: exchange.told("k"),
        lambda: exchange.tell("k", 1),
        lambda: exchange.take_new("list"),
        lambda: exchange.tell_all(NEWS, 1),
    ):
        with pytest.raises(ExchangeError, match="cannot count 'nodes' in the job's store: connection reset"):
            use()
    exchange.close()


def test_a_process_that_was_stopped_itself_does_not_take_the_store_for_frozen(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = 0

    class AfterAStop(Future[Any]):
        """Waiting for it ends at once, as its time has passed meanwhile."""

        def result(self, timeout: float | None = None) -> Any:
            nonlocal waits
            waits += 1
            if waits == 1:
                raise TimeoutOfFuture
            return super().result(20)

    monkeypatch.setattr(client_module, "Future", AfterAStop)
    assert StoreClient(HashStore(), "p").count("n", 3) == 3
    assert waits == 2
