"""Several jobs keep one power budget, whatever comes and goes, and whoever does not answer."""

from __future__ import annotations

import random
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perseus_plugin.cli.share import told as said_of
from perseus_plugin.cli.sharing.member import Member
from perseus_plugin.cli.sharing.table import Round, Table, parse_weights
from perseus_plugin.errors import ConfigError
from perseus_plugin.leader import job_socket
from perseus_plugin.leader.job_socket import ask
from tests.cli.sharing.job_at_socket import SWITCH, JobAtSocket

STEEP = ((800.0, 1.0), (600.0, 1.05), (500.0, 1.3))
FLAT = ((800.0, 1.0), (600.0, 1.2), (500.0, 1.6))
LASTING_S = 60.0


class Site:
    """Some jobs, one table, and a clock."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now_s = folder, 1_000_000.0
        self.jobs: dict[str, JobAtSocket] = {}
        self.table = self.new_table()

    def new_table(self, **weights: float) -> Table:
        return Table(
            [str(self.folder / "*")],
            weights,
            lambda folder, weight: Member(folder, weight, LASTING_S, now=lambda: self.now_s),
        )

    def start(self, name: str, points: Any = STEEP, ranks: int = 4) -> JobAtSocket:
        self.jobs[name] = JobAtSocket(self.folder / name, points, ranks, lambda: self.now_s)
        return self.jobs[name]

    def turn(self, budget_w: float, iterations: int = SWITCH + 1) -> Round:
        done = self.table.round(budget_w)
        for _ in range(iterations):
            for job in self.jobs.values():
                job.step()
            self.now_s += 1.0
        return done

    @property
    def drawn_w(self) -> dict[str, float]:
        return {name: job.drawn_w for name, job in self.jobs.items() if job.drawn_w}

    @property
    def total_w(self) -> float:
        return sum(self.drawn_w.values())


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    for job in made.jobs.values():
        job.end()


def test_who_gains_most_from_a_watt_gets_it(site: Site) -> None:
    site.start("steep")
    site.start("flat", FLAT)
    for _ in range(3):
        done = site.turn(2800.0)
    # Down to 1.2 kW the steep one loses less.
    assert site.drawn_w == {"steep": pytest.approx(1200.0), "flat": pytest.approx(1600.0)}
    assert not done.on_the_way
    assert done.shortfall_w == 0
    assert done.division.marginal > 0


def test_a_weight_turns_that_round(site: Site) -> None:
    site.start("steep")
    site.start("flat", FLAT)
    site.table = site.new_table(steep=9.0)
    for _ in range(3):
        site.turn(2800.0)
    assert site.drawn_w == {"steep": pytest.approx(1600.0), "flat": pytest.approx(1200.0)}


def test_nobody_gets_more_before_others_draw_less(site: Site) -> None:
    site.start("steep")
    site.start("flat", FLAT)
    for _ in range(3):
        site.turn(2800.0)
    site.table = site.new_table(steep=9.0)
    done = site.turn(2800.0, iterations=1)
    assert done.told_w[str(site.folder / "steep")] == pytest.approx(1200.0)
    assert done.told_w[str(site.folder / "flat")] == pytest.approx(1200.0)
    assert done.on_the_way
    done = site.turn(2800.0, iterations=1)
    assert done.told_w[str(site.folder / "steep")] == pytest.approx(1200.0), "it is ordered, and not yet in force"
    for _ in range(6):
        site.turn(2800.0, iterations=1)
    assert site.drawn_w["steep"] > 1200.0


def test_a_budget_that_drops_and_comes_back(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for budget_w, drawn_w in ((3000.0, 3000.0), (2100.0, 2100.0), (3000.0, 3000.0), (9000.0, 3200.0)):
        for _ in range(3):
            site.turn(budget_w)
        assert site.total_w == pytest.approx(drawn_w)


def test_less_than_all_lowest_is_said_and_all_get_their_lowest(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        done = site.turn(1500.0)
    assert done.shortfall_w == pytest.approx(500.0)
    assert set(site.drawn_w.values()) == {1000.0}


def test_a_job_that_has_ended_leaves_its_power_at_once(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    site.turn(2400.0)
    site.jobs["a"].end()
    done = site.turn(2400.0)
    assert done.looks[str(site.folder / "a")].state == "ended"
    assert site.drawn_w == {"b": pytest.approx(1600.0)}


def test_what_a_killed_job_was_told_is_kept_until_that_has_expired(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2400.0)
    site.jobs["a"].end("running")
    done = site.turn(2400.0)
    assert done.looks[str(site.folder / "a")].state == "silent"
    assert site.drawn_w == {"b": pytest.approx(1200.0)}
    site.now_s += LASTING_S
    for _ in range(3):
        assert site.turn(2400.0).looks[str(site.folder / "a")].state == "ended"
    assert site.drawn_w == {"b": pytest.approx(1600.0)}


def test_a_job_that_starts_again_where_one_was_killed_takes_part_again(site: Site) -> None:
    site.start("b")
    site.start("a")
    site.turn(2400.0)
    site.jobs["a"].end("running")
    site.now_s += LASTING_S
    site.turn(2400.0)
    shutil.rmtree(site.folder / "a")
    site.start("a")
    for _ in range(4):
        done = site.turn(2400.0)
    assert done.looks[str(site.folder / "a")].state == "shares"
    assert site.total_w == pytest.approx(2400.0)


def test_a_job_that_lives_and_does_not_answer_counts_in_full_once_its_budget_has_expired(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_socket, "_TIMEOUT_S", 0.1)
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2400.0)
    site.jobs["a"].end("running")
    with socket.socket(socket.AF_UNIX) as mute:
        monkeypatch.chdir(site.folder / "a")
        mute.bind(job_socket.SOCKET_NAME)
        mute.listen(100)
        held_w = []
        for _ in range(2):
            look = site.turn(2400.0).looks[str(site.folder / "a")]
            assert look.state == "silent"
            held_w.append(look.holding.held_w)
            site.now_s += LASTING_S
    assert held_w == [pytest.approx(1200.0), 1600.0]


def test_after_a_restart_all_is_known_from_the_jobs(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2400.0)
    site.table = site.new_table()
    done = site.turn(2400.0)
    assert done.held_w == pytest.approx(2400.0)
    assert not done.on_the_way


def test_after_a_restart_a_job_that_does_not_answer_counts_in_full_for_a_while(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2800.0)
    site.jobs["a"].end("running")
    site.table = site.new_table()
    site.turn(2800.0)
    assert site.drawn_w == {"b": pytest.approx(1200.0)}
    site.now_s += 100.0
    site.turn(2800.0)
    assert site.drawn_w == {"b": pytest.approx(1600.0)}


def test_without_the_process_jobs_keep_their_budget_until_it_expires(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2400.0)

    def go_by(seconds: float) -> None:
        site.now_s += seconds
        for _ in range(SWITCH + 2):
            for job in site.jobs.values():
                job.step()

    go_by(LASTING_S - 10.0)
    assert site.total_w == pytest.approx(2400.0)
    go_by(10.0)
    assert site.total_w == 3200.0
    for _ in range(3):
        site.turn(2400.0)
    assert site.total_w == pytest.approx(2400.0)


def test_a_job_that_starts_is_found_and_the_others_make_room(site: Site) -> None:
    site.start("a")
    site.turn(2400.0)
    job = site.start("b")
    (job.folder / "frontier.json").unlink()
    done = site.turn(2400.0)
    assert done.looks[str(job.folder)].state == "no frontier yet"
    job.write_frontier()
    for _ in range(4):
        site.turn(2400.0)
    assert site.total_w == pytest.approx(2400.0)


def test_a_frontier_that_is_being_made_anew_is_taken_as_it_was(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    site.turn(2400.0)
    (site.folder / "a" / "frontier.json").unlink()
    for _ in range(3):
        done = site.turn(2200.0)
    assert {look.state for look in done.looks.values()} == {"shares"}
    assert site.total_w == pytest.approx(2200.0)


def test_a_limit_that_somebody_else_has_set_is_left_to_them(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2600.0)
    ask(site.folder / "a", {"do": "target", "target": {"power_budget_w": 1050, "source": "site"}})
    for _ in range(3):
        done = site.turn(2600.0)
    look = done.looks[str(site.folder / "a")]
    assert (look.state, look.reason) == ("left to others", "site has limited it")
    assert site.drawn_w["a"] == 1050.0, "ours has not taken its place"
    assert site.total_w <= 2600.0


def test_a_limit_that_allows_more_than_full_clocks_draw_keeps_nothing_from_others(site: Site) -> None:
    site.start("a")
    site.start("b")
    ask(site.folder / "a", {"do": "target", "target": {"power_budget_w": "10MW", "source": "site"}})
    for _ in range(3):
        done = site.turn(3100.0)
    assert done.looks[str(site.folder / "a")].holding.held_w == 1600.0, "full clocks"
    assert done.shortfall_w == 0
    assert site.drawn_w == {"a": 1600.0, "b": pytest.approx(1500.0)}


def test_a_limit_that_a_job_can_only_come_near_to_counts_with_what_it_draws(site: Site) -> None:
    """It says so without any word of `perseus share`: by another source, that is left alone."""
    for name in ("a", "b"):
        site.start(name)
    ask(site.folder / "a", {"do": "target", "target": {"power_budget_w": {"job_w": 10, "or_nearest": True}}})
    for _ in range(3):
        done = site.turn(2600.0)
    assert done.looks[str(site.folder / "a")].holding.held_w == 1000.0
    assert site.drawn_w == {"a": 1000.0, "b": pytest.approx(1600.0)}


def test_what_a_job_draws_beyond_what_it_may_is_taken_from_all_until_it_has_mended_that(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name, FLAT)
    for _ in range(4):
        site.turn(2600.0)
    before_w = site.drawn_w
    site.jobs["a"].draws = 1.1
    for _ in range(16):
        done = site.turn(2600.0)
    assert site.total_w == pytest.approx(2600.0, rel=0.02)
    assert done.looks[str(site.folder / "a")].holding.beyond_w > 100.0
    assert "W more than it may" in next(line for line in said_of(done) if "/a: " in line)
    told = dict(done.told_w)
    assert site.turn(2600.0).told_w == told, "nobody is told of something else for what is no matter"
    site.jobs["a"].draws = 1.0
    for _ in range(16):
        site.turn(2600.0)
    assert site.drawn_w == pytest.approx(before_w)


def test_nobody_gets_what_others_draw_beyond_what_they_may(site: Site) -> None:
    site.start("a").draws = 1.1
    for _ in range(8):
        site.turn(1300.0)
    site.start("b")
    highest_w = []
    for _ in range(12):
        site.turn(2300.0)
        highest_w.append(site.total_w)
    assert max(highest_w) <= 2300.0 * 1.01
    assert site.drawn_w["b"] == pytest.approx(1000.0)


def test_a_job_that_knows_its_gpus_to_draw_more_than_its_profile_says_is_shared_with_as_such(site: Site) -> None:
    started = site.start("a")
    started.says_it_draws = 1.2
    started.step()
    site.start("b")
    done = site.turn(1e6)
    assert [look.holding.held_w for look in done.looks.values()] == [pytest.approx(1920.0), 1600.0]
    job = done.looks[str(site.folder / "a")].holding.job
    assert job is not None
    assert job.curve.lowest_w == pytest.approx(1200.0)
    for says, taken in ((1.205, 1.2), (1.0, 1.0), (1e9, 1.0)):
        started.says_it_draws = says
        started.step()
        held = site.turn(1e6).looks[str(site.folder / "a")].holding.job
        assert held is not None
        assert held.curve.lowest_w == pytest.approx(1000.0 * taken)


def test_a_job_that_is_given_under_several_names_is_one(site: Site) -> None:
    site.start("a")
    link = site.folder / "b"
    link.symlink_to(site.folder / "a")
    patterns = [str(site.folder / "a"), f"{site.folder}/../{site.folder.name}/a/", str(link), str(site.folder / "*")]
    table = Table(patterns, {"a": 2.0}, lambda folder, weight: Member(folder, weight, LASTING_S, lambda: site.now_s))
    done = table.round(3000.0)
    assert list(done.looks) == [str(site.folder / "a")]
    assert done.held_w == 1600.0


def test_a_job_that_makes_another_frontier_is_told_by_the_one_before(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(2600.0)
    (site.folder / "a" / "frontier.json").unlink()
    for _ in range(3):
        done = site.turn(2200.0)
    assert done.looks[str(site.folder / "a")].state == "shares"
    assert site.total_w <= 2200.0 * 1.000001


def test_a_wish_of_somebody_else_stays(site: Site) -> None:
    site.start("a")
    ask(site.folder / "a", {"do": "target", "target": {"full": True, "source": "site"}})
    site.turn(1400.0)
    assert site.jobs["a"].book.goal.wish.kind == "full"
    assert site.drawn_w == {"a": pytest.approx(1400.0)}


def test_a_job_that_cannot_be_told_counts_as_at_full_clocks(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    site.turn(3000.0)
    site.jobs["a"].give_up()
    for _ in range(4):
        done = site.turn(3000.0)
    assert done.looks[str(site.folder / "a")].state == "cannot be told"
    assert site.drawn_w == {"a": 1600.0, "b": pytest.approx(1400.0)}


def test_a_job_that_refuses_is_told_of_more_until_it_takes_it(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    for _ in range(3):
        site.turn(3000.0)
    site.jobs["a"].lowest_w = 1150.0  # its frontier is wrong about it
    for _ in range(6):
        site.turn(2300.0)
    assert 1150.0 <= site.drawn_w["a"] < 1300.0
    assert site.total_w == pytest.approx(2300.0)
    for _ in range(3):
        site.turn(2300.0)
    assert 1150.0 <= site.drawn_w["a"] < 1300.0, "it is not tried again and again"


def test_a_job_that_refuses_is_tried_again_once_that_would_have_expired(site: Site) -> None:
    for name in ("a", "b"):
        site.start(name)
    site.jobs["a"].lowest_w = 1700.0  # its frontier is wrong about it
    for _ in range(8):
        done = site.turn(2400.0)
    look = done.looks[str(site.folder / "a")]
    assert (look.state, look.reason) == ("refuses", "the lowest budget is 1700.0 W")
    assert site.drawn_w == {"a": 1600.0, "b": pytest.approx(1000.0)}
    assert done.shortfall_w == pytest.approx(200.0)
    site.jobs["a"].lowest_w = 1000.0
    site.now_s += LASTING_S
    for _ in range(4):
        site.turn(2400.0)
    assert site.total_w == pytest.approx(2400.0)


@pytest.mark.parametrize("seed", range(5))
def test_whatever_happens_all_together_never_rise_above_the_budget(site: Site, seed: int) -> None:
    draw = random.Random(seed)
    for name in ("a", "b", "c"):
        site.start(name, draw.choice((STEEP, FLAT)), draw.choice((2, 4, 8)))
    lowest_w = sum(job.lowest_w for job in site.jobs.values())
    budget_w = 1.5 * lowest_w
    for _ in range(80):
        before_w = site.total_w
        match draw.choice(("round", "round", "step", "step", "step", "budget", "restart", "end", "kill")):
            case "round":
                site.table.round(budget_w)
            case "step":
                draw.choice(list(site.jobs.values())).step()
                site.now_s += 1.0
            case "budget":
                for _ in range(4):  # what was on its way was within the budget of its time
                    site.turn(budget_w)
                    assert site.total_w <= max(budget_w, before_w) + 1e-6
                budget_w, before_w = draw.uniform(lowest_w, 2 * lowest_w), site.total_w
            case "restart":
                site.table = site.new_table()
            case "end" if len(site.drawn_w) > 1 and draw.random() < 0.1:
                site.jobs[draw.choice(list(site.drawn_w))].end()
            case "kill" if len(site.drawn_w) > 1 and draw.random() < 0.1:
                site.jobs[draw.choice(list(site.drawn_w))].end("running")
        assert site.total_w <= max(budget_w, before_w) + 1e-6
    for _ in range(5):
        site.turn(budget_w)
    assert site.total_w <= budget_w + 1e-6


def test_weights() -> None:
    assert parse_weights(["runs/a=2", "b/=0.5", "./c=3"]) == {"runs/a": 2.0, "b": 0.5, "c": 3.0}
    for wrong in ("a", "a=0", "a=x", "a=nan"):
        with pytest.raises(ConfigError, match="--weight"):
            parse_weights([wrong])
