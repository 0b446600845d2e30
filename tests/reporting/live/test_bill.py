"""Energies are added up at the value of their moment, and full clocks are held against plans at the same moments."""

from __future__ import annotations

import pytest

from perseus_plugin.exchange.messages import RankStats, Totals
from perseus_plugin.reporting.live.bill import Bill, Worth
from perseus_plugin.reporting.record.summary import ValuedSection
from tests.factories import placement

KWH = 3.6e6


def stats(*energies_j: tuple[float, float, int]) -> list[RankStats]:
    """Per rank: energy of all iterations, of those under plans, and how many those are; all are twice as many."""
    return [
        RankStats(
            placement=placement(),
            totals={
                "every": Totals(iterations=2 * count, energy_j=every_j),
                "under_plans": Totals(iterations=count, energy_j=planned_j),
            },
        )
        for every_j, planned_j, count in energies_j
    ]


def test_every_moment_has_its_value() -> None:
    bill = Bill()
    bill.add(stats((1 * KWH, 0.5 * KWH, 10), (1 * KWH, 0.5 * KWH, 10)), [(1.0, Worth(0.1, 100.0, "EUR"))])
    bill.add(stats((3 * KWH, 1.5 * KWH, 20), (3 * KWH, 1.5 * KWH, 20)), [(0.5, Worth(0.3)), (0.5, Worth(0.5))])
    section = bill.section(0.12 * KWH, (0.11 * KWH, 0.13 * KWH))
    assert (section.energy_kwh, section.currency) == (pytest.approx(6.0), "EUR")
    money = section.money
    assert money.total == pytest.approx(2 * 0.1 + 4 * 0.4)
    assert money.under_plans == pytest.approx(1 * 0.1 + 2 * 0.4)
    assert money.full_clocks == pytest.approx((10 * 0.1 + 10 * 0.4) * 0.12)
    assert money.full_clocks_between == pytest.approx(((10 * 0.1 + 10 * 0.4) * 0.11, (10 * 0.1 + 10 * 0.4) * 0.13))
    assert money.known_percent == pytest.approx(100.0)
    assert section.carbon_kg.total == pytest.approx(0.2)
    assert section.carbon_kg.known_percent == pytest.approx(100 / 3)


def test_where_full_clocks_are_not_known_nothing_is_said_of_them() -> None:
    bill = Bill()
    bill.add(stats((KWH, KWH, 10)), [(1.0, Worth(0.1))])
    money = bill.section(None, None).money
    assert (money.total, money.full_clocks, money.full_clocks_between) == (pytest.approx(0.1), None, None)


def test_without_a_value_energy_is_worth_nothing_that_is_known() -> None:
    bill = Bill()
    bill.add(stats((KWH, KWH, 10)), [(1.0, Worth())])
    section = bill.section(1.0, None)
    assert section.energy_kwh == pytest.approx(1.0)
    assert section.money == ValuedSection()


def test_a_negative_price_is_a_negative_cost() -> None:
    bill = Bill()
    bill.add(stats((KWH, KWH, 10)), [(1.0, Worth(-0.1))])
    money = bill.section(0.2 * KWH, (0.1 * KWH, 0.3 * KWH)).money
    assert money.total == pytest.approx(-0.1)
    assert money.full_clocks_between == pytest.approx((-0.3, -0.1))


def test_energies_that_nobody_measures_are_not_accounted_for() -> None:
    bill = Bill()
    unknown = RankStats(placement=placement(), totals={"every": Totals(iterations=3, energy_j=None)})
    bill.add([*stats((KWH, KWH, 10)), unknown], [(1.0, Worth(0.1))])
    assert bill.section(None, None).energy_kwh is None


def test_iterations_that_could_not_be_read_count_as_the_others() -> None:
    bill = Bill()
    unread = RankStats(placement=placement(), totals={"every": Totals(iterations=4, energy_j=KWH, unread=2)})
    bill.add([unread], [(1.0, Worth(0.1))])
    assert bill.section(None, None).energy_kwh == pytest.approx(2.0)
