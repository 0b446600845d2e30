from __future__ import annotations

from typing import Any

import pytest

from perseus_plugin.exchange.messages import (
    NEWS,
    REUSE,
    TROUBLE,
    News,
    PlanPart,
    RankEstimate,
    RankStats,
    Recheck,
    Totals,
    Trouble,
    estimate_key,
    facts_key,
    part_key,
    receive,
    recheck_key,
    stats_key,
)
from perseus_plugin.exchange.store import ExchangeError, LocalExchange
from tests.factories import placement, rank_estimate

MESSAGES = [
    rank_estimate(1, constants={"optimizer_step": 0.01}),
    News(sequence=3, switch=17, action="follow", version=2, reason="", recheck=False),
    PlanPart(version=1, schedule="1F1B/2x4", clocks_mhz=(1410, 810), times_s=(0.01, 0.02)),
    Recheck(stage=1, time_s={"forward": 0.5}),
    Trouble(rank=3, reason="no permission"),
    RankStats(
        placement=placement(),
        totals={"plan": Totals(iterations=3, time_s=1.5, energy_j=None), "full_clock": Totals(energy_j=4.0)},
        overhead_s=0.1,
        late=2,
        final=True,
    ),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent(message: Any) -> None:
    exchange = LocalExchange()
    exchange.publish("key", message.model_dump())
    assert receive(type(message), exchange.fetch("key")) == message


@pytest.mark.parametrize(
    ("message_class", "value", "where"),
    [
        (News, {"sequence": 1, "switch": 2, "action": "stop"}, "action: "),
        (News, {"sequence": 1, "action": "full"}, "switch: "),
        (News, {"sequence": 1, "switch": 2, "action": "full", "more": 1}, "more: "),
        (RankEstimate, {**rank_estimate(0).model_dump(), "placement": {"rank": 0}}, "placement.world_size: "),
        (PlanPart, {"version": 1, "schedule": "s", "clocks_mhz": [1410, "x"], "times_s": []}, "clocks_mhz.1: "),
        (RankStats, [], ""),
        (RankStats, {"placement": placement().model_dump(), "totals": {"plan": {"more": 1}}}, "totals.plan.more: "),
        (Trouble, "text", ""),
    ],
)
def test_what_is_no_such_message_is_an_exchange_error(message_class: Any, value: Any, where: str) -> None:
    with pytest.raises(ExchangeError, match=f"^{message_class.__name__} from the job's store: {where}"):
        receive(message_class, value)


def test_what_is_said_of_a_path_that_is_not_unicode_arrives() -> None:
    exchange = LocalExchange()
    exchange.publish(TROUBLE, Trouble(rank=3, reason="no caf\udce9/größe").model_dump())
    assert receive(Trouble, exchange.fetch(TROUBLE)).reason == r"no caf\udce9/größe"


def test_no_two_messages_share_a_key() -> None:
    keys = [key(rank) for key in (facts_key, stats_key) for rank in range(12)]
    keys += [key(a, b) for key in (estimate_key, part_key, recheck_key) for a in range(12) for b in range(12)]
    keys += [NEWS, REUSE, TROUBLE]
    assert len(set(keys)) == len(keys)
