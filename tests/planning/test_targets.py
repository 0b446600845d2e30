"""The language of targets: what may be said, and that it passes through JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perseus_plugin.config import parse_config
from perseus_plugin.errors import ConfigError, PlanError
from perseus_plugin.iteration.words import parse_share, parse_watts
from perseus_plugin.planning.power.budget import GroupBudget, NodeOverhead, Peaks, PowerBudget
from perseus_plugin.planning.power.words import parse_group
from perseus_plugin.planning.targets import Prices, Target
from tests.examples import examples
from tests.planning.jobs import Job, jobs
from tests.planning.test_planner import planner_of, small

watts = st.floats(1.0, 1e6)
overheads = st.builds(NodeOverhead, st.floats(0, 2000), st.floats(0, 1))
groups = st.builds(GroupBudget, st.text(max_size=5), st.sampled_from(["gpu", "node", "node 1", "0-3,7"]), watts)
budgets = st.builds(
    PowerBudget,
    watts,
    st.lists(groups, max_size=3).map(tuple),
    overheads,
    st.builds(Peaks, st.floats(0.1, 10), st.one_of(st.none(), watts), st.one_of(st.none(), watts)),
    st.integers(1, 16),
    st.lists(st.integers(0, 9), max_size=4).map(tuple),
)
targets = st.one_of(
    st.builds(Target.slowdown, st.floats(0, 10)),
    st.builds(Target.deadline, st.floats(0.001, 1e3)),
    st.builds(Target.straggler, st.floats(0.001, 1e3)),
    st.builds(Target.energy_budget, st.floats(0.001, 1e6)),
    st.builds(Target.power_budget, budgets),
    st.builds(Target.money, st.builds(Prices, st.floats(0.01, 1), st.floats(0, 10), overheads)),
    st.sampled_from([Target.cheapest(), Target.full()]),
)


@given(targets)
def test_a_target_passes_through_json(target: Target) -> None:
    assert Target.from_dict(json.loads(json.dumps(target.to_dict()))) == target


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"kind": "x"}, 'target.kind: got "x"'),
        ({}, "target.kind: missing"),
        ([1], "target: got "),
        (None, "target: got null"),
        ({"kind": "slowdown", "value": -1}, "slowdown: got -1"),
        ({"kind": "slowdown", "value": "1"}, 'target.value: got "1"'),
        ({"kind": "slowdown", "vlue": 1}, "target.vlue: unknown key"),
        ({"kind": "deadline"}, "deadline: got 0.0"),
        ({"kind": "power_budget"}, "kind power_budget"),
        ({"kind": "cheapest", "budget": {"job_w": 3}}, "kind cheapest"),
        ({"kind": "power_budget", "budget": {"job_w": "3"}}, 'target.budget.job_w: got "3"'),
        ({"kind": "power_budget", "budget": {"job": 3}}, "target.budget.job: unknown key"),
        ({"kind": "power_budget", "budget": {}}, "power budget: got none"),
        ({"kind": "power_budget", "budget": {"job_w": 3, "gpus_per_node": 0}}, "GPUs per node: got 0"),
        ({"kind": "money", "prices": {"per_kwh": 0, "per_gpu_hour": 1}}, "price per kWh: got 0"),
    ],
)
def test_what_is_no_target_is_refused_with_its_place(data: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        Target.from_dict(data)


@pytest.mark.parametrize(
    ("told", "watts"),
    [(900, 900), (0.5, 0.5), ("900", 900), ("900 W", 900), ("180kW", 180e3), ("1.2 MW", 1.2e6), ("1e3w", 1e3)],
)
def test_watts(told: object, watts: float) -> None:
    assert parse_watts(told) == pytest.approx(watts)


@pytest.mark.parametrize("told", ["", "kW", "-3", "3 J", True, None, [3], "3 kWh", "nan", "1_", "1__0 W", "_1"])
def test_what_are_no_watts(told: object) -> None:
    with pytest.raises(PlanError, match="power: got"):
        parse_watts(told)


@pytest.mark.parametrize(("told", "share"), [(0.1, 0.1), ("0.1", 0.1), ("10 %", 0.1), ("2.5%", 0.025), (0, 0.0)])
def test_shares(told: object, share: float) -> None:
    assert parse_share(told) == pytest.approx(share)


@pytest.mark.parametrize("told", ["", "%", "-3", "ten", True, None])
def test_what_are_no_shares(told: object) -> None:
    with pytest.raises(PlanError, match="share: got"):
        parse_share(told)


@pytest.mark.parametrize(
    ("told", "group"),
    [
        ("rack 1=0-31:20kW", GroupBudget("rack 1", "0-31", 20e3)),
        ("node:6kW", GroupBudget("node", "node", 6e3)),
        ("0,3-5:900", GroupBudget("0,3-5", "0,3-5", 900)),
    ],
)
def test_groups(told: str, group: GroupBudget) -> None:
    assert parse_group(told) == group


@pytest.mark.parametrize("told", ["", "6kW", "rack=:6kW", "rack=a-b:6kW", "0-3:0", "0-3:six"])
def test_what_are_no_groups(told: str) -> None:
    with pytest.raises(PlanError, match=r"group|power budget of"):
        parse_group(told)


# What a budget means for a pipeline.


def test_all_pipelines_run_one_plan_so_a_group_counts_its_gpus_per_stage() -> None:
    made = PowerBudget(
        4000.0, (GroupBudget("rack", "0-2,5", 900.0), GroupBudget("node", "node", 800.0)), gpus_per_node=2
    )
    limits = made.placed([0, 0, 1, 1, 2, 2]).limits(3)
    assert [(one.name, one.watts, one.gpus) for one in limits] == [
        ("the job", 4000.0, (2, 2, 2)),
        ("rack", 900.0, (2, 1, 1)),
        ("node 0", 800.0, (2, 0, 0)),
        ("node 1", 800.0, (0, 2, 0)),
        ("node 2", 800.0, (0, 0, 2)),
    ]


def test_of_groups_with_the_same_gpus_per_stage_the_tighter_one_counts() -> None:
    each = PowerBudget(groups=(GroupBudget("gpu", "gpu", 300.0), GroupBudget("weak", "1", 200.0)))
    limits = each.placed([0, 1, 0, 1]).limits(2)
    assert [(one.name, one.watts, one.gpus) for one in limits] == [("gpu 0", 300.0, (1, 0)), ("weak", 200.0, (0, 1))]


def test_with_an_overhead_watts_are_the_nodes() -> None:
    made = PowerBudget(2200.0, node=NodeOverhead(200.0, 0.25), gpus_per_node=4)
    (limit,) = made.placed([0, 1, 2, 3]).limits(4)
    assert limit.watts == pytest.approx(1600.0)
    assert made.node_w(limit.watts, 4) == pytest.approx(2200.0)


@pytest.mark.parametrize(
    ("of", "reason"), [("0-9", "0 to 3"), ("3-1", "rising"), ("node 1", "node 0 to node 0"), ("4", "0 to 3")]
)
def test_a_group_that_is_not_in_the_job_is_refused(of: str, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        PowerBudget(groups=(GroupBudget("rack", of, 900.0),)).limits(4)


def test_a_budget_that_is_placed_on_other_stages_is_refused() -> None:
    with pytest.raises(PlanError, match="the pipeline has 3 stages"):
        PowerBudget(900.0).placed([0, 1]).limits(3)


def test_the_configuration_says_a_budget_or_none() -> None:
    block = {"power_budget_groups_w": {"0-7": 4e3}, "node_overhead_w": 900.0, "peak_w": 5e3, "peak_window_s": 2.0}
    made = PowerBudget.configured(parse_config(block))
    groups = (GroupBudget("0-7", "0-7", 4e3),)
    assert made == PowerBudget(None, groups, NodeOverhead(900.0), Peaks(2.0, 5e3), or_nearest=True)
    assert PowerBudget.configured(parse_config({"slowdown": 0.1, "node_overhead_w": 900.0})) is None


def test_a_group_of_all_ranks_is_a_cap_that_no_later_budget_of_the_job_lifts() -> None:
    config = parse_config({"power_budget_w": 800.0, "power_budget_groups_w": {"0-3": 900.0}})
    for told_w, kept_w in ((700.0, 700.0), (5000.0, 900.0)):
        (limit,) = PowerBudget(told_w).completed(config).limits(4)
        assert limit.watts == kept_w


def test_the_configuration_says_a_slowdown_or_prices() -> None:
    assert Target.configured(parse_config({"slowdown": 0.1})) == Target.slowdown(0.1)
    block = {"price_per_kwh": 0.12, "price_per_gpu_hour": 0.0, "node_overhead_w": 900.0}
    assert Target.configured(parse_config(block)) == Target.money(Prices(0.12, 0.0, NodeOverhead(900.0)))


@pytest.mark.parametrize("of", ["rack", "0-7;8", "", "node x", "0-7\n"])
def test_a_group_is_named_alike_in_the_configuration_and_in_a_target(of: str) -> None:
    with pytest.raises(PlanError, match="power budget of rack: got "):
        GroupBudget("rack", of, 4e3)
    with pytest.raises(ConfigError, match=r"perseus\.power_budget_groups_w: got"):
        parse_config({"power_budget_groups_w": {of: 4e3}})


# Money.


@pytest.mark.many
@examples(20)
@given(jobs(), st.floats(0.01, 1.0), st.floats(0.0, 5.0))
def test_in_money_no_plan_of_the_frontier_is_cheaper_than_the_bound_of_the_best_time(
    job: Job, per_kwh: float, per_gpu_hour: float
) -> None:
    """The time of least cost is one at which the cost of the bound is no higher than at any other."""
    planner, prices = planner_of(job), Prices(per_kwh, per_gpu_hour)
    stages = len(job.streams)
    best = planner.solve(Target.money(prices)).relaxed
    cost = prices.cost(best.deadline_s, best.bound_j, stages)
    low, high = planner.relaxation.shortest_s, planner.relaxation.longest_s
    for share in (0.0, 0.03, 0.1, 0.3, 0.6, 1.0):
        other = planner.relaxation.solve(low + share * (high - low))
        assert cost <= prices.cost(other.deadline_s, other.bound_j, stages) * (1 + 1e-3)


def test_where_time_is_dear_the_best_is_full_speed_and_where_it_is_free_the_least_energy() -> None:
    planner = small()
    dear, free = (planner.plan(Target.money(Prices(0.1, per_gpu_hour))) for per_gpu_hour in (1e6, 0.0))
    assert dear.deadline_s == pytest.approx(planner.relaxation.shortest_s, rel=1e-4)
    assert free.deadline_s == pytest.approx(planner.plan(Target.cheapest()).deadline_s)
    between = planner.plan(Target.money(Prices(0.1, 0.01)))
    assert dear.deadline_s < between.deadline_s < free.deadline_s


def test_full_clocks_are_a_target() -> None:
    planner = small()
    made = planner.plan(Target.full())
    assert made.iteration_time_s == made.baseline_time_s
    assert {clock for stage in range(3) for clock in made.clocks_mhz(stage)} == {1400}
