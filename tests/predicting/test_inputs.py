"""Which files are which case, and every set of files that is none."""

import pytest

from sparsemae.errors import UserError
from sparsemae.predicting.inputs import find_cases


@pytest.fixture
def folder(tmp_path):
    """`folder(*names)`: a folder with empty files of these names."""

    def make(*names):
        for name in names:
            (tmp_path / name).touch()
        return tmp_path

    return make


def found(folder, channels):
    return {c.id: [p.name for p in c.images] for c in find_cases(folder, channels)}


@pytest.mark.parametrize(
    ("names", "channels", "cases"),
    [
        (["b.nii.gz", "a.nii"], 1, {"a": ["a.nii"], "b": ["b.nii.gz"]}),
        (["a_0000.nii.gz", "b_0000.nii.gz"], 1, {"a": ["a_0000.nii.gz"], "b": ["b_0000.nii.gz"]}),
        (["scan_2024.nii.gz", "other.nii.gz"], 1, None),
        (["a_0001.nii.gz", "a_0000.nii.gz"], 2, {"a": ["a_0000.nii.gz", "a_0001.nii.gz"]}),
        (["a.hdr", "a.img", ".b.nii.gz", "notes.txt"], 1, {"a": ["a.hdr"]}),
        (["a_0000.nii.gz", "b.nii.gz"], 1, {"a": ["a_0000.nii.gz"], "b": ["b.nii.gz"]}),
        (["a.nrrd", "b.mha"], 1, {"a": ["a.nrrd"], "b": ["b.mha"]}),
    ],
)
def test_cases_are_told_by_their_names(folder, names, channels, cases):
    got = found(folder(*names), ("T1", "T2")[:channels])
    if cases is None:  # not nnU-Net's names: all of a name is the case's
        cases = {"scan_2024": ["scan_2024.nii.gz"], "other": ["other.nii.gz"]}
    assert got == cases
    assert list(got) == sorted(got)


def test_a_single_file_is_a_case(folder):
    root = folder("a b_0000.nii.gz", "other.nii.gz")
    assert found(root / "a b_0000.nii.gz", ("T1",)) == {"a b": ["a b_0000.nii.gz"]}
    assert found(root / "other.nii.gz", ("T1",)) == {"other": ["other.nii.gz"]}


def test_a_single_file_brings_its_other_channels(folder):
    root = folder("a_0000.nii.gz", "a_0001.nrrd", "b_0000.nii.gz", "b_0001.nii.gz", "a_0002.txt")
    for name in ("a_0000.nii.gz", "a_0001.nrrd"):
        assert found(root / name, ("T1", "T2")) == {"a": ["a_0000.nii.gz", "a_0001.nrrd"]}
    (root / "a_0000.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case a has no channel 0000 \(T1\)"):
        find_cases(root / "a_0001.nrrd", ("T1", "T2"))
    (root / "plain.nii.gz").touch()
    with pytest.raises(UserError, match="name the files CASE_0000 T1, CASE_0001 T2"):
        find_cases(root / "plain.nii.gz", ("T1", "T2"))


@pytest.mark.parametrize(
    ("names", "channels", "words"),
    [
        ([], 1, "no volumes in it"),
        (["readme.txt"], 1, "no volumes in it"),
        (["a_0000.nii.gz"], 2, "case a has no channel 0001 (T2)"),
        (
            ["a_0000.nii.gz", "a_0001.nii.gz"],
            1,
            "a_0001.nii.gz: the network was trained on 1 channel",
        ),
        (["a.nii.gz"], 2, "name the files CASE_0000 T1, CASE_0001 T2"),
        (["a_0000.nii.gz", "a_0000.nii"], 1, "are one case by their names"),
        (["a.nii.gz", "a.nrrd"], 1, "are one case by their names"),
    ],
)
def test_what_is_no_set_of_cases_is_named(folder, names, channels, words):
    with pytest.raises(UserError) as caught:
        find_cases(folder(*names), ("T1", "T2")[:channels])
    assert words in str(caught.value)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match="no such file or folder"):
        find_cases(tmp_path / "nowhere", ("T1",))
