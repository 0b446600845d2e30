"""Where a rank sits in a job that PyTorch's own groups and meshes describe.

A pipeline is the group that a schedule's stages talk in. Pipelines work on the same microbatches together, in
lock-step, where their modules share parameters out among them (FSDP, tensor, expert and context parallelism): these
are shards of one replica. Where parameters are only copied (DDP, the replicating dimension of hybrid FSDP), every
pipeline runs at a pace of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from perseus_plugin.errors import PerseusError
from perseus_plugin.exchange.messages import SEATS, Seat, Seats, receive, seat_key
from perseus_plugin.exchange.store import Exchange, wait_for

_WAIT_S = 60.0  # ranks come to their first step within this of each other


class PlacesError(PerseusError):
    """The job's pipelines are not alike."""


def replica_and_shards(seats: Sequence[Seat], rank: int) -> tuple[int, int]:
    """Which replica a rank is part of, and how many pipelines each replica has. Pure.

    Args:
        seats: of every rank of the job.
        rank: whose.

    Raises:
        PlacesError: pipelines, or replicas, differ in size.
    """
    members: dict[int, list[int]] = {}
    for seat in seats:
        members.setdefault(seat.pipeline, []).append(seat.stage)
    replica_of = {pipeline: {pipeline} for pipeline in members}
    for seat in seats:
        for other in seat.together:
            joined = replica_of[seat.pipeline] | replica_of[seats[other].pipeline]
            replica_of.update(dict.fromkeys(joined, joined))
    replicas = sorted({tuple(sorted(one)) for one in replica_of.values()})
    stages, shards = {seat.stages for seat in seats}, {len(one) for one in replicas}
    whole = all(sorted(one) == list(range(max(stages))) for one in members.values())
    if len(stages) > 1 or len(shards) > 1 or not whole:
        raise PlacesError(
            f"the job's pipelines are not alike: they have {_listed(stages)} ranks, and {_listed(shards)} of them "
            "train in lock-step"
        )
    return next(number for number, one in enumerate(replicas) if seats[rank].pipeline in one), max(shards)


def _listed(numbers: Iterable[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def seats_of_all(exchange: Exchange, mine: Seat, rank: int, world_size: int) -> tuple[Seat, ...]:
    """What every rank says of itself. Waits for all, before training starts.

    Raises:
        PerseusError: a rank does not come in time, or the store fails.
    """
    exchange.tell(seat_key(rank), mine.model_dump())
    if rank == 0:
        keys = [seat_key(one) for one in range(world_size)]
        told = wait_for(exchange.told, keys, _WAIT_S)
        exchange.tell_all(SEATS, {"seats": [told[key] for key in keys] if len(told) == world_size else []})
    seats = receive(Seats, wait_for(exchange.heard, [SEATS], 2 * _WAIT_S).get(SEATS, {"seats": []})).seats
    if len(seats) < world_size or any(other >= world_size for seat in seats for other in seat.together):
        raise PlacesError(f"not all ranks have said within {_WAIT_S:.0f} s where they sit")
    return seats


def together_with(rank: int, modules: Iterable[Any]) -> tuple[int, ...]:
    """The ranks that some parameter of these modules is shared out among, `rank` among them.

    Args:
        rank: this one, in the whole job.
        modules: of this rank's stages.
    """
    try:
        from torch.distributed.tensor import DTensor, Replicate
    except ImportError:  # torch 2.4
        from torch.distributed._tensor import DTensor, Replicate

    found = {rank}
    # Parameters of one mesh are mostly shared out alike; each different way is looked at once.
    seen: set[tuple[int, Sequence[bool]]] = set()
    for module in modules:
        for parameter in module.parameters():
            if not isinstance(parameter, DTensor):
                continue
            mesh, shared = parameter.device_mesh, tuple(not isinstance(p, Replicate) for p in parameter.placements)
            if (id(mesh), shared) not in seen:
                seen.add((id(mesh), shared))
                found.update(_along(mesh.mesh, rank, shared))
    return tuple(sorted(found))


def _along(ranks: Any, rank: int, shared: Sequence[bool]) -> list[int]:
    """Ranks of a mesh's tensor that differ from `rank` only along the shared dimensions."""
    place = (ranks == rank).nonzero()
    if not len(place):
        return []
    index = tuple(slice(None) if along else int(at) for at, along in zip(place[0], shared, strict=True))
    return [int(one) for one in ranks[index].flatten()]
