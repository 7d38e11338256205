"""BIDS and nnU-Net folders as these tools write them, and how a layout is chosen."""

import json

import pytest

from sparsemae.data.sources import find_sources
from sparsemae.errors import UserError

STUDY = (
    "dataset_description.json",
    "participants.tsv",
    "sub-01/anat/sub-01_T1w.nii.gz",
    "sub-01/anat/sub-01_T1w.json",
    "sub-01/anat/other_T1w.nii.gz",
    "sub-01/anat/sub-01_run-2_T2w.nii.gz",
    "sub-01/func/sub-01_task-rest_bold.nii.gz",
    "sub-02/ses-a/anat/sub-02_ses-a_acq-x_FLAIR.nii",
    "sub-02/ses-b/anat/sub-02_ses-b_T1w.nii.gz",
    "sub-02/ses-b/anat/sub-02_ses-b_mod-T1w_defacemask.nii.gz",
    "sub-02/ses-b/anat/sub-02_ses-b_part-mag_T2starw.nii.gz",
    "sub-02/ses-b/anat/sub-02_ses-b_part-phase_T2starw.nii.gz",
    "sub-02/ses-b/anat/extra/sub-02_ses-b_T2w.nii.gz",
    "sub-02/ses-b/dwi/sub-02_ses-b_dwi.nii.gz",
    "derivatives/fmriprep/sub-01/anat/sub-01_space-MNI_T1w.nii.gz",
    "sourcedata/sub-01/anat/sub-01_T1w.nii.gz",
)
IMAGES = {
    "sub-01_T1w": ("sub-01", None, "T1w"),
    "sub-01_run-2_T2w": ("sub-01", None, "T2w"),
    "sub-02_ses-a_acq-x_FLAIR": ("sub-02", "ses-a", "FLAIR"),
    "sub-02_ses-b_T1w": ("sub-02", "ses-b", "T1w"),
    "sub-02_ses-b_part-mag_T2starw": ("sub-02", "ses-b", "T2starw"),
}


def facts(*sources, **options):
    found = find_sources(sources, **options)
    assert found.problems == ()
    return {s.id: (s.subject, s.session, s.modality) for s in found.sources}


def test_bids(tree):
    study = tree(*STUDY)
    assert facts(study) == facts(study, layout="bids") == IMAGES
    assert {s.dataset for s in find_sources([study]).sources} == {"data"}


def test_parts_of_a_study_are_the_study(tree):
    """What a shell or a pattern makes of sub-*/ gives the same ids and groups as the study."""
    study = tree(*STUDY)
    whole = find_sources([study]).sources
    for level in ("sub-*", "sub-*/ses-*", "sub-*/ses-*/anat"):
        sources = find_sources(sorted(study.glob(level))).sources
        assert sources
        assert set(sources) <= set(whole)
        assert find_sources([study / level]).sources == sources
    assert set(find_sources([study / "sub-*/anat/sub-*_T1w.nii.gz"]).sources) <= set(whole)
    assert set(find_sources(sorted(study.glob("sub-*/anat/sub-*_T?w.nii.gz"))).sources) <= set(
        whole
    )
    assert {s.group for s in find_sources([study / "sub-02"]).sources} == {"data/sub-02"}


def test_derivatives_are_taken_when_named(tree):
    prepared = tree(*STUDY) / "derivatives" / "fmriprep"
    (source,) = find_sources([prepared]).sources
    assert (source.id, source.group) == ("sub-01_space-MNI_T1w", "fmriprep/sub-01")


def test_many_studies_below_one_folder(tree):
    root = tree(*(f"{study}/{name}" for study in ("ds1", "ds2") for name in STUDY))
    found = find_sources([root], layout="bids").sources
    assert {s.id for s in found} == {f"{d}__{name}" for d in ("ds1", "ds2") for name in IMAGES}
    assert {s.group for s in found} == {f"{d}/sub-0{i}" for d in ("ds1", "ds2") for i in (1, 2)}


def test_bids_that_repeats_nothing_keeps_its_folders(tree):
    root = tree("sub-1/ses-1/anat/sub-1_T1w.nii", "sub-1/ses-2/anat/sub-1_T1w.nii")
    assert set(facts(root)) == {"sub-1__ses-1__anat__sub-1_T1w", "sub-1__ses-2__anat__sub-1_T1w"}


def test_bids_without_an_image_says_so(tree):
    root = tree("sub-1/anat/scan.nii.gz")
    with pytest.raises(UserError, match=r"sub-\*_T1w.nii.gz; or say --layout folder"):
        find_sources([root])
    assert facts(root, layout="folder") == {"sub-1__anat__scan": ("sub-1", None, None)}


def test_subjects_without_anat_are_no_bids(tree):
    root = tree("sub-1/a.nii.gz", "sub-1/ses-1/b.nii.gz")
    assert set(facts(root)) == {"sub-1__a", "sub-1__ses-1__b"}


@pytest.fixture
def nnunet(tree):
    """`nnunet(about, *names)`: a data set with this dataset.json and these files in imagesTr."""

    def make(about, *names, root="Dataset001_Brains"):
        images = tuple(f"imagesTr/{name}" for name in names)
        folder = tree("labelsTr/BR_01.nii.gz", "imagesTs/BR_99_0000.nii.gz", *images, root=root)
        (folder / "dataset.json").write_text(json.dumps(about))
        return folder

    return make


