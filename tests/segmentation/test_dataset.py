"""What of a labelled data set can be understood, and every way in which it cannot."""

import json

import pytest

from sparsemae.errors import UserError
from sparsemae.segmentation.dataset import read_dataset


@pytest.fixture
def edit(tmp_path, draw_labelled):
    """`edit(key=value)`: a data set with changed entries of dataset.json; None removes one."""
    folder = draw_labelled(tmp_path / "Dataset001_Few", 2)

    def change(**entries):
        about = json.loads((folder / "dataset.json").read_text())
        for key, value in entries.items():
            about.pop(key, None)
            if value is not None:
                about[key] = value
        (folder / "dataset.json").write_text(json.dumps(about))
        return folder

    return change


def test_a_data_set_is_read_with_its_cases_in_order(edit):
    dataset = read_dataset(edit())
    assert dataset.name == "Dataset001_Few"
    assert dataset.channels == ("MR0",)
    assert dataset.classes.names == ("background", "shell", "core")
    assert dataset.classes.ignore is None
    assert [case.id for case in dataset.training] == ["case_0", "case_1"]
    assert [p.name for p in dataset.training[1].images] == ["case_1_0000.nii.gz"]
    assert dataset.training[1].label.name == "case_1.nii.gz"


def test_channels_are_in_the_order_of_their_numbers(tmp_path, draw_labelled):
    dataset = read_dataset(draw_labelled(tmp_path / "Dataset002_Two", 2, channels=2))
    for case in dataset.training:
        assert [p.name[-11:-7] for p in case.images] == ["0000", "0001"]


@pytest.mark.parametrize(
    ("labels", "names", "ignore"),
    [
        ({"background": 0, "core": 2, "shell": 1}, ("background", "shell", "core"), None),
        ({"background": 0, "shell": 1, "core": 2, "ignore": 3}, None, 3),
        ({"0": "background", "1": "shell", "2": "core"}, ("background", "shell", "core"), None),
    ],
)
def test_labels_may_be_named_either_way_and_one_ignored(edit, labels, names, ignore):
    classes = read_dataset(edit(labels=labels)).classes
    assert classes.names == (names or ("background", "shell", "core"))
    assert classes.ignore == ignore
    assert classes.numbers == ((0, 1, 2) if ignore is None else (0, 1, 2, 3))


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"labels": None}, ["labels: missing"]),
        ({"labels": [0, 1]}, ["labels: a list"]),
        ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, ["labels.whole", "region"]),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, ["a", "b", "both 1"]),
        ({"labels": {"background": 0, "a": 2}}, ["numbers [0, 2]", "0 to 1"]),
        ({"labels": {"a": 1, "b": 2}}, ["none is number 0", '"background": 0']),
        ({"labels": {"background": 0, "a": -1}}, ["labels.a", "-1"]),
        ({"labels": {"background": 0, "a": True}}, ["labels.a", "True"]),
        ({"labels": {"background": 0}}, ["background alone"]),
        ({"labels": {"background": 0, "ignore": 1, "a": 2}}, ["numbers [0, 2]"]),
        ({"channel_names": None}, ["channel_names: missing"]),
        ({"channel_names": {"1": "T1"}}, ["number them 0, 1"]),
        ({"channel_names": {"0": "T1", "1": "T2"}}, ["case_0_0001.nii.gz", "missing"]),
        ({"file_ending": ".png"}, ["file_ending '.png'"]),
        ({"file_ending": ".nrrd"}, ["imagesTr", "no *.nrrd"]),
        ({"dataset": {"x": {"images": ["a.nii.gz"]}}}, ["dataset.x", "label"]),
        ({"dataset": {"x": {"images": ["a.nii.gz"], "label": "b.nii.gz"}}}, ["a.nii.gz: missing"]),
    ],
)
def test_what_cannot_be_understood_is_named(edit, entries, words):
    with pytest.raises(UserError) as caught:
        read_dataset(edit(**entries))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["../../evil", "a/b", "..", ".", "", "x" * 250, "nul\0"])
def test_an_id_that_leads_elsewhere_is_refused(edit, case):
    files = {"images": ["imagesTr/case_1_0000.nii.gz"], "label": "labelsTr/case_1.nii.gz"}
    with pytest.raises(UserError, match="no name for files"):
        read_dataset(edit(dataset={case: files}))


def test_a_missing_label_map_is_named(edit):
    folder = edit()
    (folder / "labelsTr" / "case_1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_1\.nii\.gz: no label map"):
        read_dataset(folder)


def test_a_name_of_no_channel_is_named(edit):
    folder = edit()
    (folder / "imagesTr" / "stray.nii.gz").touch()
    with pytest.raises(UserError, match=r"stray\.nii\.gz: 1 channel, .*CASE_0000"):
        read_dataset(folder)


def test_a_folder_without_description_is_no_data_set(tmp_path):
    with pytest.raises(UserError, match=r"dataset\.json is missing"):
        read_dataset(tmp_path)


def test_cases_may_be_listed(edit):
    files = {"images": ["imagesTr/case_1_0000.nii.gz"], "label": "labelsTr/case_1.nii.gz"}
    (case,) = read_dataset(edit(dataset={"only": files})).training
    assert case.id == "only"
    assert case.images[0].is_file()
    assert case.label.is_file()
