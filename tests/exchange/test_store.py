from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed import HashStore, PrefixStore, TCPStore

from perseus_plugin.exchange.client import ExchangeError, StoreClient
from perseus_plugin.exchange.store import Lobby, LocalExchange, StoreExchange, meet, open_exchange, wait_for

JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner, max_size=3)),
    max_leaves=6,
)


@pytest.fixture(scope="module")
def tcp_store() -> TCPStore:
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=20))


@pytest.fixture(params=["local", "hash", "tcp", "default"])
def exchange(request: pytest.FixtureRequest, tcp_store: TCPStore) -> Lobby:
    stores: dict[str, Callable[[], Any]] = {
        "hash": HashStore,
        "tcp": lambda: tcp_store,
        # What torch.distributed wraps the default store into.
        "default": lambda: PrefixStore("default_pg", tcp_store),
    }
    if request.param == "local":
        return LocalExchange()
    return StoreClient(stores[request.param](), f"perseus/{request.node.name}")


def test_a_value_arrives_and_the_last_one_wins(exchange: Lobby) -> None:
    exchange.publish("news", {"sequence": 1, "reason": "größer", "times": [0.1, None]})
    assert exchange.fetch("news") == {"sequence": 1, "reason": "größer", "times": [0.1, None]}
    exchange.publish("news", {"sequence": 2})
    assert exchange.fetch("news") == {"sequence": 2}
    assert exchange.fetch("news") == {"sequence": 2}, "fetching takes nothing away"


def test_a_key_that_nobody_published_is_none_at_once(exchange: Lobby) -> None:
    begin_s = time.monotonic()
    assert exchange.fetch("nobody") is None
    assert time.monotonic() - begin_s < 4.0, "it waited for the key"


def test_a_large_value_arrives(exchange: Lobby) -> None:
    value = {"clocks_mhz": list(range(20_000))}
    exchange.publish("plan/1/0", value)
    assert exchange.fetch("plan/1/0") == value


@given(JSON)
def test_what_json_can_say_comes_back(value: Any) -> None:
    for exchange in (LocalExchange(), StoreClient(HashStore(), "p")):
        exchange.publish("key", value)
        assert exchange.fetch("key") == value


def test_prefixes_keep_sessions_apart(tcp_store: TCPStore) -> None:
    first, second = StoreClient(tcp_store, "apart/1"), StoreClient(tcp_store, "apart/2")
    first.publish("news", 1)
    assert second.fetch("news") is None
    assert first.fetch("news") == 1


def test_two_clients_of_one_store_see_each_other(tcp_store: TCPStore) -> None:
    other = TCPStore("127.0.0.1", tcp_store.port, is_master=False, wait_for_workers=False)
    StoreClient(tcp_store, "two").publish("estimate/1", [1, 2])
    assert StoreClient(other, "two").fetch("estimate/1") == [1, 2]


def test_our_calls_do_not_wait_behind_the_training_and_leave_its_timeout(tcp_store: TCPStore) -> None:
    exchange = StoreClient(tcp_store, "behind")
    assert tcp_store.timeout == timedelta(seconds=20)
    blocked = threading.Thread(target=lambda: tcp_store.wait(["behind/the training"], timedelta(seconds=20)))
    blocked.start()
    try:
        done = threading.Event()

        def use() -> None:
            exchange.publish("ours", 1)
            assert exchange.fetch("ours") == 1
            done.set()

        threading.Thread(target=use, daemon=True).start()
        assert done.wait(10), "our call waited for the training's"
        assert blocked.is_alive()
    finally:
        TCPStore("127.0.0.1", tcp_store.port, wait_for_workers=False).set("behind/the training", "1")
        blocked.join(20)


@pytest.mark.parametrize("content", [b"", b"{", b"nonsense", b"\xff\xfe"])
def test_what_is_no_json_is_an_exchange_error(content: bytes) -> None:
    store = HashStore()
    store.set("p/key", content)
    with pytest.raises(ExchangeError, match=r"'key' in the job's store is not valid JSON"):
        StoreClient(store, "p").fetch("key")


class BrokenStore:
    """A store whose server is gone; it cannot be cloned either."""

    def set(self, key: str, value: bytes) -> None:
        raise RuntimeError("connection reset")

    check = get = set

    def clone(self) -> None:
        raise NotImplementedError


def test_a_store_that_fails_is_an_exchange_error() -> None:
    exchange = StoreClient(BrokenStore(), "p")
    with pytest.raises(ExchangeError, match="cannot publish 'key' in the job's store: connection reset"):
        exchange.publish("key", 1)
    with pytest.raises(ExchangeError, match="cannot fetch 'key' from the job's store"):
        exchange.fetch("key")


def test_a_server_that_went_away_is_an_exchange_error() -> None:
    server: TCPStore | None = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    assert server is not None
    client = TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    exchange = StoreClient(client, "gone")
    exchange.publish("key", 1)
    server = None

    def use() -> None:
        for _ in range(3):
            exchange.publish("key", 2)
            exchange.fetch("key")

    with pytest.raises(ExchangeError, match="the job's store"):
        use()


def test_local_values_pass_through_json() -> None:
    exchange = LocalExchange()
    mine = {"a": (1, 2)}
    exchange.publish("key", mine)
    assert exchange.fetch("key") == {"a": [1, 2]}
    exchange.fetch("key")["a"].append(3)
    assert exchange.fetch("key") == {"a": [1, 2]}, "a reader changed what others read"
    with pytest.raises(TypeError):
        exchange.publish("key", object())


