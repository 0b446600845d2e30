"""Entry point of the `perseus` command, which says what to install where a package that it needs is missing."""

from __future__ import annotations

import gc
import os
import sys

from perseus_plugin.cli.encoding import speak_ascii_where_needed
from perseus_plugin.errors import PerseusError, lacking, os_problem
from perseus_plugin.planning.solvers import ending_on_ctrl_c

_ALLOCATIONS = 50_000  # between two looks for garbage: loading what a command needs leaves none


def run() -> None:
    """Run the command; an error meant for the user becomes one line on stderr and exit status 2, Ctrl-C status 130."""
    gc.set_threshold(_ALLOCATIONS, *gc.get_threshold()[1:])
    # No other package has a say in what we validate, and looking for one that wants to reads what every package says.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    speak_ascii_where_needed()
    with ending_on_ctrl_c() as interrupted:
        try:
            from perseus_plugin.cli.app import app

            app(prog_name="perseus")
            return
        except KeyboardInterrupt:
            sys.exit(130)
        except (PerseusError, OSError) as error:
            said = os_problem(error) if isinstance(error, OSError) else str(error)
        except ModuleNotFoundError as error:
            said = f"this command cannot be run: {lacking(error)}"
        if interrupted():  # nothing else is wrong
            sys.exit(130)
    print(f"perseus: {said}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    run()
