"""Files in folders where others may have put something, and reading what others may have written.

Writing: a reader sees the old content or the new, never half of it. Reading: no more than so much, and nested no deeper
than so deep; whatever is wrong is a `ValueError` that says so in one line.
"""

from __future__ import annotations

import errno
import functools
import json
import logging
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from perseus_plugin.errors import PerseusError, os_problem, validation_problem

if TYPE_CHECKING:
    from pydantic import BaseModel

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound="BaseModel")

_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_MODE = 0o666  # less what the user's umask takes away
MOST_BYTES = 256 * 2**20
_PIECE = 1 << 20
_GZIP = b"\x1f\x8b"
_MOST_DEPTH = 64
_MOST_NODES = 100_000
_TOO_DEEP = f"nested more than {_MOST_DEPTH} deep"
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"')
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def try_to_write(what: str, write: Callable[[], None]) -> None:
    """Write something that training and its plan can do without: a full disk is said, and costs no more."""
    try:
        write()
    except (OSError, PerseusError) as error:
        logger.warning(
            "cannot write %s: %s; training and the plan go on. See to space and permissions of perseus.output_dir",
            what,
            os_problem(error) if isinstance(error, OSError) else error,
        )


def own_folder(folder: Path) -> Path:
    """Where a job's output folder really is, wherever the script may go from here; see `follow_no_links`.

    Raises:
        OSError: the way there leads in a circle, or over a link that somebody else has put where others can write.
    """
    whole = folder.absolute()
    for place in (whole, *whole.parents):
        try:
            link, around = place.lstat(), place.parent.stat()
        except OSError:  # not there yet, or not to be seen from here: whoever writes there will say so
            continue
        foreign = link.st_uid not in (0, os.geteuid(), around.st_uid)
        if stat.S_ISLNK(link.st_mode) and foreign and around.st_mode & _OTHERS_WRITE:
            raise OSError(f"{place} is a link that user {link.st_uid} has made in a folder that others can write")
    try:
        real = whole.resolve()
    except RuntimeError as error:  # a circle, before Python 3.13
        raise OSError(str(error)) from error
    follow_no_links(real)
    return real


def follow_no_links(folder: Path) -> None:
    """From here on this process follows no link on the way to what it opens in a folder, which has none above it.

    Others may be able to write there: no link of theirs shall lead us to write, read or remove something elsewhere, and
    no pipe of theirs hold us up.
    """
    _without_links.add(folder)


_without_links: set[Path] = set()


