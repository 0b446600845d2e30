from __future__ import annotations

import threading
from pathlib import Path

import pytest

from perseus_plugin.files import write_atomically


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_text_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for text in ("größer\n", ""):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert names(tmp_path) == ["summary.json"]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", "text")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file" / "below", "text")


@pytest.mark.parametrize("failing", ["os.fsync", "pathlib.Path.replace"])
def test_a_failure_leaves_the_old_content_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_a_reader_sees_one_whole_text(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [letter * 20_000 for letter in "abc"]
    write_atomically(path, texts[0])
    writers = [
        threading.Thread(target=lambda text=text: [write_atomically(path, text) for _ in range(10)]) for text in texts
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert path.read_text() in texts
    for writer in writers:
        writer.join()
    assert names(tmp_path) == ["file"]
