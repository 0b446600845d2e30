"""The README's table and pictures, all of one run: `make readme-figures` runs the quickstart and then this.

python benchmarks/readme_figures.py out/quickstart

writes docs/images/timeline.png and docs/images/report*.png, puts the table into README.md, and prints it.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from perseus_plugin.errors import PerseusError
from perseus_plugin.files import write_atomically
from perseus_plugin.reporting.report.findings import find
from perseus_plugin.reporting.report.folder import JobFolder, load_folder
from perseus_plugin.reporting.report.page import page
from perseus_plugin.reporting.report.phrases import comparison
from perseus_plugin.reporting.report.timeline import draw_timeline

SHOTS = {
    "report.png": ("1280,1600", False),
    "report-dark.png": ("1280,1600", True),
    "report-narrow.png": ("500,1600", False),
}
"""Window in pixels, the wide ones from the top of a report to the end of its timeline; and whether it is dark."""
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
TABLE = re.compile(r"^\| per iteration \|.*\n(?:\|.*\n)+", flags=re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder of the quickstart")
    parser.add_argument("--to", type=Path, default=Path(__file__).parents[1], help="repository to write to")
    options = parser.parse_args()
    try:
        write(options.folder, options.to)
    except PerseusError as error:
        sys.exit(str(error))


def write(folder: Path, to: Path) -> None:
    """Write the pictures and the table.

    Args:
        folder: output folder of a job whose plan was measured.
        to: a repository, with README.md and docs/images.
    """
    job = load_folder(folder)
    rows = comparison(job)
    if job.summary is None or job.summary.saving_percent.measured is None:
        sys.exit(
            f"{folder}: no iteration under the plan was measured. Leave the machine alone, or run longer: STEPS=150"
        )
    readme = to / "README.md"
    text, count = TABLE.subn(markdown(rows), readme.read_text())
    if count != 1:
        sys.exit(f"{readme}: {count} tables begin with '| per iteration |'; there has to be one")
    images = to / "docs" / "images"
    timeline = images / "timeline.png"
    # All is made before anything is written: it is of one run, or none of it is.
    made = {timeline: draw_timeline(folder, timeline)}
    made |= {images / name: screenshot(job, *how) for name, how in SHOTS.items()}
    for picture, drawn in made.items():
        write_atomically(picture, drawn)
    write_atomically(readme, text)
    print(markdown(rows), end="")


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    head, *body = [f"| {' | '.join(row)} |".replace("|  |", "| |") + "\n" for row in rows]
    return head + "|" + "---|" * len(rows[0]) + "\n" + "".join(body)


def screenshot(job: JobFolder, window: str, dark: bool) -> bytes:
    """The upper part of the job's report, as a browser on a desk shows it in a window of that size."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        sys.exit("there is no Chromium (Debian: apt-get install chromium)")
    report, shot = job.path / "report.html", job.path / "report.png"
    write_atomically(report, page(find(job)))
    subprocess.run(
        [
            browser,
            *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=30000"),
            # There is a pointer that hovers, as on a desk; a headless browser has none.
            "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4,"
            f"preferredColorScheme={0 if dark else 1}",
            f"--window-size={window}",
            f"--screenshot={shot.resolve()}",
            report.resolve().as_uri(),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        timeout=300,
    )
    return shot.read_bytes()


if __name__ == "__main__":
    main()