class Counting(LocalExchange):
    """Publishes `late` once it has been asked for a few times."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def fetch(self, key: str) -> Any | None:
        self.asked += key == "late"
        if self.asked == 3:
            self.publish("late", "there")
        return super().fetch(key)


def test_wait_for_waits_until_all_are_there() -> None:
    exchange = Counting()
    exchange.publish("early", 0)
    assert wait_for(exchange.fetch, iter(["early", "late"]), timeout_s=20, longest_pause_s=0.001) == {
        "early": 0,
        "late": "there",
    }
    assert exchange.asked == 3


def test_wait_for_returns_what_came_in_time() -> None:
    exchange = LocalExchange()
    exchange.publish("a", 1)
    assert wait_for(exchange.fetch, ["a", "b"], timeout_s=0.0) == {"a": 1}
    assert wait_for(exchange.fetch, [], timeout_s=100.0) == {}


@pytest.fixture
def process_group() -> Iterator[None]:
    import torch.distributed as dist

    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_the_exchange_of_a_job_of_its_own() -> None:
    assert isinstance(open_exchange("perseus/1"), LocalExchange)


@pytest.mark.usefixtures("process_group")
def test_the_exchange_of_a_distributed_job_is_its_store() -> None:
    import torch.distributed as dist

    exchange = open_exchange("1")
    assert isinstance(exchange, StoreExchange)
    exchange.publish("plan", 5)
    assert json.loads(dist.distributed_c10d._get_default_store().get(exchange._client._key("plan"))) == 5
    exchange.close()
    again = open_exchange("1")
    assert again.fetch("plan") is None, "a restarted job must not read what an earlier run left in the same store"
    again.close()


@pytest.mark.parametrize("world_size", [1, 3])
def test_ranks_meet_under_a_name_that_no_earlier_run_used(world_size: int) -> None:
    lobby = LocalExchange()
    names = set()
    for _ in range(3):
        with ThreadPoolExecutor(world_size) as pool:
            met = list(pool.map(lambda rank: meet(lobby, rank, world_size, 20.0), range(world_size)))
        assert len(set(met)) == 1
        names.add(met[0])
    assert len(names) == 3


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(ExchangeError, match="rank 1 did not come within"):
        meet(LocalExchange(), 0, 2, 0.05)
    with pytest.raises(ExchangeError, match="rank 0 did not answer within"):
        meet(LocalExchange(), 1, 2, 0.05)


# Lists.


@pytest.fixture(params=["hash", "tcp"])
def lists(request: pytest.FixtureRequest, tcp_store: TCPStore) -> StoreClient:
    return StoreClient(HashStore() if request.param == "hash" else tcp_store, f"perseus/{request.node.name}")


def test_what_is_appended_is_taken_once_and_in_order(lists: StoreClient) -> None:
    exchange = lists
    assert exchange.take_new("list") == []
    for number in range(3):
        exchange.append("list", {"number": number})
    assert exchange.take_new("list") == [{"number": 0}, {"number": 1}, {"number": 2}]
    assert exchange.take_new("list") == []
    exchange.append("list", [4])
    assert exchange.take_new("other") == []
    assert exchange.take_new("list") == [[4]]


def test_many_ranks_append_and_none_is_lost(tcp_store: TCPStore) -> None:
    reader = StoreClient(tcp_store, "many")
    clients = [TCPStore("127.0.0.1", tcp_store.port, is_master=False, wait_for_workers=False) for _ in range(4)]

    def append(rank: int) -> None:
        exchange = StoreClient(clients[rank], "many")
        for number in range(20):
            exchange.append("list", [rank, number])

    threads = [threading.Thread(target=append, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    taken: list[list[int]] = []
    while any(thread.is_alive() for thread in threads) or len(taken) < 80:
        taken += reader.take_new("list")
    assert sorted(taken) == [[rank, number] for rank in range(4) for number in range(20)]
    for rank in range(4):
        assert [number for who, number in taken if who == rank] == list(range(20))


class CountingStore:
    """Counts calls to a store."""

    def __init__(self) -> None:
        self._store = HashStore()
        self.calls = 0

    def clone(self) -> None:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        self.calls += 1
        return getattr(self._store, name)


def test_a_look_at_a_list_without_news_is_one_call() -> None:
    store = CountingStore()
    exchange = StoreClient(store, "p")
    exchange.append("list", 1)
    exchange.take_new("list")
    store.calls = 0
    assert exchange.take_new("list") == []
    assert store.calls == 1


def test_what_was_taken_does_not_stay_in_the_store() -> None:
    store = HashStore()
    exchange = StoreClient(store, "p")
    before = store.num_keys()
    for _ in range(10):
        exchange.append("list", 1)
        exchange.take_new("list")
    assert store.num_keys() <= before + 1  # the count


def test_a_rank_that_dies_while_appending_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("perseus_plugin.exchange.client.time.monotonic", lambda: now_s)
    store = HashStore()
    exchange = StoreClient(store, "p")
    store.add("p/list/count", 1)  # its place is taken; the value never comes
    exchange.append("list", "next")
    assert exchange.take_new("list") == []
    now_s += 4
    assert exchange.take_new("list") == []
    now_s += 2
    assert exchange.take_new("list") == ["next"]


def test_a_store_that_cannot_count_is_an_exchange_error() -> None:
    exchange = StoreClient(BrokenStore(), "p")
    with pytest.raises(ExchangeError, match="in the job's store"):
        exchange.append("list", 1)
    with pytest.raises(ExchangeError, match="in the job's store"):
        exchange.take_new("list")


def test_a_place_in_a_list_that_is_only_being_filled_is_waited_for() -> None:
    store = HashStore()
    exchange = StoreClient(store, "p")
    exchange.append("list", "a")
    store.set("p/list/1", b"")
    assert exchange.take_new("list") == []
    store.set("p/list/1", b'"a"')
    assert exchange.take_new("list") == ["a"]
