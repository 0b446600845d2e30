from __future__ import annotations

from pathlib import Path

import pytest

from perseus_plugin.errors import ProfileError
from perseus_plugin.profiling.failed import FILE, load_failure, save_failure

FACTS = {"stage 0: gpu": "A100", "profiling": "5 steps"}


def test_the_same_job_profiled_the_same_way_is_told_why(tmp_path: Path) -> None:
    assert load_failure(FACTS, tmp_path) == ""
    save_failure("no energy was measured", FACTS, tmp_path)
    assert load_failure(FACTS, tmp_path).startswith("no energy was measured (found on 20")
    assert load_failure({**FACTS, "profiling": "9 steps"}, tmp_path) == ""
    assert load_failure({**FACTS, "more": "x"}, tmp_path) == ""


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"schema_name": "other"}', "\x00"])
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ProfileError, match=FILE):
        load_failure(FACTS, tmp_path)


def test_another_version_is_named(tmp_path: Path) -> None:
    save_failure("x", FACTS, tmp_path)
    path = tmp_path / FILE
    path.write_text(path.read_text().replace('"version": 1', '"version": 2'))
    with pytest.raises(ProfileError, match="version: got 2; allowed: 1"):
        load_failure(FACTS, tmp_path)
