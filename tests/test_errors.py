from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from perseus_plugin.errors import os_problem


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSPC, errno.EROFS, errno.ENOLCK, errno.EACCES, errno.EAGAIN])
def test_a_system_error_names_file_and_remedy(number: int) -> None:
    text = os_problem(OSError(number, os.strerror(number), "/somewhere/file"))
    assert text.startswith(f"/somewhere/file: {os.strerror(number)} (")
    assert text.endswith(")")
    assert "Errno" not in text


def test_what_has_no_file_or_is_not_known_is_said_all_the_same(tmp_path: Path) -> None:
    assert os_problem(OSError("the socket is too long")) == "the socket is too long"
    assert os_problem(OSError()) == "OSError"
    with pytest.raises(OSError, match="missing") as error:
        (tmp_path / "missing").open()
    assert os_problem(error.value) == f"{tmp_path / 'missing'}: No such file or directory"
