"""Folds: nnU-Net's where nothing is said, else what the file says; and files that say nonsense."""

import json

import pytest

from sparsemae.errors import UserError
from sparsemae.segmentation.dataset import read_dataset
from sparsemae.segmentation.splits import make_split, nnunet_folds

# scikit-learn 1.x KFold(5, shuffle=True, random_state=12345), as nnunetv2 2.8.1 calls it
KNOWN = {
    7: [["c3", "c6"], ["c0", "c4"], ["c1"], ["c5"], ["c2"]],
    12: [
        ["c00", "c03", "c08"], ["c07", "c10", "c11"],
        ["c06", "c09"], ["c01", "c04"], ["c02", "c05"],
    ],
}  # fmt: skip


@pytest.mark.parametrize("count", KNOWN)
def test_folds_are_those_of_nnunet(count):
    ids = [f"c{i:0{len(str(count - 1))}}" for i in range(count)]
    folds = nnunet_folds(ids)
    assert [list(fold.val) for fold in folds] == KNOWN[count]
    for fold in folds:
        assert sorted(fold.train + fold.val) == ids


def test_of_few_cases_each_is_left_out_once():
    assert sorted(fold.val for fold in nnunet_folds(["a", "b", "c"])) == [("a",), ("b",), ("c",)]
    with pytest.raises(UserError, match="--fold all"):
        nnunet_folds(["a"])


def test_all_trains_on_everything(labelled):
    split = make_split(read_dataset(labelled), "all")
    assert split.train == split.val == ("case_0", "case_1", "case_2", "case_3")


@pytest.fixture
def dataset(tmp_path, draw_labelled):
    return read_dataset(draw_labelled(tmp_path / "Dataset001_Few", 3))


def test_the_file_decides(dataset):
    splits = [
        {"train": ["case_2", "case_0"], "val": ["case_1"]},
        {"train": ["case_1"], "val": []},
    ]
    (dataset.path / "splits_final.json").write_text(json.dumps(splits))
    first = make_split(dataset, 0)
    assert (first.train, first.val) == (("case_0", "case_2"), ("case_1",))
    assert make_split(dataset, 1).val == ()
    with pytest.raises(UserError, match=r"--fold 2: .*folds 0 to 1"):
        make_split(dataset, 2)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[]", "no folds"),
        ("{}", "an object where a list"),
        ("[1", "not valid JSON"),
        ('[{"train": ["case_0"]}]', "fold 0: val is not a list"),
        ('[{"train": [], "val": ["case_0"]}]', "fold 0: train is empty"),
        ('[{"train": ["case_9"], "val": []}]', "fold 0: train names case_9"),
        ('[{"train": ["case_0", "case_0"], "val": []}]', "names a case twice"),
        ('[{"train": ["case_0"], "val": ["case_1", "case_0"]}]', "case_0 is in train and in val"),
        ('[{"train": [0], "val": []}]', "train is not a list of case ids"),
    ],
)
def test_a_file_of_nonsense_is_refused(dataset, tmp_path, content, words):
    path = tmp_path / "splits.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        make_split(dataset, 0, path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)
