"""Training and validation share no subject and no volume."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsemae.data.finding.split import duplicate_notices, merge_groups, split_subjects
from sparsemae.errors import UserError

SUBJECTS = [f"data/sub-{i:03}" for i in range(200)]


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [
        (200, 0.05, 10),
        (200, 0.0, 0),
        (10, 0.05, 1),
        (10, 0.25, 3),  # halves are rounded up
        (30, 0.05, 2),
        (2, 0.05, 1),
        (2, 0.9, 1),
        (1, 0.5, 0),
        (3, 0.99, 2),
    ],
)
def test_so_many_subjects_are_held_out(count, fraction, held_out):
    groups = [name for name in SUBJECTS[:count] for _ in range(3)]
    sides = split_subjects(groups, fraction, 0)
    assert sides.count("val") == 3 * held_out
    assert sides.count("train") == 3 * (count - held_out)


def test_images_of_a_subject_stay_together_in_any_order():
    groups = [SUBJECTS[i % 50] for i in range(300)]
    sides = dict(zip(groups, split_subjects(groups, 0.2, 1), strict=True))
    random.Random(0).shuffle(groups)
    again = split_subjects(groups, 0.2, 1)
    assert again == tuple(sides[group] for group in groups)


def test_the_seed_decides_who():
    splits = {split_subjects(SUBJECTS, 0.1, seed) for seed in range(5)}
    assert len(splits) == 5


def test_more_subjects_move_few():
    before = split_subjects(SUBJECTS[:190], 0.1, 0)
    after = split_subjects(SUBJECTS, 0.1, 0)[:190]
    assert sum(a != b for a, b in zip(before, after, strict=True)) <= 3


def test_no_subjects():
    assert split_subjects([], 0.1, 0) == ()


@pytest.mark.parametrize("fraction", [-0.1, 1, 1.5, float("nan")])
def test_fractions_are_shares(fraction):
    with pytest.raises(UserError, match="from 0 to below 1"):
        split_subjects(SUBJECTS, fraction, 0)


def test_subjects_that_share_a_volume_are_one():
    groups = ["d", "a", "b", "c", "c", "e"]
    contents = ["1", "2", "3", "2", "3", "4"]
    assert merge_groups(groups, contents) == ("d", "a", "a", "a", "a", "e")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 5).map(str)), max_size=12))
def test_merged_groups_never_part_a_volume_or_a_subject(pairs):
    groups, contents = [p[0] for p in pairs], [p[1] for p in pairs]
    merged = merge_groups(groups, contents)
    for keys in (groups, contents):
        for key in set(keys):
            assert len({m for m, k in zip(merged, keys, strict=True) if k == key}) == 1
    # and nothing is merged without need: as many groups as parts connected by subject or volume
    edges = {(g, "=" + c) for g, c in pairs}
    parts = [set(edge) for edge in edges]
    for node in {n for edge in edges for n in edge}:
        touching = [part for part in parts if node in part]
        parts = [part for part in parts if node not in part] + [set().union(*touching)]
    assert len(set(merged)) == len(parts)
    assert set(merged) <= set(groups)
    order = list(range(len(pairs)))[::-1]
    again = merge_groups([groups[i] for i in order], [contents[i] for i in order])
    assert [again[i] for i in order] == list(merged)


def test_a_long_chain_of_copies():
    count = 20_000
    groups = [f"{i // 2}" for i in range(count)]
    contents = [f"{(i + 1) // 2}" for i in range(count)]
    assert len(set(merge_groups(groups, contents))) == 1


def test_copies_are_reported_with_each_other():
    notices = duplicate_notices(["a", "b", "c", "d", "e", "f"], ["1", "2", "1", "1", "1", "1"])
    assert list(notices) == ["a", "c", "d", "e", "f"]
    assert {notice.code for notice in notices.values()} == {"duplicate.content"}
    assert notices["c"].message == ("c: the same voxels as a, d, e and 1 more; keep one of them")
    assert duplicate_notices(["a", "b"], ["1", "2"]) == {}
