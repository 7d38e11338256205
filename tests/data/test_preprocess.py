import json
import time

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from sparsemae.data import preprocess as module
from sparsemae.data.phantom import write_heads
from sparsemae.data.preprocess import (
    case_ids,
    crop_nonzero,
    preprocess,
    resample,
    zscore,
)
from sparsemae.data.read import read_volume, voxel_sizes
from sparsemae.data.store import Store
from sparsemae.errors import UserError

OBLIQUE = np.array([[0.8, 0.1, 0, -7], [-0.1, 1.5, 0.2, 3], [0, -0.2, 3.0, 11], [0, 0, 0, 1]])


def world(affine, shape):
    """World mm of every voxel centre, [D, H, W, 3]."""
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return grid @ affine[:3, :3].T + affine[:3, 3]


def noise(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def save(path, array, affine=OBLIQUE):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def test_crop_is_the_smallest_box():
    array = np.zeros((6, 7, 8), np.float32)
    array[1, 2, 3] = array[4, 2, 6] = -1
    cropped, start, stop = crop_nonzero(array)
    assert (start, stop) == ((1, 2, 3), (5, 3, 7))
    assert np.shares_memory(cropped, array)
    assert np.array_equal(cropped, array[1:5, 2:3, 3:7])
    with pytest.raises(ValueError, match="every voxel is zero"):
        crop_nonzero(np.zeros((2, 2, 2)))


def test_zscore_uses_the_nonzero_voxels_and_moves_all():
    array = noise(20, 20, 20) * 40 + 900
    array[:, :10] = 0
    out, background, mean, std = zscore(array)
    inside = array != 0
    assert abs(out[inside].mean(dtype=np.float64)) < 1e-4
    assert abs(out[inside].std(dtype=np.float64) - 1) < 1e-4
    assert (mean, std) == pytest.approx((array[inside].mean(), array[inside].std()), rel=1e-4)
    assert np.all(out[~inside] == background)  # bit for bit: padding continues the air around
    np.testing.assert_allclose(out * std + mean, array, atol=1e-2)


def test_zscore_survives_large_values_and_refuses_a_mask():
    out, *_ = zscore((noise(8, 8, 8) + 5) * np.float32(1e30))
    assert np.isfinite(out).all()
    with pytest.raises(ValueError, match="one value"):
        zscore((noise(8, 8, 8) > 0).astype(np.float32))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 1.1), (3.0, 3.0, 3.0)])
def test_resampling_keeps_world_positions(spacing):
    """A linear function of world position stays that function: no shift by half a voxel."""
    direction = np.array([0.3, -1.1, 0.7])
    array = (world(OBLIQUE, (40, 40, 24)) @ direction).astype(np.float32)
    out, affine = resample(array, OBLIQUE, spacing)
    assert voxel_sizes(affine) == pytest.approx(spacing)
    expected = world(affine, out.shape) @ direction
    # Splines repeat the edge value, so a ramp bends there: compare well inside.
    margin = [
        int(np.ceil(8 * old / new)) for old, new in zip((0.8, 1.5, 3.0), spacing, strict=True)
    ]
    inner = tuple(slice(m, -m) for m in margin)
    assert out[inner].size > 0
    np.testing.assert_allclose(out[inner], expected[inner], atol=2e-3)


def test_resampling_keeps_the_field_of_view():
    array = noise(30, 21, 17)
    out, affine = resample(array, OBLIQUE, (1.0, 1.0, 1.0))
    centre = [
        world(a, s)[[0, -1], [0, -1], [0, -1]].mean(0)
        for a, s in ((OBLIQUE, array.shape), (affine, out.shape))
    ]
    np.testing.assert_allclose(*centre, atol=1e-9)
    extent = np.array(array.shape) * voxel_sizes(OBLIQUE)
    assert np.all(np.abs(out.shape - extent) <= 0.5)


