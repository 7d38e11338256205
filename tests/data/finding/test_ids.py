"""Ids are unique, safe as names of files, and stay when other files come or go."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemae.data.finding.entry import Entry, problem
from sparsemae.data.finding.ids import LONGEST, assign_ids, is_safe, make_id

NAMES = st.text(
    st.one_of(st.sampled_from("aAbB_-. é\n/%"), st.characters(min_codepoint=1)), min_size=1
)
PATHS = st.lists(st.lists(NAMES, min_size=1, max_size=4).map(tuple), min_size=1, max_size=20)


def entry(*parts, id=None, path=None, code=None):
    place = "/".join(parts)
    return Entry(
        path=path or f"/data/{place}",
        parts=parts,
        origin=place,
        subject="s",
        id=id,
        problem=code and problem(code, place, "broken; mend it"),
    )


@pytest.mark.parametrize(
    ("parts", "name"),
    [
        (("head_00",), "head_00"),
        (("a", "b", "scan"), "a__b__scan"),
        (("sub-01_T1w",), "sub-01_T1w"),
        (("scan 1",), "scan_1-"),
        (("-rf",), "rf-"),
        ((".hidden",), "hidden-"),
        (("$(touch x)",), "touch_x-"),
        (("a\nb",), "a_b-"),
        (("", "x"), "__x"),
        (("患者",), "volume-"),
        (("--",), "volume-"),
        ((b"caf\xe9".decode("utf-8", "surrogateescape"),), "caf-"),
        (("\ud800",), "volume-"),
        (("x" * 150,), "x" * 150),
        (("x" * 151,), "x" * 141 + "-"),
    ],
)
def test_an_id_is_the_name_or_a_likeness_with_digits(parts, name):
    made = make_id(parts)
    assert re.fullmatch(re.escape(name) + ("[0-9a-f]{8}" if name.endswith("-") else ""), made)
    assert is_safe(made)


def test_likenesses_differ():
    names = ["scan 1", "scan\t1", "scan  1", "scan(1)", "患者", "患考", "x" * 200, "x" * 201]
    assert len({make_id((name,)) for name in names}) == len(names)


@settings(max_examples=300, deadline=None)
@given(PATHS, st.randoms())
def test_ids_are_safe_unique_and_stay(paths, random):
    entries = [entry(*parts, path=f"/{i}") for i, parts in enumerate(paths)]
    ids = assign_ids(entries)
    assert len({name.lower() for name in ids}) == len(ids)
    for name in ids:
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name)
        assert len(name.encode()) <= LONGEST
    fewer = random.randint(0, len(ids))
    assert assign_ids(entries[:fewer]) == ids[:fewer]  # what is added later changes none


def test_of_two_the_first_keeps_its_id():
    first, second, third = entry("x"), entry("x", path="/2"), entry("X", path="/3")
    ids = assign_ids([first, second, third])
    assert ids[0] == "x"
    assert re.fullmatch("x-[0-9a-f]{8}", ids[1])
    assert re.fullmatch("X-[0-9a-f]{8}", ids[2])
    assert assign_ids([third, first])[0] == "X"


def test_digits_come_from_the_place_below_the_source():
    """A data set that is mounted elsewhere keeps its ids."""
    here = assign_ids([entry("x"), Entry(path="/a/x.nii", parts=("x",), origin="d", subject="s")])
    there = assign_ids([entry("x"), Entry(path="/b/x.nii", parts=("x",), origin="d", subject="s")])
    assert here == there


def test_ids_of_the_user_come_first_and_problems_last():
    ids = assign_ids(
        [entry("x", code="source.missing"), entry("x", path="/2"), entry("y", id="x", path="/3")]
    )
    assert ids[2] == "x"
    assert ids[1].startswith("x-")
    assert len(set(ids)) == 3
    assert assign_ids([entry("x", code="source.missing"), entry("x", path="/2")])[1] == "x"


def test_even_one_file_many_times_has_ids():
    assert len(set(assign_ids([entry("x")] * 20))) == 20
