"""What is measured of a data set's voxels, by hand and against nnU-Net; and every unfit file."""

import gzip
import io
import json
import runpy
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from rich.console import Console

from sparsemae.errors import UserError
from sparsemae.planning import fingerprint as module
from sparsemae.planning.fingerprint import Fingerprint, take_fingerprint
from sparsemae.segmentation.dataset import read_dataset

RECORD = Path(__file__).with_name("nnunet_fingerprint.json")
SCRIPT = Path(__file__).resolve().parents[1] / "interop" / "record_plans.py"
STANDARD = np.diag([1.0, 2.0, 3.0, 1.0])


def save(path, array, affine=STANDARD):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(array), affine), path)


@pytest.fixture
def make(tmp_path):
    """`make(cases, channels)`: a data set of {case: (images, labels)}; what is left as None is a
    sound case of 8 x 9 x 10 voxels."""

    def build(cases, channels=("T1w",), labels=3):
        root = tmp_path / "Dataset001_Small"
        for case, found in cases.items():
            images, classes = found or sound(len(channels))
            for number, image in enumerate(images):
                affine = STANDARD
                if isinstance(image, tuple):
                    image, affine = image
                save(root / "imagesTr" / f"{case}_{number:04}.nii.gz", image, affine)
            affine = STANDARD
            if isinstance(classes, tuple):
                classes, affine = classes
            save(root / "labelsTr" / f"{case}.nii.gz", classes, affine)
        about = {
            "channel_names": dict(enumerate(channels)),
            "labels": {f"class{i}" if i else "background": i for i in range(labels)},
            "numTraining": len(cases),
            "file_ending": ".nii.gz",
        }
        (root / "dataset.json").write_text(json.dumps(about))
        return read_dataset(root)

    return build


def sound(channels=1, seed=0):
    rng = np.random.default_rng(seed)
    images = [rng.integers(1, 99, (8, 9, 10)).astype(np.int16) for _ in range(channels)]
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[2:5, 3:6, 4:7] = 1
    labels[5, 6, 7] = 2
    return images, labels


def take(dataset, **options):
    return take_fingerprint(dataset, dataset.training, **options)


def test_values_by_hand(make):
    first, second = np.zeros((2, 10, 12, 14), np.int16)
    first[2:8, 3:11, 4] = 7  # the box: x 2-7, y 3-10, z 4-9, by both channels
    second[3, 4, 4:10] = 5
    labels = np.zeros((10, 12, 14), np.uint8)
    first[4, 4:8, 4] = 10, 20, 30, 40
    labels[4, 4:8, 4] = 1, 2, 1, 2
    labels[0, 0, 0] = 1  # outside of the box
    small = np.full((4, 4, 4), 3, np.int16)
    small[1, 1, 1] = 100
    only = np.zeros((4, 4, 4), np.uint8)
    only[1, 1, 1] = 2
    dataset = make(
        {"a": ([first, second], labels), "b": ([small, small], (only, STANDARD))}, ("T1w", "FLAIR")
    )
    found = take(dataset)
    assert [case.id for case in found.cases] == ["a", "b"]
    assert [case.shape for case in found.cases] == [(6, 8, 6), (4, 4, 4)]
    assert [case.spacing for case in found.cases] == [(1, 2, 3)] * 2
    assert [case.relative_size for case in found.cases] == [6 * 8 * 6 / (10 * 12 * 14), 1]
    assert found.relative_size == (6 * 8 * 6 / (10 * 12 * 14) + 1) / 2
    channel = found.channels[0]
    # cases count alike: mean of 25 and 100, though four voxels stand beside one
    assert channel.mean == pytest.approx(62.5)
    squares = np.mean([np.mean((np.array([10, 20, 30, 40]) - 62.5) ** 2), 37.5**2])
    assert channel.std == pytest.approx(np.sqrt(squares))
    assert (channel.minimum, channel.low, channel.median) == (10, 10, 70)
    assert (channel.high, channel.maximum) == (100, 100)
    assert found.channels[1].mean == pytest.approx(50)
    assert found.channels[1].minimum == 0


def test_axes_are_ours_whatever_the_files(make):
    image, labels = np.zeros((2, 6, 8, 10), np.int16)
    image[1:5, 2:7, 3:9] = np.arange(4 * 5 * 6).reshape(4, 5, 6) + 1
    labels[2, 3, 4] = 1
    turned = np.array([[0, 0, 4.0, 0], [-2, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0, 1]])
    case = ([(image, turned)], (labels.astype(np.uint8), turned))
    found = take(make({"a": case})).cases[0]
    assert found.spacing == (4, 2, 3)
    assert found.shape == (6, 4, 5)


def test_percentiles_of_many_voxels(make):
    rng = np.random.default_rng(3)
    image = rng.permutation(40 * 40 * 40).astype(np.int32).reshape(40, 40, 40)
    channel = take(make({"a": ([image], np.ones((40, 40, 40), np.uint8))})).channels[0]
    assert (channel.minimum, channel.maximum) == (0, 63999)
    assert channel.mean == pytest.approx(image.mean(), rel=1e-9)
    assert channel.std == pytest.approx(image.std(), rel=1e-9)
    for name, percent in (("low", 0.5), ("median", 50), ("high", 99.5)):
        assert getattr(channel, name) == pytest.approx(np.percentile(image, percent), abs=4)


