from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import pytest

from perseus_plugin.reporting import report
from tests.cli.commands import Perseus
from tests.reporting.job import Job

DOCS = Path(__file__).parents[2] / "docs"
NOT_IN_A_REPORT = {"losses", "clocks in `nvidia-smi`", "after the job's end"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Job(tmp_path_factory.mktemp("job") / "out").planned().finished().folder


def test_a_report_is_printed_and_written_into_the_folder(perseus: Perseus, folder: Path) -> None:
    done = perseus("report", str(folder), "--price", "0.1", "--gpus", "1024", "--hours", "1000")
    assert done.returncode == 0, done.stderr
    for text in ("2 × test GPU", "energy saved", "1,000 hours on 1,024", "USD", "Emulated: GPU times", "11: profiled"):
        assert text in done.stdout, text
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert "missing" not in done.stdout


def looked_for() -> set[str]:
    """What docs/first-day.md and docs/troubleshooting.md tell a reader to look for in a report."""
    first_day = (DOCS / "first-day.md").read_text()
    tables = re.findall(r"perseus report OUTPUT_DIR.*?\n\| look at .*?\n\|[-|]+\n(.*?)\n\n", first_day, re.DOTALL)
    rows = [row.split("|")[1].strip() for table in tables for row in table.splitlines()]
    names = {re.sub(r",( predicted,)? with its interval$", "", row) for row in rows} - NOT_IN_A_REPORT
    return names | set(re.findall(r"\*([^*\n]+)\* in the report", (DOCS / "troubleshooting.md").read_text()))


def test_what_the_docs_say_to_look_for_in_a_report_is_in_its_text_and_on_its_page(
    perseus: Perseus, tmp_path: Path
) -> None:
    folder = Job(tmp_path / "out").planned().finished().folder
    summary = json.loads((folder / "summary.json").read_text())
    summary["beside"] = {"time_s": 0.01, "percent": 5.0, "transfer_s": 0.001, "once_s": 0.002}
    (folder / "summary.json").write_text(json.dumps(summary))
    done = perseus("report", folder, "--no-frontier")
    assert done.returncode == 0, done.stderr
    names = looked_for()
    assert names >= {"hooks took", "slowdown, as run", "energy saved, as run", "what happened"}
    page = (folder / "report.html").read_text()
    for said in (done.stdout, page.partition("</head>")[2] or page):
        text = " ".join(said.split()).lower()
        # A name with a comma is a row's and a column's of the table where it is no figure of its own.
        lacking = [name for name in names if name not in text and not all(part in text for part in name.split(", "))]
        assert lacking == []


def test_what_the_docs_say_of_a_report_has_the_reports_words() -> None:
    about = re.sub(r"(?m)^\*.*\*$", "", (DOCS / "report.md").read_text())  # captions of pictures
    names = re.findall(r"(?<!\*)\*([a-zA-Z][^*\n]+)\*(?!\*)", about)
    words = " ".join(file.read_text() for file in Path(report.__file__).parent.glob("*.py")).lower()
    assert len(names) > 8
    assert [name for name in names if name.lower() not in words] == []


def test_the_figures_are_data_too(perseus: Perseus, folder: Path) -> None:
    done = perseus("report", folder, "--no-html", "--json", "--price", "0.1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["schema"], told["version"], told["state"]) == ("perseus-report", 1, "finished")
    assert told["summary"] == json.loads((folder / "summary.json").read_text())
    assert 0 < told["per_iteration"]["plan_j"] < told["per_iteration"]["full_j"]
    assert [one["hours"] for one in told["projections"]] == [24.0, 8760.0]


def test_the_page_goes_where_it_is_told(perseus: Perseus, folder: Path, tmp_path: Path) -> None:
    done = perseus("report", str(folder), "--html", str(tmp_path / "page.html"), "--no-frontier")
    assert done.returncode == 0, done.stderr
    assert 'id="frontier"' not in (tmp_path / "page.html").read_text()


def test_no_page_on_request(perseus: Perseus, tmp_path: Path) -> None:
    folder = Job(tmp_path / "out").profiled().finished().folder
    done = perseus("report", str(folder), "--no-html")
    assert done.returncode == 0, done.stderr
    assert not (folder / "report.html").exists()
    assert "missing: plan.json is not there" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "{empty}"], "is no output folder of perseus"),
        (["report", "{empty}/nowhere"], "is no folder"),
        (["report", "{job}", "--pue", "0.5"], "--pue: got 0.5; allowed: a number from 1 to 10"),
        (["report", "{job}", "--price", "-1"], "--price: got -1.0"),
        (["report", "{job}", "--gpus", "0"], "--gpus: got 0"),
        (["report", "{job}", "--html", "x.html", "--no-html"], "allowed: one of them"),
        (["report", "{job}", "--html", "x.html", "--serve", "0"], "allowed: one of them"),
        (["report", "{job}", "--json", "--serve", "0"], "allowed: one of them"),
        (["report", "{job}", "--serve", "-1"], "--serve: got -1"),
        (["report", "{empty}/nowhere", "--serve", "0"], "is no folder"),
        (["trace", "{empty}"], "is no output folder of perseus"),
        (["report", "{broken}"], "plan.json: "),
        (["report", "{full}"], "report.html, which is a folder; allowed: a file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    perseus: Perseus, folder: Path, tmp_path: Path, arguments: Sequence[str], message: str
) -> None:
    broken, empty, full = tmp_path / "broken", tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    broken.mkdir()
    (full / "report.html").mkdir(parents=True)
    (broken / "plan.json").write_text('{"schema": "perseus-plan", "vers')
    filled = [argument.format(empty=empty, job=folder, broken=broken, full=full) for argument in arguments]
    done = perseus(*filled)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_trace_is_written(perseus: Perseus, folder: Path, tmp_path: Path) -> None:
    done = perseus("trace", str(folder), "-o", str(tmp_path / "trace.json"))
    assert done.returncode == 0, done.stderr
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert f"{len(events)} events of 2 ranks" in done.stdout


def test_a_trace_of_nothing_is_refused(perseus: Perseus, tmp_path: Path) -> None:
    job = Job(tmp_path / "out", silent=(0, 1)).planned().finished()
    for state, more in (("finished", ""), ("running", " (yet)")):
        job.summarise(state)
        done = perseus("trace", str(job.folder), "-o", str(tmp_path / "trace.json"))
        assert done.returncode == 2
        assert f"no iteration was kept whole{more}, so there is nothing to trace" in done.stderr
    facts = {"training step": "one CUDA graph"}
    graphed = Job(tmp_path / "graphed", silent=(1,), facts=facts).planned(0).finished().folder
    (graphed / "records" / "rank-0.samples.json").unlink(missing_ok=True)
    done = perseus("trace", str(graphed), "-o", str(tmp_path / "trace.json"))
    assert "in which no instruction is seen, so there is nothing to trace" in done.stderr
    assert not (tmp_path / "trace.json").exists()


def test_a_page_is_served_until_ctrl_c(folder: Path) -> None:
    # Whoever started the tests may have had signals ignored.
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    program = f"{heard}; from perseus_plugin.cli.main import run; run()"
    command = [sys.executable, "-c", program, "report", str(folder), "--serve", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        found = re.fullmatch(r"following .*out at (http://127\.0\.0\.1:\d+/) until Ctrl-C\n", said)
        assert found is not None, said
        with urllib.request.urlopen(found[1], timeout=300) as answer:
            assert b"Pipeline timeline" in answer.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == -signal.SIGINT