@contextmanager
def opened_folder(folder: Path, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder, for what takes a `dir_fd`.

    Args:
        folder: which; see `follow_no_links`.
        make: make it, and those above it, where they are missing.

    Raises:
        OSError: it cannot be opened or made, or a link is on the way where none is followed.
    """
    strictly = _follows_none(folder)
    if make and not strictly:
        folder.mkdir(parents=True, exist_ok=True)
    flags = _FOLDER | os.O_NOFOLLOW if strictly else _FOLDER
    at = os.open(folder.anchor or ".", _FOLDER)
    try:
        for part in folder.parts[1:] if strictly else (folder,):
            try:
                below = os.open(part, flags, dir_fd=at)
            except FileNotFoundError:
                if not (make and strictly):
                    raise
                with suppress(FileExistsError):
                    os.mkdir(part, dir_fd=at)
                below = os.open(part, flags, dir_fd=at)
            except NotADirectoryError as error:
                if strictly and stat.S_ISLNK(os.stat(part, dir_fd=at, follow_symlinks=False).st_mode):
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(folder)) from error
                raise OSError(error.errno, error.strerror, str(folder)) from error
            os.close(at)
            at = below
        yield at
    finally:
        os.close(at)


def open_file(path: Path, flags: int, regular: bool = False) -> int:
    """As `os.open`; in a folder in which no links are followed, of regular files only.

    Args:
        path: of the file.
        flags: as for `os.open`.
        regular: nothing but a regular file, wherever it is: a pipe that nobody writes to would hold a job up.

    Raises:
        OSError: it cannot be opened, or is a link, a pipe or a device where that is not allowed.
    """
    flags |= os.O_CLOEXEC
    number, why = errno.ENXIO, os.strerror(errno.ENXIO)
    if _follows_none(path):
        with opened_folder(path.parent) as folder:
            descriptor = os.open(path.name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, _MODE, dir_fd=folder)
    elif regular:
        descriptor = os.open(path, flags | os.O_NONBLOCK, _MODE)
        number, why = errno.EINVAL, "it is no regular file"
    else:
        return os.open(path, flags, _MODE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(number, why, str(path))
    return descriptor


def encoded(text: str) -> bytes:
    """Text as UTF-8; what Python has of a path or a name that is none (lone surrogates) as its escape."""
    return text.encode(errors="backslashreplace")


def append(path: Path, text: str) -> None:
    """Put `text` at the end of a file, on a line of its own: a writer that was killed may have left half of one.

    Raises:
        OSError: the file cannot be opened or written.
    """
    descriptor = open_file(path, os.O_RDWR | os.O_APPEND | os.O_CREAT)
    with os.fdopen(descriptor, "ab") as file:
        size = os.fstat(descriptor).st_size
        torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
        file.write(encoded("\n" + text if torn else text))


def write_atomically(path: Path, content: str | bytes, make: bool = False) -> None:
    """Write `content` to a temporary file beside `path` and rename it over `path`.

    Args:
        path: of the file; a link there is replaced, not followed.
        content: text is written as UTF-8.
        make: make the folder where it is missing.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was before.
    """
    temporary = f".{path.name}.{secrets.token_hex(8)}.tmp"  # which nobody can have put there before
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with opened_folder(path.parent, make) as folder:
        descriptor = os.open(temporary, flags, _MODE, dir_fd=folder)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content if isinstance(content, bytes) else encoded(content))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary, dir_fd=folder)
            raise


def remove(path: Path) -> None:
    """Remove a file, if it is there; of a link the link.

    Raises:
        OSError: it cannot be removed.
    """
    with suppress(FileNotFoundError), opened_folder(path.parent) as folder:
        os.unlink(path.name, dir_fd=folder)


def _follows_none(path: Path) -> bool:
    return any(path.is_relative_to(folder) for folder in _without_links)


class Descriptor:
    """A file descriptor that is used only as long as it is what was opened.

    A script may close all that it does not know, and open files of its own, which get the same numbers: what we wrote
    then would land in them, what we read would be missing there.

    Args:
        number: just opened; closed by `close`, or with this object.
    """

    def __init__(self, number: int) -> None:
        self._number = -1  # in case that it is none
        self._what = identity(number)
        self._number = number

    @property
    def number(self) -> int:
        """To be used at once.

        Raises:
            OSError: it has been closed, by us or by somebody else.
        """
        if self._number < 0 or identity(self._number) != self._what:
            self._number = -1
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._number

    def close(self) -> None:
        """Close it, if it is still ours."""
        with suppress(OSError):
            number, self._number = self.number, -1
            os.close(number)

    def __del__(self) -> None:
        self.close()


def identity(descriptor: int) -> tuple[int, int]:
    """What a file descriptor stands for, whatever its number.

    Raises:
        OSError: it is none.
    """
    found = os.fstat(descriptor)
    return found.st_dev, found.st_ino


def read_bytes(path: Path | str, most: int = MOST_BYTES, regular: bool = False) -> bytes:
    """What a file holds.

    Args:
        path: of the file.
        most: bytes that it may have.
        regular: see `open_file`.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    descriptor = open_file(Path(path), os.O_RDONLY, regular)
    try:
        opened = os.fdopen(descriptor, "rb")
    except OSError as error:  # it is a folder
        os.close(descriptor)
        raise OSError(error.errno, error.strerror, str(path)) from None
    with opened as file:
        size, pieces = os.fstat(file.fileno()).st_size, [b""]
        while size <= most and (piece := file.read(_PIECE)):
            pieces.append(piece)
            size = max(size, sum(map(len, pieces)))
    if size > most:
        raise ValueError(f"it has more than {most} bytes, the most that is read of such a file")
    return b"".join(pieces)


def read_unpacked(path: Path | str, most: int = MOST_BYTES) -> bytes:
    """As `read_bytes`; of a file that gzip made what it holds, which may have `most` bytes too.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or what gzip made is damaged.
    """
    import gzip
    import io
    import zlib

    data = read_bytes(path, most)
    if not data.startswith(_GZIP):
        return data
    pieces, size = [], 0
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(data)) as packed:
            while size <= most and (piece := packed.read(_PIECE)):
                pieces.append(piece)
                size += len(piece)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"damaged: {error}") from error
    if size > most:
        raise ValueError(f"it holds more than {most} bytes, the most that is read of such a file")
    return b"".join(pieces)


