"""Patches and their labels: from the right voxels, varied together, the same in any process."""

import pickle

import nibabel
import numpy as np
import pytest
import torch

from sparsemae.data.loader import Loader
from sparsemae.data.loading.affine import AugmentConfig
from sparsemae.data.loading.order import generator_of
from sparsemae.data.loading.samples import RawBatch
from sparsemae.segmentation.dataset import read_dataset
from sparsemae.segmentation.library import has_library
from sparsemae.segmentation.making import prepare_store
from sparsemae.segmentation.patches import assemble
from sparsemae.segmentation.samples import LabelledReader

PATCH = (16, 12, 8)
STILL = AugmentConfig(mirror=False, rotation_probability=0, scale_probability=0)
VARIED = AugmentConfig(rotation_probability=0.7, scale_probability=0.5)


def reader(store, augment=VARIED, vary="plain", **changes):
    options = {"patch_size": PATCH, "batch_size": 2, "seed": 0, "masked": [False]}
    options |= {"augment": augment, "vary": vary, "foreground": 0.33} | changes
    return LabelledReader(store, **options)


def patches(read, *samples):
    batch = RawBatch(read.patch_size, tuple(read(i) for i in samples))
    return assemble(batch.map(torch.from_numpy))


def test_an_unvaried_patch_is_a_piece_of_its_case(prepared):
    read = reader(prepared, vary="none")
    for sample in range(8):
        case = read.case_of(sample)
        whole = ((0, 0, 0), case.shape)
        image, labels = prepared.read_image(case, *whole), prepared.read_labels(case, *whole)
        out = patches(read, sample)
        assert out["case"] == [case.id]
        begin = read.begin(case, sample, generator_of(sample, len(prepared), 0).random(5))
        box = tuple(slice(b, b + p) for b, p in zip(begin, PATCH, strict=True))
        np.testing.assert_array_equal(out["image"][0], image[:, *box].astype(np.float32))
        np.testing.assert_array_equal(out["labels"][0], labels[box])


def test_mirroring_and_resampling_move_image_and_labels_together(prepared):
    """The bright shell is class 1 and the darker core class 2, however the patch is turned."""
    read = reader(prepared, VARIED, vary="plain")
    resampled = mirrored = 0
    for sample in range(24):
        drawn = read(sample)
        resampled += drawn.grid is not None
        mirrored += any(drawn.flips)
        plain = RawBatch(PATCH, (type(drawn)(**{**vars(drawn), "intensity": None}),))
        out = assemble(plain.map(torch.from_numpy))
        image, labels = out["image"][0, 0], out["labels"][0]
        inside = torch.nn.functional.max_pool3d(-(labels == 1).float()[None], 3, 1, 1)[0] == -1
        if inside.sum() > 20:
            assert image[inside].mean() > image[labels == 0].mean() + 1
    assert resampled > 5
    assert mirrored > 15


def test_a_mirrored_patch_is_the_unmirrored_one_flipped(prepared):
    flip = reader(prepared, AugmentConfig(rotation_probability=0, scale_probability=0))
    still = reader(prepared, STILL)
    for sample in range(6):
        axes = [axis for axis, on in enumerate(flip(sample).flips) if on]
        one, other = patches(still, sample), patches(flip, sample)
        if flip(sample).intensity.noise is None:
            np.testing.assert_array_equal(one["labels"][0].flip(axes), other["labels"][0])


