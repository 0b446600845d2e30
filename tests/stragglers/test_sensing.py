"""Ranks judge themselves by what others do in the same iterations."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from perseus_plugin.config import StragglersConfig
from perseus_plugin.exchange.messages import STRAGGLERS
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.stragglers.detection import against_pipeline, against_replicas
from perseus_plugin.stragglers.sensing import StragglerSensing
from tests.factories import placement

Size = Callable[[int, int], float]
"""The size of an iteration's work, by its number and the replica."""


class Job:
    """All ranks of a job, with nothing but their sensing; an iteration takes 0.2 s."""

    def __init__(self, stages: int = 2, replicas: int = 1, seed: int = 0) -> None:
        self.exchange = LocalExchange()
        self.random = random.Random(seed)
        world_size = stages * replicas
        self.places = [placement(rank, world_size, stages) for rank in range(world_size)]
        self.ranks = [StragglerSensing(StragglersConfig(), place, self.exchange) for place in self.places]
        self.number = 0
        self.told: list[tuple[int, int, float]] = []

    def run(
        self,
        iterations: int,
        size: Size = lambda k, replica: 1.0,
        slow: dict[int, float] | None = None,
        noise_share: float = 0.002,
        rough: dict[int, float] | None = None,
    ) -> None:
        for _ in range(iterations):
            for rank, place in zip(self.ranks, self.places, strict=True):
                noise = self.random.gauss(1.0, noise_share)
                factor = (slow or {}).get(place.rank, 1.0)
                pace = size(self.number, place.replica) * factor * noise
                effect = (rough or {}).get(place.rank)
                if effect is None:
                    rank.add(self.number, pace)
                else:
                    rank.add(self.number, pace * effect, rough_under=1)
            for rank in self.ranks:
                rank.look(0.2 * self.number)
            self.number += 1
            for report in self.exchange.take_new(STRAGGLERS):
                self.told.append((self.number, report["rank"], report["slowdown"]))

    @property
    def slow(self) -> dict[int, float]:
        """Who is said to be slow, at the end."""
        newest = {rank: slowdown for _, rank, slowdown in self.told}
        return {rank: slowdown for rank, slowdown in newest.items() if slowdown > 1}


def mixed(seed: int) -> Size:
    """Sizes 1, 1.3 and 1.6, the same for all replicas or not."""

    def size(number: int, replica: int) -> float:
        return random.Random(f"{seed} {number} {replica}").choice([1.0, 1.3, 1.6])

    return size


def log_normal(seed: int) -> Size:
    def size(number: int, replica: int) -> float:
        return random.Random(f"{seed} {number} {replica}").lognormvariate(0.0, 0.2)

    return size


def curriculum(number: int, replica: int) -> float:
    return 1.0 + min(number, 300) / 300


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [mixed, log_normal])
@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (4, 1), (2, 4)])
def test_where_steps_vary_nobody_straggles(sizes: Callable[[int], Size], stages: int, replicas: int, seed: int) -> None:
    job = Job(stages, replicas, seed)
    job.run(200, sizes(seed))
    assert job.told == []


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (4, 2)])
def test_a_job_that_grows_has_no_stragglers(stages: int, replicas: int) -> None:
    job = Job(stages, replicas)
    job.run(400, curriculum)
    assert job.told == []


def test_a_job_that_is_slower_as_a_whole_has_no_stragglers() -> None:
    job = Job(4, 2)
    job.run(50)
    job.run(100, slow=dict.fromkeys(range(8), 1.4))
    assert job.told == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("sizes", [lambda seed: lambda k, replica: 1.0, mixed, log_normal, lambda seed: curriculum])
@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (4, 1), (2, 2)])
def test_a_slow_rank_is_found_whatever_the_steps_are(
    sizes: Callable[[int], Size], stages: int, replicas: int, seed: int
) -> None:
    job = Job(stages, replicas, seed)
    job.run(60, sizes(seed))
    job.run(60, sizes(seed), slow={1: 1.3})
    assert job.slow == {1: pytest.approx(1.3, rel=0.02)}
    first = job.told[0][0]
    assert first - 60 < 25
    job.run(60, sizes(seed))
    assert job.slow == {}


@pytest.mark.parametrize("rough", [{0: 0.94}, {1: 0.94}, {0: 1.05, 1: 0.97}])
@pytest.mark.parametrize("sizes", [lambda seed: lambda k, replica: 1.0, mixed, log_normal, lambda seed: curriculum])
def test_what_clock_changes_make_of_times_is_no_slowness(sizes: Callable[[int], Size], rough: dict[int, float]) -> None:
    """Instructions at whose begin or end the clock changes take some per cent less than their clock says."""
    job = Job(2, 1)
    job.run(200, sizes(0), rough=rough)
    assert job.told == []
    job.run(60, sizes(0), slow={1: 1.3}, rough=rough)
    assert job.slow == {1: pytest.approx(1.3, rel=0.03)}


@pytest.mark.parametrize(("stages", "replicas"), [(2, 4), (4, 4), (4, 2)])
@pytest.mark.parametrize("sizes", [lambda seed: lambda k, replica: 1.0, mixed, log_normal])
def test_work_that_grows_in_some_stages_only_is_no_straggler_where_replicas_tell(
    sizes: Callable[[int], Size], stages: int, replicas: int
) -> None:
    """As attention does in stages that have it, when sequences grow."""
    job = Job(stages, replicas)
    job.run(60, sizes(0))
    grown = {place.rank: 1.2 for place in job.places if place.stage > 0}
    job.run(150, sizes(0), slow=grown)
    assert job.told == []
    job.run(60, sizes(0), slow={**grown, 1: 1.2 * 1.3})
    assert job.slow == {1: pytest.approx(1.3, rel=0.03)}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.repeated) for seed in (1, 2))])
@pytest.mark.parametrize("noise_share", [0.01, 0.02, 0.03])
@pytest.mark.parametrize(("stages", "replicas"), [(16, 1), (8, 2)])
def test_noise_in_deep_pipelines_is_no_straggler(stages: int, replicas: int, noise_share: float, seed: int) -> None:
    job = Job(stages, replicas, seed)
    job.run(300, noise_share=noise_share)
    assert job.told == []


def test_a_replica_that_is_slow_as_a_whole_is_found_where_batches_are_alike() -> None:
    job = Job(2, 4)
    job.run(60)
    job.run(60, slow={2: 1.2, 3: 1.2})
    assert job.slow == {2: pytest.approx(1.2, rel=0.02), 3: pytest.approx(1.2, rel=0.02)}


def test_ranks_that_are_as_in_the_profile_ask_nobody() -> None:
    job = Job(4, 2)
    asked: list[str] = []
    fetch = job.exchange.fetch
    job.exchange.fetch = lambda key: asked.append(key) or fetch(key)  # type: ignore[method-assign, func-returns-value]
    job.run(100)
    assert asked == []
    job.run(20, slow={3: 1.5})
    assert 0 < len(asked) < 150


def test_only_iterations_that_all_have_told_of_are_compared() -> None:
    own = {1: 1.2, 2: 1.2, 3: 2.4}
    others = [{1: 1.0, 2: 1.2, 3: 2.0}, {2: 1.25, 3: 3.0}]
    assert against_pipeline(own, others) == {2: pytest.approx(1.0), 3: pytest.approx(1.2)}
    assert against_pipeline(own, []) == {}
    assert against_replicas(own, [{1: 1.0, 2: 1.2}, {1: 2.0, 2: 1.2}, {1: 1.5, 2: 0.6}]) == {
        1: pytest.approx(0.8),
        2: pytest.approx(1.0),
    }