NEW = {"channel_names": {"0": "T1", "1": "FLAIR"}, "labels": {}, "file_ending": ".nii.gz"}
FILES = ("BR_01_0000.nii.gz", "BR_01_0001.nii.gz", "BR_02_0000.nii.gz", "._BR_02_0000.nii.gz")


def test_nnunet(nnunet):
    data = nnunet(NEW, *FILES, "BR_03_0000.nrrd")
    expected = {
        "BR_01_0000": ("BR_01", None, "T1"),
        "BR_01_0001": ("BR_01", None, "FLAIR"),
        "BR_02_0000": ("BR_02", None, "T1"),
    }
    assert facts(data) == facts(data, layout="nnunet") == expected
    assert {s.dataset for s in find_sources([data]).sources} == {"Dataset001_Brains"}
    # the folder of images itself: no channel's name, but the same subjects
    inner = find_sources([data / "imagesTr"]).sources
    assert {s.group for s in inner} == {f"Dataset001_Brains/BR_0{i}" for i in (1, 2, 3)}
    assert set(facts(data / "imagesTs")) == {"BR_99_0000"}


def test_nnunet_honours_the_file_ending(nnunet):
    data = nnunet({**NEW, "file_ending": ".nrrd"}, *FILES, "BR_03_0000.nrrd")
    assert set(facts(data)) == {"BR_03_0000"}


def test_nnunet_1_and_the_decathlon(nnunet):
    old = nnunet({"modality": {"0": "MRI"}}, "la_0001_0000.nii.gz")
    assert facts(old) == {"la_0001_0000": ("la_0001", None, "MRI")}
    task = nnunet({"modality": {"0": "CT"}}, "hip_0001.nii.gz", "hip_0002.nii.gz", root="Task04")
    assert facts(task) == {f"hip_000{i}": (f"hip_000{i}", None, "CT") for i in (1, 2)}
    several = nnunet({"modality": {"0": "T1", "1": "T2"}}, "BRATS_001.nii.gz", root="Task01")
    assert facts(several) == {"BRATS_001": ("BRATS_001", None, None)}


def test_a_channel_that_was_not_announced(nnunet):
    data = nnunet(NEW, *FILES, "BR_01_0002.nii.gz", "stray.nii.gz")
    found = find_sources([data])
    assert len(found.sources) == 3
    assert {(p.id, p.code) for p in found.problems} == {
        ("BR_01_0002", "source.channel"),
        ("stray", "source.channel"),
    }


def test_several_data_sets_of_nnunet(nnunet, tree):
    one, two = nnunet(NEW, *FILES), nnunet(NEW, *FILES, root="Dataset002_More")
    both = find_sources([one, two]).sources
    assert len({s.id for s in both}) == 6
    assert len({s.group for s in both}) == 4
    assert both == find_sources([one.parent / "Dataset*"]).sources
    moved = [data.rename(tree(root="elsewhere") / data.name) for data in (one, two)]
    assert {s.id for s in find_sources(moved).sources} == {s.id for s in both}
    with pytest.raises(UserError, match="labelsTr would be taken for images; name this nnU-Net"):
        find_sources([moved[0].parent])
    whole = find_sources([moved[0].parent], layout="folder").sources
    assert any("labelsTr" in s.id for s in whole)


def test_nnunet_with_listed_files(nnunet, tree):
    far = tree("x.nii.gz", root="far") / "x.nii.gz"
    cases = {"A": {"images": ["imagesTr/a.nii.gz", str(far)], "label": "labelsTr/a.nii.gz"}}
    data = nnunet({**NEW, "dataset": cases}, "a.nii.gz", "b.nii.gz")
    assert facts(data) == {"A_0000": ("A", None, "T1"), "A_0001": ("A", None, "FLAIR")}
    assert {s.group for s in find_sources([data]).sources} == {"Dataset001_Brains/A"}


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ([], "holds a list where an object"),
        ({}, "channel_names: missing"),
        ({"channel_names": ["T1"]}, "channel_names: a list"),
        ({"channel_names": {"T1": 0}}, "channel_names: an object"),
        ({"channel_names": {"0" * 5000: "T1"}}, "channel_names: an object"),
        ({**NEW, "file_ending": ".png"}, "file_ending '.png' is none of .nii.gz"),
        ({**NEW, "file_ending": 1}, "file_ending 1 is none of"),
        ({**NEW, "file_ending": ".mha"}, r"no \*.mha in it; check file_ending"),
        ({**NEW, "dataset": []}, "dataset: write"),
        ({**NEW, "dataset": {"A": {"images": "x"}}}, "dataset.A: write"),
    ],
)
def test_what_is_no_data_set_of_nnunet(nnunet, about, message):
    with pytest.raises(UserError, match=message):
        find_sources([nnunet(about, *FILES)])


def test_a_plain_reading_can_be_forced(nnunet, tree):
    assert len(find_sources([nnunet(NEW, *FILES)], layout="folder").sources) == 5
    assert len(find_sources([tree(*STUDY)], layout="folder").sources) == 13
