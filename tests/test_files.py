from __future__ import annotations

import errno
import gzip
import os
import threading
from functools import partial
from pathlib import Path

import pytest

from perseus_plugin.errors import PerseusError, os_problem
from perseus_plugin.files import (
    append,
    open_file,
    opened_folder,
    own_folder,
    read_text,
    read_unpacked,
    remove,
    write_atomically,
)
from perseus_plugin.profiling.profile import load_profile
from perseus_plugin.reporting.verification import load_verification


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def test_the_text_is_written_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for text in ("größer\n", ""):
        write_atomically(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert names(tmp_path) == ["summary.json"]


def test_what_is_not_unicode_is_written_as_its_escape(tmp_path: Path) -> None:
    path, text, escaped = tmp_path / "caf\udce9", "größe of caf\udce9\n", "größe of caf\\udce9\n"
    write_atomically(path, text)
    append(path, text)
    assert path.read_text(encoding="utf-8") == 2 * escaped
    assert names(tmp_path) == ["caf\udce9"]


def test_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", "text")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(NotADirectoryError):
        write_atomically(tmp_path / "file" / "below", "text")


@pytest.mark.parametrize("failing", ["os.fsync", "os.replace"])
def test_a_failure_leaves_the_old_content_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["plan.json"]


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory") as caught:
        read_text(tmp_path)
    assert os_problem(caught.value) == f"{tmp_path}: Is a directory"


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


# Folders in which others can write.


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A job's folder, with somebody else's files beside it."""
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "file").write_text("precious")
    shared = tmp_path / "shared"
    shared.mkdir()
    return own_folder(shared)


def precious(shared: Path) -> bool:
    return [path.read_text() for path in (shared.parent / "victim").iterdir()] == ["precious"]


def test_a_link_in_place_of_a_file_is_not_followed(shared: Path) -> None:
    link = shared / "events.jsonl"
    link.symlink_to("../victim/file")
    with pytest.raises(OSError, match=r"events\.jsonl") as caught:
        append(link, "line\n")
    assert "it is a link" in os_problem(caught.value)
    with pytest.raises(OSError, match=r"events\.jsonl"):
        open_file(link, os.O_RDONLY)
    write_atomically(link, "text")
    assert not link.is_symlink()
    link.unlink()
    link.symlink_to("../victim/file")
    remove(link)
    assert not link.is_symlink()
    assert precious(shared)


def test_a_link_in_place_of_a_folder_is_not_followed(shared: Path) -> None:
    (shared / "records").symlink_to("../victim")
    (shared / "session-2").mkdir()
    (shared / "session-2" / "records").symlink_to("../../victim")
    for folder in (shared / "records", shared / "records" / "schedules", shared / "session-2" / "records"):
        for touch in (
            lambda file: write_atomically(file, "text", make=True),
            lambda file: append(file, "line\n"),
            remove,
        ):
            with pytest.raises(OSError, match="symbolic link") as caught:
                touch(folder / "file")
            assert caught.value.errno == errno.ELOOP
            assert str(folder) in os_problem(caught.value)
    assert precious(shared)


def test_a_folder_that_was_exchanged_for_a_link_is_not_written_to(shared: Path) -> None:
    shared.rename(shared.with_name("moved"))
    shared.symlink_to("victim")
    with pytest.raises(OSError, match="symbolic link"):
        write_atomically(shared / "file", "text")
    assert precious(shared)


def test_a_pipe_in_place_of_a_file_holds_nobody_up(shared: Path) -> None:
    pipe = shared / "events.jsonl"
    os.mkfifo(pipe)
    for touch in (lambda: append(pipe, "line\n"), lambda: open_file(pipe, os.O_RDONLY)):
        with pytest.raises(OSError, match=r"events\.jsonl") as caught:
            touch()
        assert "it is a pipe" in os_problem(caught.value)


def test_what_a_job_is_told_to_read_is_no_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for read in (load_verification, partial(load_profile, regular=True)):
        with pytest.raises(PerseusError, match="it is no regular file"):
            read(pipe)


def test_no_temporary_file_has_a_name_that_can_be_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[tuple[str, int]] = []
    really = os.open

    def noted(path: str, flags: int, *more: int, **where: int) -> int:
        if str(path).endswith(".tmp"):
            opened.append((str(path), flags))
        return really(path, flags, *more, **where)

    monkeypatch.setattr("os.open", noted)
    for _ in range(3):
        write_atomically(tmp_path / "file", "text")
    assert len({name for name, _ in opened}) == 3
    assert all(flags & os.O_EXCL and flags & os.O_NOFOLLOW for _, flags in opened)


def test_the_job_s_own_way_to_its_folder_may_lead_over_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to("disk")
    monkeypatch.chdir(tmp_path)
    folder = own_folder(Path("scratch/out"))
    assert folder == tmp_path / "disk" / "out"
    monkeypatch.chdir("/")
    with opened_folder(folder, make=True):
        pass
    write_atomically(folder / "records" / "file", "text", make=True)
    assert (tmp_path / "disk" / "out" / "records" / "file").read_text() == "text"


def test_a_link_that_somebody_else_has_made_where_all_can_write_is_refused(tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs another user")
    (tmp_path / "victim").mkdir()
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    link = public / "out"
    link.symlink_to("../victim")
    os.chown(link, 65534, -1, follow_symlinks=False)
    with pytest.raises(OSError, match="user 65534 has made"):
        own_folder(link / "mine")
    public.chmod(0o755)  # by leave of its owner
    assert own_folder(link) == tmp_path / "victim"


def test_a_circle_of_links_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").symlink_to("out")
    with pytest.raises(OSError, match="out"):
        own_folder(tmp_path / "out")


def test_elsewhere_links_are_followed_as_ever(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "scratch").symlink_to("disk")
    write_atomically(tmp_path / "scratch" / "plan.json", "text")
    assert (tmp_path / "disk" / "plan.json").read_text() == "text"


def test_a_line_begins_a_line(tmp_path: Path) -> None:
    file = tmp_path / "events.jsonl"
    for text in ("one\n", "half", "two\n", "three\n"):
        append(file, text)
    assert file.read_text() == "one\nhalf\ntwo\nthree\n"


def test_a_folder_that_this_rank_cannot_see_is_for_whoever_writes_there_to_complain_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hidden(path: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "lstat", hidden)
    assert own_folder(tmp_path / "out") == tmp_path / "out"


def test_what_gzip_packed_is_unpacked_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two") + b"\0" * 8)
    assert read_unpacked(path) == b"one two"
    path.write_bytes(b"as it is")
    assert read_unpacked(path) == b"as it is"
    path.write_bytes(gzip.compress(b"0" * 10_000_000))  # a bomb: it is never unpacked whole
    with pytest.raises(ValueError, match="it holds more than 1000000 bytes"):
        read_unpacked(path, most=1_000_000)
    path.write_bytes(gzip.compress(b"cut off")[:-9])
    with pytest.raises(ValueError, match=r"damaged: .*end-of-stream"):
        read_unpacked(path)
    path.write_bytes(gzip.compress(b"one") + b"no more gzip")
    with pytest.raises(ValueError, match="damaged"):
        read_unpacked(path)