def read_text(path: Path | str, most: int = MOST_BYTES, regular: bool = False) -> str:
    """As `read_bytes`, from UTF-8, without the byte order mark that spreadsheets put in front."""
    return read_bytes(path, most, regular).decode("utf-8-sig")


def parse_json(data: str | bytes, most: int = MOST_BYTES) -> Any:
    """Read JSON from anybody.

    Raises:
        ValueError: it is none, or longer than `most` bytes, or nested too deeply.
    """
    if len(data) > most:
        raise ValueError(f"longer than {most} bytes")
    try:
        parsed = json.loads(data)
        if not _too_deep(data if isinstance(data, bytes) else data.encode(errors="replace")):
            return parsed
    except RecursionError:
        pass
    raise ValueError(_TOO_DEEP)


def parse_yaml(text: str) -> Any:
    """Read YAML from anybody.

    Raises:
        ValueError: it is none, or nested too deeply, or grows beyond measure by its aliases.
    """
    import yaml

    try:
        return yaml.load(text, _yaml_loader())
    except Exception as error:  # its own, or what Python says of a date or a number that is none
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error


@functools.cache
def _yaml_loader() -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """The safe one, which counts nodes, those that an alias stands for each time, and how deep it is in them."""

        def __init__(self, text: str) -> None:
            super().__init__(text)
            self._depth = self._nodes = 0
            self._sizes: dict[int, int] = {}

        def compose_node(self, parent: Any, index: Any) -> Any:
            self._depth += 1
            before = self._nodes
            self._nodes += 1
            if self._depth > _MOST_DEPTH:
                raise yaml.YAMLError(_TOO_DEEP)
            node = super().compose_node(parent, index)
            # An alias gives a node that was composed before, or is being composed.
            self._nodes += self._sizes.get(id(node), 0) if self._nodes == before + 1 else 0
            if self._nodes > _MOST_NODES:
                raise yaml.YAMLError(f"more than {_MOST_NODES} values, those that aliases stand for counted each time")
            self._sizes[id(node)] = self._nodes - before
            self._depth -= 1
            return node

    return Loader


def _too_deep(data: bytes) -> bool:
    """Whether brackets are nested too deeply: they are taken away from the inside, a level or two at a time."""
    for strings in (None, _STRING):  # only where they may hold brackets does it matter
        brackets = (data if strings is None else strings.sub(b"", data)).translate(None, _NO_BRACKETS)
        for _ in range(_MOST_DEPTH):
            brackets = brackets.replace(b"[]", b"").replace(b"{}", b"")
            if not brackets:
                return False
    return True


def read_model(
    path: Path | str,
    model: type[ModelT],
    refusal: type[PerseusError],
    most: int = MOST_BYTES,
    regular: bool = False,
) -> ModelT:
    """Read a JSON file of this package's, or one that is to be like it; see `read_bytes`.

    Raises:
        PerseusError: of the type `refusal`, in one line: the file, the place in it, what was found and what is allowed.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate_json(read_bytes(path, most, regular))
    except ValidationError as error:
        raise refusal(f"{path}: {validation_problem(error, model)}") from error
    except (OSError, ValueError) as error:
        raise refusal(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
