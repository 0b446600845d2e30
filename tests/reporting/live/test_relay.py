from __future__ import annotations

import math

import pytest

from perseus_plugin.exchange.store import ExchangeError, LocalExchange
from perseus_plugin.iteration.timetable import Round, Timetable
from perseus_plugin.reporting.live import relay
from perseus_plugin.reporting.live.relay import FigureRelay
from perseus_plugin.session.link import Link

FIGURES = [("Perseus/energy_j/measured", 12.5)]


class Ranks:
    """The relay's end on every rank of a job."""

    def __init__(self, writing_rank: int | None, world_size: int = 3) -> None:
        self.exchange = LocalExchange()
        self.links = [Link(Timetable(Round(0, ()), 1, 1)) for _ in range(world_size)]
        self.ends = [
            FigureRelay(self.exchange, [link.add_events], rank == 0, writes=rank == writing_rank)
            for rank, link in enumerate(self.links)
        ]

    def look(self) -> None:
        for end in self.ends:
            end.look()


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "_LOOK_EVERY_S", 0.0)


def test_figures_reach_the_rank_that_writes() -> None:
    ranks = Ranks(writing_rank=2)
    ranks.look()
    ranks.ends[0].tell(FIGURES)
    ranks.ends[0].tell([("x", 1.0)])
    ranks.look()
    assert ranks.links[2].take_events() == [FIGURES, [("x", 1.0)]]
    assert ranks.links[1].take_events() == []
    ranks.look()
    assert ranks.links[2].take_events() == [], "they come once"


def test_that_there_is_no_such_figure_any_more_is_told_too() -> None:
    ranks = Ranks(writing_rank=2)
    ranks.look()
    ranks.ends[0].tell([("gone", math.nan)])
    ranks.look()
    ((event,),) = ranks.links[2].take_events()
    assert math.isnan(event[1])


@pytest.mark.parametrize("writing_rank", [0, None])
def test_where_rank_0_writes_or_nobody_the_store_stays_empty(writing_rank: int | None) -> None:
    ranks = Ranks(writing_rank)
    ranks.look()
    ranks.ends[0].tell(FIGURES)
    assert ranks.links[0].take_events() == [FIGURES]
    assert ranks.exchange.fetch("figures") is None


def test_what_is_no_figures_is_an_error_of_the_exchange() -> None:
    ranks = Ranks(writing_rank=1)
    ranks.look()
    ranks.exchange.publish("figures", {"count": 1, "batches": [[["name", "much"]]]})
    with pytest.raises(ExchangeError, match="Figures from the job's store"):
        ranks.look()


def test_whoever_takes_figures_on_this_rank_hears_of_them_at_once() -> None:
    first: list[tuple[str, float]] = []
    second: list[tuple[str, float]] = []
    FigureRelay(LocalExchange(), [first.extend, second.extend], True, writes=False).tell(FIGURES)
    assert first == second == FIGURES
