from __future__ import annotations

import pytest

from perseus_plugin.gpus.visible import has_indices, matches, visible_positions

UUIDS = ["GPU-89320000-a", "GPU-8932ffff-b", "GPU-10000000-c", ""]


@pytest.mark.parametrize(
    ("value", "positions"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        (" 2 , 0", [2, 0]),
        ("GPU-1", [2]),
        ("GPU-8932", []),
        ("GPU-89320,GPU-8932f", [0, 1]),
        ("2,GPU-89320", [2]),
        ("GPU-89320,2", [0]),
        ("1gpu2,2ampere", [1, 2]),
        ("+1", [1]),
        ("\u00b2", []),
        ("0,-1,2", [0]),
        ("0,9,2", [0]),
        ("0,NoDevFiles", [0]),
        ("0,1,0", []),
        ("1,1gpu", []),
        ("MIG-1234", []),
        ("GPU-", []),
    ],
)
def test_it_is_read_as_cuda_reads_it(value: str | None, positions: list[int]) -> None:
    assert visible_positions(value, UUIDS) == positions


def test_indices_are_told_from_uuids() -> None:
    assert [has_indices(value) for value in (None, "", "GPU-1", "0", "GPU-1,2")] == [False, False, False, True, False]


def test_a_whole_uuid_is_the_only_match() -> None:
    assert matches("GPU-1", ["GPU-1", "GPU-11"]) == [0]
    assert matches("1", ["GPU-1", "GPU-11", "GPU-2"]) == [0]
    assert matches("gpu-1".upper(), ["GPU-12", "GPU-11"]) == [0, 1]
    assert matches("", UUIDS) == []
