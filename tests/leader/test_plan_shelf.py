from __future__ import annotations

import gc

import pytest

from perseus_plugin.exchange.messages import part_key
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.leader.plan_shelf import PlanShelf
from perseus_plugin.planning.plan import Plan
from perseus_plugin.planning.process import plan_for
from perseus_plugin.planning.request import PlanRequest
from tests.factories import BLOCKING_W, profile, stream_of


@pytest.fixture(scope="module")
def plan() -> Plan:
    streams = [stream_of(2, 2)(stage) for stage in range(2)]
    return plan_for(PlanRequest("A", streams, {}, profile(2), [BLOCKING_W] * 2, 0.0))


def test_a_plan_that_takes_anothers_place_leaves_nothing_of_it_behind(plan: Plan) -> None:
    exchange = LocalExchange()
    shelf = PlanShelf(exchange, 2)
    versions: list[int] = []
    for _ in range(20):
        shelf.put("A", plan, profile(2))
        versions.append(shelf.set_with())
        shelf.tidy(versions[-2:])
    told = [version for version in versions if exchange.fetch(part_key(version, 0)) is not None]
    assert told == versions[-2:], "the one before is followed until the newest holds"
    gc.collect()
    kept = [one for one in gc.get_referrers(plan) if type(one).__name__ == "_Kept"]
    assert len(kept) == 2


def test_a_stand_in_for_a_plan_in_force_stays(plan: Plan) -> None:
    exchange = LocalExchange()
    shelf = PlanShelf(exchange, 2)
    shelf.put("A", plan, profile(2))
    stand_in = shelf.keep("A", plan, profile(2), (1.0, 1.2))
    version = shelf.set_with(stand_in)
    shelf.tidy([])
    assert shelf.set_with(stand_in) == version
    assert exchange.fetch(part_key(version, 1)) is not None