def test_resampling_equals_scipy():
    array = noise(20, 33, 25)
    out, affine = resample(array, OBLIQUE, (1.0, 1.0, 1.0))
    origin = np.linalg.solve(OBLIQUE, affine)[:3, 3]
    expected = ndimage.affine_transform(
        array.astype(np.float64),
        1 / np.array(voxel_sizes(OBLIQUE)),
        origin,
        out.shape,
        order=3,
        mode="nearest",
    )
    np.testing.assert_allclose(out, expected.clip(array.min(), array.max()), atol=1e-5)


def test_resampling_does_not_overshoot_and_leaves_equal_spacing_alone():
    step = np.zeros((16, 16, 16), np.float32)
    step[8:] = 1
    out, _ = resample(step, np.diag([2.0, 2, 2, 1]), (1.0, 1.0, 1.0))
    assert (out.min(), out.max()) == (0, 1)
    same, affine = resample(step, np.diag([1.0005, 1, 1, 1]), (1.0, 1.0, 1.0))
    assert same is step
    assert affine[0, 0] == 1.0005
    with pytest.raises(ValueError, match="more than"):
        resample(step, np.diag([40.0, 40, 40, 1]), (0.01, 0.01, 0.01))


def test_one_axis_resampled_leaves_the_others_exact():
    array = noise(12, 13, 14)
    out, affine = resample(array, np.diag([1.0, 1, 2, 1]), (1.0, 1.0, 1.0))
    assert out.shape == (12, 13, 28)
    np.testing.assert_allclose(affine[:3, 3], (0, 0, -0.5))


def test_case_ids(tmp_path):
    names = ["s1/t1.nii", "s2/t1.nii.gz", "s2/t2.nii", "s2/t1.nii", "s1/a/b_c.nii", "s1/a_b/c.nii"]
    ids = case_ids([tmp_path / n for n in names])
    assert ids == ["s1_t1", "s2_t1", "t2", "s2_t1-2", "b_c", "c"]
    assert len(set(case_ids([tmp_path / n for n in ("a/b_c.nii", "a_b/c.nii", "x/c.nii")]))) == 3


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder, 3, seed=1, size=48)
    return folder


def test_preprocess_records_what_was_done(heads, tmp_path):
    seen = []
    summary = preprocess(
        [heads], tmp_path / "store", spacing=3.0, on_case=lambda *args: seen.append(args)
    )
    assert (summary.ok, summary.rejected, summary.failures) == (3, 0, ())
    assert [(done, total) for done, total, _ in seen] == [(1, 3), (2, 3), (3, 3)]
    store = Store.open(tmp_path / "store")
    assert store == summary.store
    assert store.spacing == (3.0, 3.0, 3.0)
    assert [case.id for case in store.cases] == ["head_00", "head_01", "head_02"]
    assert not (tmp_path / "store" / "failures.jsonl").exists()
    for case in store.cases:
        source = read_volume(case.source)
        cropped, start, stop = crop_nonzero(source.array)
        assert (case.crop_start, case.crop_stop) == (start, stop)
        assert case.source_shape == source.array.shape
        affine = np.array(source.affine)
        affine[:3, 3] = (source.affine @ (*start, 1))[:3]
        resampled, affine = resample(cropped, affine, (3.0, 3.0, 3.0))
        expected, background, *_ = zscore(resampled, cropped)
        assert case.background == background
        np.testing.assert_array_equal(store.read(case)[0], expected)
        np.testing.assert_allclose(case.affine, affine)
        assert case.spacing == pytest.approx((3, 3, 3))


def test_workers_give_the_same_store(heads, tmp_path):
    save(heads / "flat" / "flat.nii", np.ones((4, 4, 4), np.float32))
    one = preprocess([heads], tmp_path / "one", spacing=None)
    two = preprocess([heads], tmp_path / "two", spacing=None, workers=2)
    assert one.store.fingerprint == two.store.fingerprint
    assert one.store.spacing is None
    assert (two.ok, two.rejected) == (3, 1)
    assert two.failures[0].code == "intensity.constant"


def test_orientation_of_the_file_does_not_matter(heads, tmp_path):
    image = nib.load(heads / "head_00.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("SRP"))
    assert nib.aff2axcodes(turned.affine) != nib.aff2axcodes(image.affine)
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(turned, tmp_path / "b.nii.gz")
    store = preprocess([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], tmp_path / "store").store
    a, b = store.cases
    np.testing.assert_array_equal(store.read(a), store.read(b))
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)


