"""Statistics, the files of an evaluation, and the folder they go to."""

import csv
import io
import json
import math
import re

import pytest
from rich.console import Console

from sparsemae.errors import UserError
from sparsemae.evaluation.metrics import Score
from sparsemae.evaluation.summary import (
    CaseScores,
    ScoredClass,
    Summary,
    check_output,
    read_summary,
    write_summary,
)
from sparsemae.evaluation.table import class_table
from sparsemae.files import write_atomically

NAN = math.nan


def score(label, dice, nsd, hd95, prediction_ml=1.0, reference_ml=1.0):
    values = {"prediction_ml": prediction_ml, "reference_ml": reference_ml}
    return Score(label=label, dice=dice, nsd=nsd, hd95=hd95, **values)


def absent(label):
    return score(label, NAN, NAN, NAN, 0.0, 0.0)


@pytest.fixture
def summary():
    """Three cases; the first class is missed once and absent once, the third absent everywhere."""
    classes = ((1, "liver, left", 1.0), (5, "[red]5[/red]", 2.0), (6, "none", 2.0))
    cases = {
        "a": (score(1, 0.8, 0.9, 2.0), score(5, 0.5, 0.25, 4.0)),
        "b": (score(1, 0.0, 0.0, 100.0, 0.0, 2.5), score(5, 0.7, 0.75, 1.0)),
        "c": (absent(1), score(5, 0.0, 0.0, 100.0, 3.5, 0.0)),
    }
    return Summary(
        classes=tuple(ScoredClass(label=i, name=n, tolerance_mm=t) for i, n, t in classes),
        ignore=7,
        cases=tuple(CaseScores(case=c, scores=(*s, absent(6))) for c, s in cases.items()),
    )


def test_statistics_of_classes(summary):
    liver, five, none = summary.class_statistics()
    assert (liver.scored, liver.absent, liver.missed, liver.spurious) == (2, 1, 1, 0)
    assert (five.scored, five.absent, five.missed, five.spurious) == (3, 0, 0, 1)
    assert (none.scored, none.absent, none.missed, none.spurious) == (0, 3, 0, 0)
    assert (liver.label, liver.name) == (1, "liver, left")
    assert liver.dice.mean == pytest.approx(0.4)
    assert liver.dice.std == pytest.approx(0.8 / math.sqrt(2))  # of a sample
    assert liver.hd95.median == pytest.approx(51.0)
    assert five.dice.mean == pytest.approx(0.4)
    assert five.dice.median == pytest.approx(0.5)
    assert five.nsd.mean == pytest.approx(1 / 3)
    assert five.hd95.mean == pytest.approx(35.0)
    assert all(map(math.isnan, none.dice.model_dump().values()))


def test_means_leave_out_what_is_nan(summary):
    means = summary.means()
    assert means.dice == pytest.approx((0.4 + 0.4) / 2)
    assert means.nsd == pytest.approx((0.45 + 1 / 3) / 2)
    assert means.hd95 == pytest.approx((51.0 + 35.0) / 2)
    assert summary.case_means() == pytest.approx({"a": 0.65, "b": 0.35, "c": 0.0})
    assert summary.case_means("hd95") == pytest.approx({"a": 3.0, "b": 50.5, "c": 100.0})
    bare = Summary(
        classes=summary.classes[:1],
        ignore=None,
        cases=(CaseScores(case="a", scores=(absent(1),)),),
    )
    assert math.isnan(bare.case_means()["a"])
    assert math.isnan(bare.means().dice)


def test_one_case_has_no_deviation(summary):
    one = summary.model_copy(update={"cases": summary.cases[:1]})
    liver, *_ = one.class_statistics()
    assert (liver.dice.mean, liver.dice.median) == (0.8, 0.8)
    assert math.isnan(liver.dice.std)


def test_the_record_is_plain_json_and_comes_back(summary, tmp_path):
    write_summary(summary, tmp_path / "new" / "out")
    file = tmp_path / "new" / "out" / "metrics.json"

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    record = json.loads(file.read_bytes(), parse_constant=refuse)
    assert record["cases"]["a"]["5"] == {
        **{"label": 5, "dice": 0.5, "nsd": 0.25, "hd95": 4.0},
        **{"prediction_ml": 1.0, "reference_ml": 1.0},
    }
    assert record["cases"]["c"]["1"]["dice"] is None
    assert record["classes"][0] == {"label": 1, "name": "liver, left", "tolerance_mm": 1.0}
    assert record["per_class"][2]["dice"] == {"mean": None, "median": None, "std": None}
    assert record["mean"]["dice"] == pytest.approx(0.4)
    assert record["ignore"] == 7
    assert set(record["definitions"]) == {"dice", "nsd", "hd95", "absent"}
    for path in (file, file.parent):
        back = read_summary(path)
        assert back.model_dump_json() == summary.model_dump_json()
        assert math.isnan(back.cases[2].scores[0].dice)


