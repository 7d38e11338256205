"""The index of a store and what is behind it."""

import dataclasses
import json
import os
import pickle
import shutil
import time
import tracemalloc

import numpy as np
import pytest

from sparsemae.data.options import FilterConfig, PreprocessConfig
from sparsemae.data.store import Case, Store, case_from, write_index
from sparsemae.data.storing import stored
from sparsemae.errors import UserError

SHAPE = (70, 33, 20)


def volume(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def store(tmp_path, make_store):
    arrays = {f"case{i}": volume(i) for i in (1, 0)}
    return make_store(tmp_path / "store", arrays, {"case0": volume(0) > 1})


def test_what_was_written_is_read(store):
    assert len(store) == 2
    assert [case.id for case in store.cases] == ["case0", "case1"]
    for i, case in enumerate(store.cases):
        assert np.array_equal(store.read(case), volume(i)[None].astype(np.float16))
        got = store.read_box(case, (3, 4, 5), (70, 33, 9))
        assert np.array_equal(got, volume(i)[None, 3:, 4:, 5:9].astype(np.float16))


def test_masks_are_bool_and_empty_where_there_is_none(store):
    box = (10, 0, 0), (40, 33, 20)
    got = store.read_box(store.cases[0], *box, "excluded")
    assert got.dtype == bool
    assert np.array_equal(got, volume(0)[None, 10:40] > 1)
    none = store.read_box(store.cases[1], *box, "excluded")
    assert none.dtype == bool
    assert none.shape == (1, 30, 33, 20)
    assert not none.any()


@pytest.mark.parametrize("kind", ["image", "excluded"])
@pytest.mark.parametrize(
    ("start", "stop"), [((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (2, 2, 21)), ((3, 0, 0), (3, 2, 2))]
)
def test_a_box_outside_is_refused(store, start, stop, kind):
    for case in store.cases:
        with pytest.raises(ValueError, match=rf"{case.id}: box"):
            store.read_box(case, start, stop, kind)


def test_a_case_survives_the_index_and_json(store, make_case):
    case = make_case(
        store.path,
        "naïve \"quoted\" 'id', a\\b",
        volume(3),
        volume(3) > 0,
        spacing=(0.7, np.float64(1) / 3, 1e-3),
        shape=tuple(np.array(SHAPE)),  # numpy's numbers
        subject='", "split": "val"',
        split="val",
        warnings=("geometry.none", "intensity.nan"),
        foreground="abc",
    )
    write_index(store.path, [case, *store.cases], PreprocessConfig(filter=FilterConfig()))
    again = Store.open(store.path)
    assert again.cases[2] == case
    assert isinstance(again.cases[2].shape[0], int)
    assert hash(again.cases[2]) == hash(case)
    assert again.config == PreprocessConfig(filter=FilterConfig())
    assert case_from(json.loads(json.dumps(dataclasses.asdict(again.cases[2])))) == case
    assert np.array_equal(again.read(case), volume(3)[None].astype(np.float16))


def test_the_index_is_json_with_a_line_per_case(store):
    text = (store.path / "index.json").read_text()
    index = json.loads(text)
    assert index["format"] == "sparsemae-store"
    assert index["version"] == 2
    assert index["fingerprint"] == store.fingerprint
    assert PreprocessConfig.model_validate_json(json.dumps(index["config"])) == store.config
    lines = [json.loads(s.rstrip(",")) for s in text.splitlines() if s.startswith('{"id"')]
    assert lines == index["cases"]
    assert [case_from(line) for line in lines] == list(store.cases)


def test_views(store):
    cases = store.cases
    assert cases[-1].id == "case1"
    assert [case.id for case in cases[::-1]] == ["case1", "case0"]
    assert [case.id for case in cases.take(np.array([1, 1]))] == ["case1", "case1"]
    with pytest.raises(IndexError):
        cases[2]


def test_splits(store, make_case):
    cases = [
        dataclasses.replace(
            store.cases[0], id=f"c{i}", subject='"split": "val"', split=["train", "val"][i % 3 == 0]
        )
        for i in range(7)
    ]
    write_index(store.path, cases, store.config)
    whole = Store.open(store.path)
    train, val = whole.split("train"), whole.split("val")
    assert [case.id for case in val.cases] == ["c0", "c3", "c6"]
    assert [case.id for case in train.cases] == ["c1", "c2", "c4", "c5"]
    assert {case.split for case in train.cases} == {"train"}
    assert len(train.split("val")) == 0
    assert len(val.split("val")) == 3
    assert train.fingerprint == val.fingerprint == whole.fingerprint


def test_an_opened_store_needs_no_index_any_more(store):
    """As a loader worker gets it, while `preprocess` writes another index."""
    data = pickle.dumps(store.split("train"))
    (store.path / "index.json").unlink()
    copy = pickle.loads(data)
    assert list(copy.cases) == list(store.cases)
    assert copy.config == store.config
    assert copy.fingerprint == store.fingerprint
    assert np.array_equal(copy.read(copy.cases[1]), store.read(store.cases[1]))


def test_equal_input_gives_equal_bytes(store, tmp_path, make_case):
    cases = [make_case(tmp_path / "b", f"case{i}", volume(i)) for i in (0, 1)]
    for order in (cases, cases[::-1]):
        write_index(tmp_path / "b", order, store.config)
        data = (tmp_path / "b" / "index.json").read_bytes()
        assert b'"case0"' in data
        if order is cases:
            first = data
    assert data == first


def test_fingerprint_is_of_the_data_not_of_its_place(store):
    def fingerprint(config=store.config, **change):
        cases = [dataclasses.replace(store.cases[0], **change), store.cases[1]]
        write_index(store.path, cases, config)
        return Store.open(store.path).fingerprint

    assert fingerprint() == store.fingerprint
    assert fingerprint(source="/elsewhere/case0.nii", stamp="1-2") == store.fingerprint
    for change in ({"crcs": "0" * 24}, {"split": "val"}, {"excluded": None}, {"mean": 1.0}):
        assert fingerprint(**change) != store.fingerprint
    assert fingerprint(PreprocessConfig(normalization="ct")) != store.fingerprint


def test_two_cases_of_one_id_are_refused(store):
    with pytest.raises(ValueError, match="two cases have the id 'case1'"):
        write_index(store.path, [*store.cases, store.cases[1]], store.config)
    assert len(Store.open(store.path)) == 2


def test_no_index_until_all_is_written(store, monkeypatch):
    (store.path / "index.json").unlink()

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)  # the last moment before the index appears
    with pytest.raises(KeyboardInterrupt):
        write_index(store.path, store.cases, store.config)
    with pytest.raises(UserError, match="no store there; make it with `sparsemae preprocess SRC -"):
        Store.open(store.path)


VERSION_1 = {"format": "sparsemae-store", "version": 1, "spacing": [1, 1, 1], "cases": [{"id": 1}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no store there; make it with `sparsemae preprocess SRC -o"),
        (b"", "damaged index; make the store again with .* --overwrite"),
        (b"\xff\xfe", "damaged index"),
        (b"[" * 100_000, "damaged index"),
        (b"[1, 2]", "not the index of a sparsemae store"),
        (b'{"format": "other", "version": 2}', "not the index of a sparsemae store"),
        (json.dumps(VERSION_1, indent=1).encode(), r"version 1, this program reads 2; .*overwrite"),
        (json.dumps(VERSION_1 | {"version": 99}).encode(), "version 99"),
        (json.dumps(VERSION_1 | {"version": 2}).encode(), "damaged index"),
    ],
)
def test_open_refuses_what_is_no_index(tmp_path, content, message):
    if content is not None:
        (tmp_path / "index.json").write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Store.open(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_index_without_cases_is_refused(tmp_path):
    write_index(tmp_path, [], PreprocessConfig())
    with pytest.raises(UserError, match="the store has no cases"):
        Store.open(tmp_path)


@pytest.mark.parametrize("name", ["cases/case1.b2nd", "excluded/case0.b2nd"])
def test_open_misses_files(store, name):
    (store.path / name).unlink()
    with pytest.raises(UserError, match=f"{name}: missing; `sparsemae preprocess SRC -o") as caught:
        Store.open(store.path)
    assert "other files" not in str(caught.value)
    assert len(Store.open(store.path, complete=False)) == 2
    shutil.rmtree((store.path / name).parent)
    with pytest.raises(UserError, match=name.replace("1", "[01]")):
        Store.open(store.path)


def test_twenty_thousand_cases_open_without_being_looked_at(store, monkeypatch):
    case, count = store.cases[0], 20_000
    crcs, foreground = case.crcs * 12, "x" * 140  # as a head at 1 mm has
    cases = [
        dataclasses.replace(
            case, id=f"s{i:05}", crcs=crcs, foreground=foreground, excluded=None, split="train"
        )
        for i in range(count)
    ]
    write_index(store.path, cases, store.config)
    built, looked = [], []
    monkeypatch.setattr(stored, "case_from", lambda raw: built.append(raw) or Case(**raw))
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda *a, **k: looked.append(a) or real(*a, **k))
    began = time.process_time()
    opened = Store.open(store.path)
    train = opened.split("train")
    assert time.process_time() - began < 1
    assert len(train) == count
    assert not built
    assert len(looked) < 20
    size = (store.path / "index.json").stat().st_size
    tracemalloc.start()
    kept = Store.open(store.path)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept) == count
    assert held < 1.1 * size
    assert peak < 2 * size
