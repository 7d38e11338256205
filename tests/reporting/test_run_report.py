"""report.html: everything a run folder tells, and nothing that was not in it."""

import json
import re
import time

import pytest

from sparsemae.errors import UserError
from sparsemae.files import locked
from sparsemae.report import _span, write_run_report
from sparsemae.status import describe, read_status


def written(run):
    return write_run_report(run).read_text(encoding="utf-8")


def words(page):
    return re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", page, flags=re.S)


def test_the_page_tells_how_the_run_went(make_run, make_preview):
    page = written(make_run(preview=make_preview(), odd=[7], nan=[9]))
    text = " ".join(words(page).split())
    assert "finished · step 40 of 40 (100%) · ended" in text
    assert "0.35 best validation loss, step 40" in text
    assert "4 samples per second" in text
    assert "10.0% of the time waiting for data" in text
    assert "20 s in steps" in text
    assert "1 s waiting for checkpoints" in text
    assert "9 skipped not finite 2 case 9" in text
    assert "7 spike 0.6286 2 case 7" in text
    assert "model.preset tiny" in text
    assert page.count("<figcaption>") == 5 + 3
    assert "at step 40" in text


def test_the_page_stands_alone(make_run, make_preview):
    page = written(make_run(preview=make_preview()))
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert "http" not in page.replace("http-equiv", "")
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2]


EVIL = "<img src=x onerror=alert(1)>&\"'</script>"


def test_names_and_messages_are_text_and_nothing_else(make_run, make_preview):
    run = make_run("a <b>&", preview=make_preview(cases=(EVIL, "b")), message=EVIL, state="failed")
    (run / "config.toml").write_text(f"seed = {json.dumps(EVIL)}\n[data]\n{json.dumps(EVIL)} = 1\n")
    event = {"time": EVIL, "step": 1, "event": EVIL, "message": EVIL}
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps(event) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 41, "loss": EVIL, "spike": True, "cases": [EVIL]}) + "\n")
    page = written(run)
    assert "<img" not in page
    assert page.count("</script>") == 2  # of the volumes and of the viewer
    assert page.count("&lt;img src=x onerror=alert(1)&gt;") >= 6


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "timing.jsonl", "history.jsonl", "status.json", "preview.npz"]
)
@pytest.mark.parametrize("harm", ["gone", "empty", "cut", "binary", "other"])
def test_a_damaged_or_missing_file_costs_its_part_only(make_run, make_preview, name, harm):
    run = make_run(preview=make_preview())
    file = run / name
    data = file.read_bytes()
    if harm == "gone":
        file.unlink()
    else:
        file.write_bytes(
            {"empty": b"", "cut": data[:-7], "binary": b"\xff\x00" * 50, "other": b"[1, 2]\n"}[harm]
        )
    page = written(run)
    assert "model.preset" in page
    if name != "metrics.jsonl":
        assert "3.2" in page or "polyline" in page
    if name == "preview.npz":
        assert ("No volumes to show yet" if harm == "gone" else "npz is damaged") in page


ODD = [None, True, -1, 0, 1e400, 10**30, "x", EVIL, [], [1], {"step": 1}, {}, "\ud800", 1e300]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
def test_no_value_of_another_kind_breaks_page_or_status(make_run, value):
    run = make_run(odd=[7])
    status = json.loads((run / "status.json").read_text())
    for key in status:
        (run / "status.json").write_text(json.dumps(status | {key: value}))
        assert_told(run)
    (run / "status.json").write_text(json.dumps(dict.fromkeys(status, value)))
    assert_told(run)
    for name in ("metrics", "timing", "history"):
        file = run / f"{name}.jsonl"
        text = file.read_text()
        kinds = {frozenset(json.loads(line)): json.loads(line) for line in text.splitlines()}
        for line in kinds.values():
            file.write_text(text + "".join(json.dumps(line | {k: value}) + "\n" for k in line))
            assert_told(run)
        file.write_text("".join(json.dumps(line | {k: value}) + "\n" for k in line))
        assert_told(run)


def assert_told(run):
    page = written(run)
    assert "model.preset" in page
    assert "<img" not in page
    assert describe(read_status(run)).startswith(f"{run}: ")


def test_a_run_that_was_killed_is_not_said_to_run(make_run):
    run = make_run(state="running", steps=400, started=1.7e9 - 100, updated=1.7e9)
    (run / "status.json").write_text(
        (run / "status.json").read_text().replace('"steps": 400', '"steps": 800')
    )
    text = " ".join(words(written(run)).split())
    assert "killed · step 400 of 800 (50%) · ended" in text
    assert "8 min since the first start" in text  # to the last line of a log
    with locked(run / ".lock", busy=""):
        text = " ".join(words(written(run)).split())
    assert re.search(r"running · step 400 of 800 \(50%\) · 3 min left", text)


def test_of_many_odd_steps_the_newest_are_listed_and_all_are_marked(make_run):
    page = written(make_run(steps=1000, odd=range(100, 1001, 10), nan=[1000]))
    text = " ".join(words(page).split())
    assert "The last 20 of 91, newest first" in text
    assert "1,000 skipped not finite" in text
    assert "810 spike" in text
    assert "800 spike" not in text
    chart = page[page.index('aria-label="loss"') :].partition("</svg>")[0]
    assert chart.count('<line class="spike"') == 90
    assert chart.count('<line class="skipped"') == 1


def test_cases_of_a_large_batch_are_bounded(make_run):
    run = make_run()
    line = {"step": 41, "loss": 9.0, "lr": 1.0, "grad_norm": 1.0, "spike": True}
    line["cases"] = [f"case {i}" for i in range(1000)]
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    text = words(written(run))
    assert "case 0, and 999 more" in text
    assert "case 63" in text
    assert "case 64" not in text
    assert "and 936 others" in text


def test_losses_that_are_never_finite_leave_a_page(make_run):
    page = written(make_run(nan=range(1, 41)))
    assert "loss, mean" not in page
    assert "The last 20 of 40" in page
    chart = page[page.index('aria-label="loss"') :].partition("</svg>")[0]  # of the validation
    assert chart.count('<line class="skipped"') == 40


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0, "0 s"),
        (1.234, "1.23 s"),
        (119, "119 s"),
        (120, "2 min"),
        (7169, "119 min"),
        (7171, "2 h 0 min"),
        (65_645, "18 h 14 min"),
        (170_000, "47 h 13 min"),
        (172_800, "2 d 0 h"),
        (1e99, "11574 d 2 h"),
    ],
)
def test_times_are_told_in_units_that_fit(seconds, said):
    assert _span(seconds) == said


def test_a_run_that_has_just_begun_has_a_page(make_run):
    run = make_run()
    for path in run.iterdir():
        if path.name != "config.toml":
            path.unlink()
    page = written(run)
    assert page.count("Nothing yet.") == 5
    assert "unknown" in page


def test_a_folder_without_a_run_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"no run there \(no config\.toml\); start one with"):
            write_run_report(folder)


def test_the_page_of_a_long_run_is_no_larger_and_takes_seconds(make_run):
    run = make_run(steps=250_000, odd=range(1000, 200_000, 50), nan=range(1001, 200_000, 50))
    start = time.process_time()
    page = written(run)
    assert len(page) < 400_000
    assert time.process_time() - start < 30
