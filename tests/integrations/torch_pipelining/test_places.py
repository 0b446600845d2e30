from __future__ import annotations

import importlib
import itertools
import sys
import threading
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange.messages import Seat
from perseus_plugin.exchange.store import LocalExchange
from perseus_plugin.integrations.base import local_rank
from perseus_plugin.integrations.torch_pipelining import places
from perseus_plugin.integrations.torch_pipelining.adapter import device_of
from perseus_plugin.integrations.torch_pipelining.places import replica_and_shards, seats_of_all


def seats(stages: int, replicas: int, shards: int, *, pipelines_first: bool) -> list[Seat]:
    """Of all ranks of a regular job.

    Args:
        pipelines_first: ranks of one pipeline have numbers in a row; else those of one stage.
    """
    names = list(itertools.product(range(replicas), range(shards), range(stages)))
    if not pipelines_first:
        names.sort(key=lambda name: (name[2], name[:2]))
    rank_of = {name: rank for rank, name in enumerate(names)}
    return [
        Seat(
            pipeline=rank_of[replica, shard, 0],
            stage=stage,
            stages=stages,
            together=tuple(sorted(rank_of[replica, other, stage] for other in range(shards))),
        )
        for replica, shard, stage in names
    ]


@pytest.mark.parametrize("pipelines_first", [True, False])
@pytest.mark.parametrize(("stages", "replicas", "shards"), [(2, 1, 1), (4, 2, 1), (2, 1, 4), (3, 2, 2)])
def test_ranks_are_in_their_replica(stages: int, replicas: int, shards: int, pipelines_first: bool) -> None:
    job = seats(stages, replicas, shards, pipelines_first=pipelines_first)
    found = [replica_and_shards(job, rank) for rank in range(len(job))]
    assert {each for _, each in found} == {shards}
    for replica in range(replicas):
        members = [job[rank] for rank, (number, _) in enumerate(found) if number == replica]
        assert sorted(seat.stage for seat in members) == sorted(list(range(stages)) * shards)
        assert len({seat.pipeline for seat in members}) == shards


def test_one_stage_that_works_together_is_enough() -> None:
    job = seats(2, 1, 2, pipelines_first=True)
    alone = [seat if seat.stage == 1 else seat.model_copy(update={"together": ()}) for seat in job]
    assert [replica_and_shards(alone, rank) for rank in range(4)] == [(0, 2)] * 4


@pytest.mark.parametrize("fault", ["a longer pipeline", "a larger replica", "a stage twice"])
def test_pipelines_that_are_not_alike_are_refused(fault: str) -> None:
    job = seats(2, 3, 1, pipelines_first=True)
    if fault == "a longer pipeline":
        job[0] = job[0].model_copy(update={"stages": 3})
    elif fault == "a larger replica":
        job[0] = job[0].model_copy(update={"together": (0, 2)})
    else:
        job[0] = job[0].model_copy(update={"stage": 1})
    with pytest.raises(PerseusError, match="the job's pipelines are not alike"):
        replica_and_shards(job, 0)


def test_every_rank_hears_of_all() -> None:
    exchange, job = LocalExchange(), seats(2, 2, 1, pipelines_first=True)
    found: dict[int, Any] = {}

    def rank(number: int) -> None:
        found[number] = seats_of_all(exchange, job[number], number, 4)

    threads = [threading.Thread(target=rank, args=(number,)) for number in (3, 0, 2, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), tuple(job))


def test_a_rank_that_does_not_come_is_said_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "_WAIT_S", 0.05)
    exchange, job = LocalExchange(), seats(2, 1, 1, pipelines_first=True)
    with pytest.raises(PerseusError, match="not all ranks have said"):
        seats_of_all(exchange, job[0], 0, 2)
    with pytest.raises(PerseusError, match="not all ranks have said"):
        seats_of_all(exchange, job[1], 1, 2)


def test_a_rank_that_is_none_of_the_job_is_refused() -> None:
    odd = seats(2, 1, 1, pipelines_first=True)[0].model_copy(update={"together": (0, 7)})
    with pytest.raises(PerseusError, match="not all ranks have said"):
        seats_of_all(LocalExchange(), odd, 0, 1)


MESH = torch.arange(8).reshape(2, 2, 2)


@pytest.mark.parametrize(
    ("rank", "shared", "expected"),
    [
        (5, (False, False, False), [5]),
        (5, (False, False, True), [4, 5]),
        (5, (True, False, True), [0, 1, 4, 5]),
        (0, (True, True, True), list(range(8))),
        (9, (True, True, True), []),
    ],
)
def test_ranks_are_together_along_dimensions_that_share(
    rank: int, shared: tuple[bool, ...], expected: list[int]
) -> None:
    assert places._along(MESH, rank, shared) == expected


def test_modules_without_shared_parameters_work_alone() -> None:
    assert places.together_with(3, [torch.nn.Linear(2, 2), SimpleNamespace(parameters=list)]) == (3,)


@pytest.mark.parametrize(
    ("dimensions", "expected"),
    [(("shard",), [4, 5]), (("copy", "shard"), [4, 5]), (("copy",), [4, 6])],
    ids=["FSDP", "hybrid FSDP", "FSDP along another dimension"],
)
def test_ranks_that_share_parameters_out_are_together(dimensions: tuple[str, ...], expected: list[int]) -> None:
    """Eight ranks of two stages, seen from rank 4; torch's own modules and meshes, with a group that is none."""
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=4, world_size=8)
    mesh = init_device_mesh("cpu", (2, 2, 2), mesh_dim_names=("pipeline", "copy", "shard"))
    module = fully_shard(torch.nn.Linear(4, 4), mesh=mesh[dimensions])
    assert places.together_with(4, [module, torch.nn.Linear(2, 2)]) == tuple(expected)


def test_tensor_parallel_ranks_are_together() -> None:
    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=3, world_size=4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pipeline", "tensor"))
    module = parallelize_module(torch.nn.Linear(4, 4), mesh["tensor"], ColwiseParallel())
    assert places.together_with(3, [module]) == (2, 3)


def test_older_torch_has_its_tensors_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("torch.distributed._tensor")  # here it is made from the other one
    monkeypatch.setitem(sys.modules, "torch.distributed.tensor", ModuleType("torch.distributed.tensor"))
    assert places.together_with(3, [torch.nn.Linear(2, 2)]) == (3,)


@pytest.mark.parametrize(
    ("written", "device"), [("cuda", "cuda:3"), (torch.device("cuda"), "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")]
)
def test_a_device_without_a_number_is_the_current_one(
    written: object, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert device_of(SimpleNamespace(device=written)) == device


def test_a_rank_that_no_launcher_numbers_has_the_number_of_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [local_rank(device) for device in ("cuda:3", "cuda", "cpu")] == [3, 0, 0]
    monkeypatch.setenv("LOCAL_RANK", "5")
    assert [local_rank(device) for device in ("cuda:0", "cpu")] == [5, 5]