def test_sums_in_parts_are_the_sum(make, monkeypatch):
    dataset = make({"a": None})
    whole = take(dataset).channels
    monkeypatch.setattr(module, "_CHUNK", 5)
    (parts,) = take(dataset).channels
    assert parts.mean == pytest.approx(whole[0].mean, rel=1e-12)
    assert parts.std == pytest.approx(whole[0].std, rel=1e-12)


def test_json_and_workers_change_nothing(make):
    dataset = make({"b": None, "a": sound(2, seed=4), "c": sound(2, seed=5)}, ("T1w", "T2w"))
    found = take(dataset)
    assert Fingerprint.model_validate_json(found.model_dump_json()) == found
    assert take(dataset, workers=2) == found
    backwards = take_fingerprint(dataset, dataset.training[::-1])
    assert [case.id for case in backwards.cases] == ["c", "b", "a"]
    assert backwards.channels[0].mean == pytest.approx(found.channels[0].mean)


def test_nnunets_extractor_finds_the_same(tmp_path):
    runpy.run_path(SCRIPT)["write_volumes"](tmp_path / "Dataset999_Volumes")
    found = take(read_dataset(tmp_path / "Dataset999_Volumes"))
    theirs = json.loads(RECORD.read_text())
    assert [list(case.shape[::-1]) for case in found.cases] == theirs["shapes_after_crop"]
    for case, spacing in zip(found.cases, theirs["spacings"], strict=True):
        assert case.spacing[::-1] == pytest.approx(spacing, rel=1e-6)
    assert found.relative_size == pytest.approx(theirs["median_relative_size_after_cropping"])
    names = {"minimum": "min", "maximum": "max", "low": "percentile_00_5"}
    names |= {"high": "percentile_99_5", "median": "median", "mean": "mean", "std": "std"}
    for number, channel in enumerate(found.channels):
        recorded = theirs["foreground_intensity_properties_per_channel"][str(number)]
        for ours, name in names.items():  # theirs is a sample of a million voxels per case
            near = 1e-6 if ours in ("minimum", "maximum") else recorded["std"] / 200
            assert getattr(channel, ours) == pytest.approx(recorded[name], abs=near), ours


def test_progress_is_told(make):
    console = Console(file=io.StringIO())
    take(make({"a": None, "b": None}), console=console)
    assert console.file.getvalue().splitlines()[-1] == "cases read 2/2"


def shifted(mm):
    affine = STANDARD.copy()
    affine[0, 3] += mm
    return affine


def fault(kind):
    """A case of two channels with one fault."""
    (first, second), labels = sound(2)
    match kind:
        case "label shape":
            labels = labels[:-1]
        case "label place":
            labels = (labels, shifted(3))
        case "label spacing":
            labels = (labels, np.diag([1.0, 2, 3.5, 1]))
        case "channel shape":
            second = second[:, :-1]
        case "channel place":
            second = (second, shifted(3))
        case "channel flipped":
            second = (second, np.diag([-1.0, 2, 3, 1]))
        case "class":
            labels[1, 1, 1] = 7
        case "float":
            labels = labels + np.float32(0.25)
        case "constant":
            first[...] = second[...] = 5
    return [first, second], labels


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("label shape", "labelsTr/bad.nii.gz", r"shape \(7, 9, 10\)"),
        ("label place", "labelsTr/bad.nii.gz", "lies up to 3 mm off"),
        ("label spacing", "labelsTr/bad.nii.gz", r"lies up to 4\.5 mm off"),
        ("channel shape", "imagesTr/bad_0001.nii.gz", r"shape \(8, 8, 10\)"),
        ("channel place", "imagesTr/bad_0001.nii.gz", "lies up to 3 mm off"),
        ("channel flipped", "imagesTr/bad_0001.nii.gz", "mm off"),
        ("class", "labelsTr/bad.nii.gz", "class 7 is not among 0, 1, 2"),
        ("float", "labelsTr/bad.nii.gz", r"a label of 0\.25"),
        ("constant", "imagesTr/bad_0000.nii.gz", "every channel has one value"),
    ],
)
def test_unfit_cases_are_named(make, kind, file, message):
    dataset = make({"good": None, "bad": fault(kind)}, ("T1w", "T2w"))
    with pytest.raises(UserError, match=message) as raised:
        take(dataset)
    assert str(raised.value).startswith(f"{dataset.path / file}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", [1, 2])
def test_all_unfit_cases_are_found_at_once(make, workers):
    cases = {f"bad{i}": fault("class") for i in range(6)}
    dataset = make({"good": None, "zz": fault("float"), **cases}, ("T1w", "T2w"))
    path = dataset.training[0].images[0]
    data = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(data)[:-30])
    with pytest.raises(UserError) as raised:
        take(dataset, workers=workers)
    text = str(raised.value)
    assert text.startswith(f"{dataset.path}: 7 of 8 cases are unfit: (1) {path}: ")
    assert text.endswith(" and 2 more")
    assert text.count("class 7 is not among 0, 1, 2") == 4


def test_nothing_to_measure(make):
    (image,), _ = sound()
    dataset = make({"a": ([image], np.zeros((8, 9, 10), np.uint8))})
    with pytest.raises(UserError, match="all label maps are background only"):
        take(dataset)
    with pytest.raises(UserError, match="Dataset001_Small: no cases"):
        take_fingerprint(dataset, ())


def test_a_case_without_foreground_does_not_count(make):
    empty = sound(seed=1)[0], np.zeros((8, 9, 10), np.uint8)
    dataset = make({"a": None, "b": empty})
    found = take(dataset)
    assert len(found.cases) == 2
    assert found.channels == take_fingerprint(dataset, dataset.training[:1]).channels