def test_a_bad_case_is_recorded_and_the_rest_goes_on(tmp_path):
    save(tmp_path / "src" / "good.nii.gz", noise(8, 8, 8))
    save(tmp_path / "src" / "mask.nii.gz", (noise(8, 8, 8) > 0).astype(np.uint8))
    save(tmp_path / "src" / "huge.nii.gz", noise(90, 90, 90), np.diag([50.0, 50, 50, 1]))
    (tmp_path / "src" / "text.nii").write_text("no image")
    summary = preprocess([tmp_path / "src"], tmp_path / "store")
    assert (summary.ok, summary.rejected) == (1, 3)
    lines = (tmp_path / "store" / "failures.jsonl").read_text().splitlines()
    records = {r["id"]: r for r in map(json.loads, lines)}
    assert {i: (r["code"], r["stage"]) for i, r in records.items()} == {
        "mask": ("intensity.flat", "preprocess"),
        "huge": ("geometry.too_large", "preprocess"),
        "text": ("container.not_nifti", "read"),
    }
    for record in records.values():
        assert set(record) == {"id", "path", "code", "message", "stage", "seconds"}
        assert record["path"] in record["message"]


def test_nothing_usable_is_an_error(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "text.nii").write_text("no image")
    with pytest.raises(UserError, match=r"none of the 1 volumes.*text\.nii"):
        preprocess([tmp_path / "src"], tmp_path / "store")
    assert not (tmp_path / "store" / "index.json").exists()


def test_existing_store(tmp_path):
    save(tmp_path / "src" / "a.nii", noise(8, 8, 8))
    preprocess([tmp_path / "src"], tmp_path / "store")
    with pytest.raises(UserError, match="--overwrite"):
        preprocess([tmp_path / "src"], tmp_path / "store")
    (tmp_path / "src" / "a.nii").rename(tmp_path / "src" / "b.nii")
    store = preprocess([tmp_path / "src"], tmp_path / "store", overwrite=True).store
    assert [case.id for case in store.cases] == ["b"]
    assert [p.name for p in (tmp_path / "store" / "cases").iterdir()] == ["b.b2nd"]


def test_refused_before_anything_is_written(tmp_path):
    save(tmp_path / "src" / "a.nii", noise(8, 8, 8))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    for store, options, message in (
        (tmp_path / "src", {}, "overlap"),
        (tmp_path / "src" / "store", {}, "overlap"),
        (tmp_path, {}, "overlap"),
        (tmp_path / "photos", {}, "other files"),
        (tmp_path / "file", {}, "cannot write"),
        (tmp_path / "store", {"spacing": 0.0}, "spacing 0.0"),
        (tmp_path / "store", {"spacing": (1.0, 1.0)}, "spacing"),
        (tmp_path / "store", {"workers": 0}, "workers 0"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess([tmp_path / "src"], store, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photos", "src"]
    assert [p.name for p in (tmp_path / "src").iterdir()] == ["a.nii"]


def test_a_full_disk_is_no_rejected_case(tmp_path, monkeypatch):
    save(tmp_path / "src" / "a.nii", noise(8, 8, 8))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_array", full)
    with pytest.raises(OSError, match="No space left"):
        preprocess([tmp_path / "src"], tmp_path / "store")
    assert not (tmp_path / "store" / "index.json").exists()


def test_real_images(shared, tmp_path):
    began = time.perf_counter()
    summary = preprocess([shared / "images"], tmp_path / "store", spacing=2.0)
    assert (summary.ok, summary.rejected) == (5, 0)
    for case in summary.store.cases:
        array = summary.store.read(case)
        assert array.shape == (1, *case.shape)
        assert case.spacing == pytest.approx((2, 2, 2))
        assert np.isfinite(array).all()
        if case.background < 0:  # not the CT, where 0 is water
            assert abs(np.median(array[array > case.background + 0.5])) < 0.5
    assert time.perf_counter() - began < 60