def test_beyond_a_small_case_is_zero_and_background(prepared):
    size = (32, 30, 28)
    read = reader(prepared, vary="none", patch_size=size)
    case, out = read.case_of(0), patches(read, 0)
    before = [(p - n) // 2 for p, n in zip(size, case.shape, strict=True)]
    box = tuple(slice(b, b + n) for b, n in zip(before, case.shape, strict=True))
    whole = ((0, 0, 0), case.shape)
    np.testing.assert_array_equal(out["labels"][0][box], prepared.read_labels(case, *whole))
    outside = torch.ones(size, dtype=torch.bool)
    outside[box] = False
    assert (out["image"][0, 0][outside] == 0).all()
    assert (out["labels"][0][outside] == 0).all()


def test_the_last_of_a_batch_shows_a_class_at_its_centre(prepared):
    read = reader(prepared, STILL, vary="none", patch_size=(4, 4, 4))
    centres = [int(patches(read, 2 * i + 1)["labels"][0, 2, 2, 2]) for i in range(60)]
    assert set(centres) == {1, 2}
    assert 15 < centres.count(2) < 45  # classes are equally likely, though the shell is larger
    free = [int(patches(read, 2 * i)["labels"][0, 2, 2, 2]) for i in range(60)]
    assert 0 in free


@pytest.mark.parametrize(
    ("foreground", "first"), [(0.0, 4), (0.01, 3), (0.33, 3), (0.5, 2), (1.0, 0)]
)
def test_how_many_of_a_batch_are_sure_to_show_a_class(prepared, foreground, first):
    read = reader(prepared, foreground=foreground, batch_size=4)
    assert read.anywhere == first


def test_where_a_label_is_ignored_every_patch_has_something_to_score(
    tmp_path, draw_labelled, make_plan
):
    labels = {"background": 0, "shell": 1, "core": 2, "ignore": 3}
    folder = draw_labelled(tmp_path / "Dataset001_Sparse", 2, labels=labels)
    for path in (folder / "labelsTr").iterdir():
        image = nibabel.load(path)
        array = np.asarray(image.dataobj).copy()
        array[:, :, np.arange(array.shape[2]) % 11 != 5] = 3  # few slices were drawn
        nibabel.save(nibabel.Nifti1Image(array, image.affine), path)
    store = prepare_store(read_dataset(folder), make_plan(), tmp_path / "stores")
    read = reader(store, STILL, vary="none", patch_size=(6, 6, 3))
    assert all((patches(read, i)["labels"] != 3).any() for i in range(40))
    anywhere = [patches(read, 2 * i)["labels"] for i in range(20)]
    assert any((labels == 0).any() for labels in anywhere)


@pytest.mark.parametrize("vary", ["plain", "none"])
def test_many_classes_can_be_mirrored(tmp_path, draw_labelled, make_plan, vary):
    names = {"background": 0} | {f"class {i}": i for i in range(1, 301)}
    folder = draw_labelled(tmp_path / "Dataset001_Many", 2, labels=names)
    for path in (folder / "labelsTr").iterdir():
        image = nibabel.load(path)
        array = np.asarray(image.dataobj).astype(np.uint16) * 145
        nibabel.save(nibabel.Nifti1Image(array, image.affine), path)
    store = prepare_store(read_dataset(folder), make_plan(), tmp_path / "stores")
    read = reader(store, vary=vary)
    found = torch.cat([patches(read, i)["labels"].unique() for i in range(8)]).unique()
    assert found.tolist() == [0, 145, 290]


def test_samples_are_the_same_in_any_order_and_process(prepared):
    one, other = reader(prepared), pickle.loads(pickle.dumps(reader(prepared)))
    for sample in (5, 0, 3):
        a, b = patches(one, sample), patches(other, sample)
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["labels"], b["labels"])
    assert not torch.equal(patches(one, 5)["image"], patches(reader(prepared, seed=1), 5)["image"])


def test_workers_give_what_one_process_gives(prepared):
    def batches(workers):
        pool = {"workers": workers, "timeout": 60.0}
        loader = Loader(reader(prepared), range(3), range(2), 2, **pool)
        return [assemble(batch.map(torch.from_numpy)) for batch in loader]

    for a, b in zip(batches(0), batches(2), strict=True):
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["labels"], b["labels"])


def test_slices_are_turned_within_themselves(prepared):
    """A patch of few slices: labels of one slice come from one slice of the case."""
    flat = reader(prepared, AugmentConfig(rotation_probability=1.0), patch_size=(16, 4, 16))
    assert flat.slices == 1
    for sample in range(6):
        points = flat(sample).grid
        height = points[1].reshape(-1)  # along the slices' axis, for each of the patch's
        assert np.ptp(height[:16]) < 1e-6
        assert np.ptp(height[-16:]) < 1e-6


@pytest.mark.skipif(not has_library(), reason="batchgeneratorsv2 is not installed")
@pytest.mark.parametrize("size", [PATCH, (20, 4, 20)])
def test_the_library_gives_whole_patches_and_leaves_global_numbers_alone(prepared, size):
    read = reader(prepared, VARIED, vary="batchgenerators", patch_size=size)
    before, numpys = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    one, other = patches(read, 7), patches(read, 7)
    assert torch.equal(one["image"], other["image"])
    assert one["image"].shape == (1, 1, *size)
    assert one["labels"].shape == (1, *size)
    assert set(one["labels"].unique().tolist()) <= {0, 1, 2}
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpys).all()
