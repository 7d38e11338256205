"""report.html: everything a run folder tells, and nothing that was not in it."""

import json
import re
import time

import pytest

from sparsemae.errors import UserError
from sparsemae.report import write_run_report


def written(run):
    return write_run_report(run).read_text(encoding="utf-8")


def words(page):
    return re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", page, flags=re.S)


def test_the_page_tells_how_the_run_went(make_run, make_preview):
    page = written(make_run(preview=make_preview(), odd=[7], nan=[9]))
    text = " ".join(words(page).split())
    assert "finished step 40 of 40" in text
    assert "0.3500 best validation, step 40" in text
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
        assert "No volumes to show yet" in page


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
