"""What a comparison writes: JSON, CSV, tables and a page."""

import csv
import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from sparsemae.comparison.scores import Collected, DatasetScores
from sparsemae.comparison.suite import read_suite
from sparsemae.comparison.summary import MEAN, as_csv, as_data, blocks, order, tables
from sparsemae.comparison.webpage import draw_page

GAIN = {"scratch": 0.0, "mae": 0.1}


def scores(name, role, level, cases=8):
    base = level + 0.01 * np.arange(cases)[None, :, None] + np.zeros((1, 1, 2))
    dice = np.concatenate([base, base + 0.1])
    runs = ((0, 0), (0, 1))
    names = tuple(str(i) for i in range(cases))
    return DatasetScores(name, role, ("scratch", "mae"), names, runs, dice)


@pytest.fixture
def collected():
    datasets = (
        scores("a", "development", 0.2),
        scores("b", "test", 0.4),
        scores("c", "test", 0.6, cases=4),
    )
    return Collected(("scratch", "mae"), datasets, ("not finished: x/<y>/z",))


def test_roles_are_never_pooled(collected):
    development, test = blocks(collected)
    assert [d.name for d in development.datasets] == ["a"]
    assert [d.name for d in test.datasets] == ["b", "c"]
    assert development.statistics.mean_dice[0].value == pytest.approx(0.235)
    assert test.statistics.mean_dice[0].value == pytest.approx((0.435 + 0.615) / 2)
    assert [len(block.statistics.dice) for block in (development, test)] == [1, 2]
    assert [len(list(tables(block))) for block in (development, test)] == [2, 2]


def test_data_hold_every_number(collected):
    data = json.loads(json.dumps(as_data("heads", blocks(collected), collected), allow_nan=False))
    assert (data["baseline"], data["missing"]) == ("scratch", ["not finished: x/<y>/z"])
    test = data["blocks"]["test"]
    mae = test["methods"]["mae"]
    assert mae["dice"]["value"] == pytest.approx(0.625)
    assert mae["difference"] == pytest.approx({"value": 0.1, "low": 0.1, "high": 0.1})
    assert mae["rank"]["value"] == 1
    (pair,) = test["pairs"]
    assert (pair["first"], pair["second"]) == ("scratch", "mae")
    assert pair["difference"] == pytest.approx(0.1)
    assert pair["adjusted"] == pair["p"] < 0.01
    assert test["groups"] == []
    assert (test["datasets"]["c"]["cases"], test["cases"]) == (4, 12)
    assert test["datasets"]["c"]["seeds"] == [0, 1]
    assert test["datasets"]["c"]["methods"]["scratch"]["rank"] == 2


def test_a_csv_row_per_data_set_and_method(collected):
    rows = list(csv.DictReader(io.StringIO(as_csv(blocks(collected)))))
    assert len(rows) == 3 * 2 + 2 * 2
    row = next(r for r in rows if (r["dataset"], r["method"]) == ("c", "mae"))
    assert (row["block"], row["cases"], row["folds"], row["seeds"]) == ("test", "4", "1", "2")
    assert float(row["dice"]) == pytest.approx(0.715)
    assert float(row["dice_low"]) < 0.715 < float(row["dice_high"])
    assert (float(row["difference"]), row["rank"]) == (pytest.approx(0.1), "1")
    means = [r for r in rows if r["dataset"] == MEAN]
    assert [(r["block"], r["method"]) for r in means][-1] == ("test", "mae")
    assert float(means[-1]["rank_high"]) == 1


def test_tables_put_the_best_first(collected):
    development, test = blocks(collected)
    assert order(test) == [1, 0]
    console = Console(file=io.StringIO(), width=120)
    for table in tables(test):
        console.print(table)
    printed = console.file.getvalue()
    assert printed.index("│ mae ") < printed.index("│ scratch ")
    assert re.search(
        r"mae .*62\.50 \[.*1\.00 \[1\.00, 1\.00\].*\+10\.00 \[\+10\.00, \+10\.00\]", printed
    )
    assert re.search(r"c .*4 .*61\.50 .*71\.50", printed)
    assert "2 test sets, 12 cases" in printed
    assert "1 development set, 8 cases" in next(iter(tables(development))).title


def test_the_page_stands_alone_and_tells_both_blocks(collected, suite_file):
    suite = read_suite(suite_file)
    found = blocks(collected)
    diagrams = {block.role: b"<svg/>" for block in found}
    html = draw_page(suite, {"finished": 7, "failed": 1}, found, collected, diagrams)
    development, test = html.index("<h2>Development sets"), html.index("<h2>Test sets")
    assert development < test
    assert "62.50 [" not in html[development:test]
    assert "62.50 [" in html[test:]
    assert "x/&lt;y&gt;/z" in html
    assert "<y>" not in html
    assert "7 / 8" in html
    assert "http" not in html.replace("http-equiv", "")
    assert "<script" not in html
    assert not re.search(r'src="(?!data:)', html)
    assert "One seed" not in html


def test_one_seed_is_said(collected, suite_file):
    few = tuple(
        DatasetScores(d.name, d.role, d.methods, d.cases, d.runs[:1], d.dice[..., :1])
        for d in collected.datasets
    )
    found = blocks(Collected(collected.methods, few, ()))
    diagrams = {block.role: b"<svg/>" for block in found}
    html = draw_page(read_suite(suite_file), {"finished": 8}, found, collected, diagrams)
    assert "One seed" in html


def test_nothing_to_compare_is_a_page_that_says_so(suite_file):
    nothing = Collected(("mae",), (), ("data set a: no fold and seed that all methods have",))
    assert blocks(nothing) == []
    html = draw_page(read_suite(suite_file), {"finished": 1}, [], nothing, {})
    assert "no fold and seed that all methods have" in html
    assert as_data("x", [], nothing)["blocks"] == {}
