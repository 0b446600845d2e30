"""Writing files so that a reader sees the old content or the new, never half of it."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from perseus_plugin.errors import PerseusError, os_problem, validation_problem

if TYPE_CHECKING:
    from pydantic import BaseModel

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound="BaseModel")


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


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to a temporary file beside `path` and rename it over `path`.

    Raises:
        OSError: the folder is missing or not writable, or the disk is full; `path` is then as it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_model(path: Path | str, model: type[ModelT], refusal: type[PerseusError]) -> ModelT:
    """Read a JSON file of this package's, or one that is to be like it.

    Raises:
        PerseusError: of the type `refusal`, in one line: the file, the place in it, what was found and what is allowed.
    """
    from pydantic import ValidationError

    try:
        return model.model_validate_json(Path(path).read_bytes())
    except ValidationError as error:
        raise refusal(f"{path}: {validation_problem(error, model)}") from error
    except OSError as error:
        raise refusal(f"{path}: cannot be read: {error.strerror or error}") from error
