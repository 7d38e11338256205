"""The whole comparison, with a stand-in for the commands it runs."""

import csv
import io
import json
import shlex
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from sparsemae.compare import compare
from sparsemae.errors import UserError

FILES = {"summary.json", "summary.csv", "report.html"} | {
    f"cd-{role}.{kind}" for role in ("development", "test") for kind in ("png", "svg")
}


@pytest.fixture
def run(suite_file, output, stand_in):
    def run(**options):
        console = Console(file=io.StringIO(), width=200)
        code = compare(suite_file, output, console=console, program=stand_in.program, **options)
        return code, console.file.getvalue()

    return run


def files(output):
    return {path.name for path in output.iterdir()} - {"runs", "stores", "jobs"}


def summary(output):
    return json.loads((output / "summary.json").read_text())


def test_from_a_suite_to_a_report_and_nothing_twice(run, output, stand_in):
    stand_in.plan(gain={"mae": 0.1})
    code, printed = run()
    assert (code, files(output), len(stand_in.calls)) == (0, FILES, 24)
    found = summary(output)
    assert (found["jobs"], found["missing"]) == ({"finished": 8}, [])
    for role in ("development", "test"):
        methods = found["blocks"][role]["methods"]
        assert methods["scratch"]["dice"]["value"] == pytest.approx(0.525)
        assert methods["mae"]["difference"]["value"] == pytest.approx(0.1)
        assert methods["mae"]["rank"]["value"] == 1
    assert "1 development set, 6 cases" in printed
    assert "1 test set, 6 cases" in printed
    assert printed.rstrip().endswith("report.html")
    rows = list(csv.DictReader((output / "summary.csv").open()))
    assert {row["dataset"] for row in rows} == {"stroke", "tumour", "mean of data sets"}
    assert "data:image/svg+xml;base64," in (output / "report.html").read_text()
    before = (output / "summary.json").read_bytes()
    stand_in.forget()
    assert run()[0] == 0
    assert stand_in.calls == []
    assert (output / "summary.json").read_bytes() == before


def test_a_failure_is_told_and_the_rest_is_compared(run, output, stand_in):
    stand_in.plan(fail=["stroke/mae/fold0-seed0:finetune", "stroke/mae/fold0-seed1:evaluate"])
    code, printed = run()
    assert code == 3
    assert "2 of 8 jobs failed" in printed
    found = summary(output)
    assert found["jobs"] == {"finished": 6, "failed": 2}
    assert set(found["blocks"]) == {"test"}
    assert any("stroke/mae/fold0-seed0" in line for line in found["missing"])
    assert "not finished: stroke/mae/fold0-seed0, stroke/mae/fold0-seed1" in printed
    assert "jobs failed" in (output / "report.html").read_text()


def test_a_list_of_commands_does_all_of_it(run, output, stand_in, tmp_path):
    run(only="0/8")
    listing = tmp_path / "jobs.txt"
    stand_in.forget()
    code, printed = run(listing=listing)
    lines = listing.read_text().splitlines()
    assert (code, len(lines), stand_in.calls) == (0, 7, [])
    assert "7 jobs" in printed
    for line in lines:
        assert files(output) == set()  # of parts there is no report
        words = shlex.split(line)
        assert words[: len(stand_in.program)] == list(stand_in.program)
        assert run(only=words[-1])[0] == 0
    assert files(output) == FILES  # but the last one writes it


def test_parts_say_how_to_get_a_report(run, output):
    code, printed = run(only="1/2")
    assert code == 0
    assert "4 of 8 jobs finished; for a report: sparsemae compare" in printed
    code, printed = run(report_only=True)
    assert code == 0
    assert files(output) >= {"summary.json", "report.html"}
    assert summary(output)["missing"][0] == "method scratch: no job is finished; it is left out"


def test_a_report_of_nothing(run, output, stand_in):
    with pytest.raises(UserError, match="no job is finished"):
        run(report_only=True)
    assert not output.exists()
    assert stand_in.calls == []


def test_folders_with_something_else_are_refused(run, output, stand_in):
    output.mkdir()
    (output / "thesis.txt").touch()
    with pytest.raises(UserError, match="holds no comparison: choose another -o"):
        run()
    (output / "thesis.txt").unlink()
    output.rmdir()
    output.touch()
    with pytest.raises(UserError, match="is a file: choose another -o"):
        run()
    assert stand_in.calls == []


def test_a_changed_method_is_refused_before_anything_runs(run, suite_file, stand_in):
    run()
    suite_file.write_text(suite_file.read_text().replace("train.steps=10", "train.steps=20"))
    stand_in.forget()
    with pytest.raises(UserError, match=r"stroke/mae/fold0-seed0 and 3 more: made with .* set;"):
        run()
    assert stand_in.calls == []


def test_a_method_that_is_added_is_all_that_runs(run, suite_file, output, stand_in):
    run()
    stand_in.forget()
    with suite_file.open("a") as file:
        file.write('\n[[methods]]\nname = "again"\ninit = "none"\n')
    assert run()[0] == 0
    assert {call[0].split("/")[1] for call in stand_in.calls} == {"again"}
    assert summary(output)["methods"] == ["scratch", "mae", "again"]


def test_a_stop_signal_reaches_the_command_and_ends_with_85(suite_file, output, stand_in):
    stand_in.plan(hang=["stroke/mae/fold0-seed0:finetune"])
    code = (
        "import sys; from pathlib import Path; from sparsemae.compare import compare\n"
        "from sparsemae.signals import stop_code\n"
        "with stop_code() as stop:\n"
        "    suite, output, *program = sys.argv[1:]\n"
        "    sys.exit(compare(Path(suite), Path(output), program=program, stop=stop))\n"
    )
    words = [sys.executable, "-c", code, str(suite_file), str(output), *stand_in.program]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    limit = time.monotonic() + 60
    while not (stand_in.folder / "hanging").exists():
        assert process.poll() is None
        assert time.monotonic() < limit
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    printed = process.communicate(timeout=30)[0]
    assert process.returncode == 85, printed
    assert "stopped as asked; the same command goes on" in printed
    assert (stand_in.folder / "signalled").exists()
    assert files(output) == set()
    record = json.loads((output / "jobs/stroke/mae/fold0-seed0/job.json").read_text())
    assert (record["state"], record["exit_code"], record["done"]) == ("stopped", 85, [])