def test_the_table_has_a_row_per_case_and_class(summary, tmp_path):
    write_summary(summary, tmp_path)
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 9
    assert rows[0] == {
        **{"case": "a", "label": "1", "class": "liver, left", "dice": "0.8", "nsd": "0.9"},
        **{"hd95": "2", "prediction_ml": "1", "reference_ml": "1"},
    }
    assert [row["dice"] for row in rows] == ["0.8", "0.5", "", "0", "0.7", "", "", "0", ""]
    assert rows[3]["reference_ml"] == "2.5"


def test_what_is_no_record_is_refused(summary, tmp_path):
    with pytest.raises(UserError, match=r"metrics.json: No such file.*evaluate -o writes it"):
        read_summary(tmp_path)
    file = tmp_path / "metrics.json"
    write_summary(summary, tmp_path)
    whole = file.read_text()
    swapped = json.loads(whole)
    swapped["classes"].reverse()
    numbers = whole.replace('"dice": null', '"dice": NaN')
    assert numbers != whole
    other = whole.replace("evaluation 1", "evaluation 2")
    for text in ("", "{}", whole[:-9], other, numbers):
        file.write_text(text)
        with pytest.raises(UserError, match=r"metrics.json: no record of sparsemae evaluate"):
            read_summary(file)
    file.write_text(json.dumps(swapped))
    with pytest.raises(UserError, match="no record"):
        read_summary(file)


def test_only_an_earlier_evaluation_is_replaced(summary, tmp_path):
    out = tmp_path / "out"
    check_output(out)
    out.mkdir()
    check_output(out)
    write_summary(summary, out)
    (out / "metrics.json.0a1b2c3d.tmp").touch()  # left by a killed process
    check_output(out)
    fewer = summary.model_copy(update={"cases": summary.cases[:1]})
    write_summary(fewer, out)
    assert sorted(path.name for path in out.iterdir()) == ["metrics.csv", "metrics.json"]
    assert len(read_summary(out).cases) == 1
    assert len((out / "metrics.csv").read_text().splitlines()) == 4
    (out / "notes.txt").touch()
    with pytest.raises(UserError, match=r"out holds notes.txt, not from an evaluation"):
        check_output(out)
    (out / "notes.txt").unlink()
    (out / "metrics.json").write_text('{"mine": 1}')
    with pytest.raises(UserError, match=r"out holds no evaluation of sparsemae"):
        check_output(out)
    with pytest.raises(UserError, match=r"metrics.json is a file"):
        check_output(out / "metrics.json")


def test_a_disk_that_fills_leaves_no_table_of_another_record(summary, tmp_path, monkeypatch):
    write_summary(summary, tmp_path)
    room = []

    def full(path, data):
        if path.name not in room:
            raise OSError(28, "No space left on device", str(path))
        write_atomically(path, data)

    monkeypatch.setattr("sparsemae.evaluation.summary.write_atomically", full)
    fewer = summary.model_copy(update={"cases": summary.cases[:1]})
    for cases in (3, 1):
        with pytest.raises(OSError, match="No space"):
            write_summary(fewer, tmp_path)
        assert len(read_summary(tmp_path).cases) == cases
        assert [path.name for path in tmp_path.iterdir()] == ["metrics.json"]
        check_output(tmp_path)
        room.append("metrics.json")


def shown(summary, width=90):
    console = Console(width=width, file=io.StringIO())
    console.print(class_table(summary))
    return [re.split(r" {2,}", line.strip()) for line in console.file.getvalue().splitlines()]


def test_the_console_shows_every_class_as_it_is_named(summary):
    assert [row for row in shown(summary) if len(row) > 1] == [
        ["class", "Dice", "NSD", "HD95, mm", "cases", "missed", "spurious"],
        ["liver, left (1)", "0.400 ± 0.566", "0.450 ± 0.636", "51.0 ± 69.3", "2/3", "1", "0"],
        ["[red]5[/red] (2)", "0.400 ± 0.361", "0.333 ± 0.382", "35.0 ± 56.3", "3/3", "0", "1"],
        ["none (2)", "-", "-", "-", "0/3", "0", "0"],
        ["mean", "0.400", "0.392", "43.0"],
    ]
    narrow = ["liver,", "0.400 ± 0.566", "0.450 ± 0.636", "51.0 ± 69.3", "2/3", "1", "0"]
    assert narrow in shown(summary, width=80)


def test_a_tolerance_of_all_is_in_the_heading(summary):
    cases = (CaseScores(case=c.case, scores=c.scores[1:2]) for c in summary.cases[:2])
    one = summary.model_copy(update={"classes": summary.classes[1:2], "cases": tuple(cases)})
    assert ["class", "Dice", "NSD, 2 mm", "HD95, mm", "cases"] in shown(one)
