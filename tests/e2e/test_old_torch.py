"""Jobs with PyTorch's own pipelines and older versions of torch, in environments of their own (`make old-torch`)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.again import hold
from tests.e2e.launching import REPOSITORY, Finished, perseus_block, started_ranks
from tests.e2e.test_pipelining import IMPORTS, ORDERS, PLANNED, SCRIPT, facts

FOLDER = REPOSITORY / ".old_torch"
VERSIONS = sorted(one.name for one in FOLDER.glob("*") if (one / "bin" / "python").exists())
ONE_STAGE = ("1F1B", "GPipe")
SEVERAL = ("Interleaved1F1B", "LoopedBFS", "InterleavedZeroBubble", "ZBVZeroBubble", "DualPipeV")
ENTRY_POINTS_SINCE = (2, 5)
"""From then on `import torch` calls those of its group `torch.backends`."""
LISTS_SINCE = (2, 10)
"""From then on schedules of several stages per rank keep lists of what they run."""
TIMEOUT_S = 900.0

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.matrix,
    pytest.mark.skipif(not VERSIONS, reason="no older torch is installed here: make old-torch"),
]


def is_since(version: str, since: tuple[int, int]) -> bool:
    major, minor, *_ = version.split(".")
    return (int(major), int(minor)) >= since


def run(version: str, ranks: int, folder: Path, *words: str, **environment: str) -> Finished:
    python = FOLDER / version / "bin" / "python"
    with started_ranks(ranks, folder, *words, python=python, imports=IMPORTS, **environment) as job:
        return job.wait(TIMEOUT_S).check()


@pytest.mark.parametrize(
    ("version", "schedule"),
    [
        (one, name)
        for one in VERSIONS
        for name in (*ONE_STAGE, *(SEVERAL if is_since(one, LISTS_SINCE) else SEVERAL[:1]))
    ],
)
def test_training_is_bit_identical_and_what_is_known_is_planned(version: str, schedule: str, tmp_path: Path) -> None:
    is_known = schedule in ONE_STAGE or is_since(version, LISTS_SINCE)
    file = tmp_path / "perseus.json"
    file.write_text(json.dumps(perseus_block(tmp_path / "out", 2)))
    words = (str(SCRIPT), "--schedule", schedule, "--microbatches", "4")
    ending = ("--until-said", PLANNED if is_known else "is not one that perseus can follow")
    if is_since(version, ENTRY_POINTS_SINCE):
        done = run(version, 2, tmp_path, *words, *ending, PERSEUS_CONFIG=str(file))
    else:
        done = run(version, 2, tmp_path, *words, *ending, "--enable", str(file))
    with_plugin = facts(tmp_path, 2)
    steps = len(with_plugin[0]["parameters"])
    assert steps < 400, "it was never said"
    run(version, 2, tmp_path / "without", *words, "--steps", str(steps))
    hold(with_plugin == facts(tmp_path / "without", 2), "training is what it is without the plugin")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["state"] == "finished"
    assert summary["ranks_reporting"] == 2
    assert (summary["iterations"].get("plan", 0) >= 2) == is_known
    assert "Broken pipe" not in done.output
    assert "the summary may be incomplete" not in done.output


@pytest.mark.parametrize("version", VERSIONS)
def test_every_rank_runs_its_stream(version: str, tmp_path: Path) -> None:
    known = (*ONE_STAGE, *(SEVERAL if is_since(version, LISTS_SINCE) else ()))
    done = run(version, 4, tmp_path, str(ORDERS), *known)
    found = next(json.loads(line) for line in done.output.splitlines() if line.startswith("{"))
    assert len(found) >= len(known)
    assert {case: said for case, said in found.items() if said != [True] * 4} == {}
