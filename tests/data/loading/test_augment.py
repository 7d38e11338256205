"""Patches on the training device against scipy's resampling of the whole volume."""

import numpy as np
import pytest
import torch
from scipy.ndimage import affine_transform, gaussian_filter

from sparsemae.data.loading import samples as module
from sparsemae.data.loading.affine import AugmentConfig, draw
from sparsemae.data.loading.augment import assemble
from sparsemae.data.loading.order import generator_of
from sparsemae.data.loading.samples import RawBatch, SampleReader
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import Store, write_index

SHAPES = [(40, 44, 48), (50, 33, 41), (20, 60, 18), (26, 30, 34), (17, 16, 15)]
PATCH = (24, 20, 22)
ALWAYS = AugmentConfig(rotation_probability=1.0, scale_probability=1.0)
SPACINGS = [(1.0, 1.0, 1.0), (3.0, 1.0, 1.0), (0.5, 2.0, 1.0), (1.0, 1.0, 1.0), (1.0, 1.5, 1.0)]


def volume(i):
    rng = np.random.default_rng(i)
    array = gaussian_filter(rng.standard_normal(SHAPES[i]), 1.0)
    return (array / array.std()).astype(np.float32)


def mask(i):
    return gaussian_filter(np.random.default_rng(50 + i).standard_normal(SHAPES[i]), 2.0) > 0.03


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_case):
    """Two cases with excluded voxels; two are smaller than the patch."""
    path = tmp_path_factory.mktemp("augment")
    fields = [{"spacing": SPACINGS[i], "background": -2.5 - i} for i in range(5)]
    masks = [mask(i) if i in (1, 4) else None for i in range(5)]
    cases = [make_case(path, str(i), volume(i), masks[i], "float32", **fields[i]) for i in range(5)]
    write_index(path, cases, PreprocessConfig(dtype="float32"))
    return Store.open(path)


def assembled(*parts):
    return assemble(RawBatch(PATCH, parts).map(torch.from_numpy))


def drawn(reader, sample):
    """Case number, first voxel of the patch, and transform of a sample."""
    case = reader.case_of(sample)
    rng = generator_of(sample, len(reader.store), reader.seed)
    return int(case.id), reader._begin(case, rng.random(5)), draw(rng, reader.augment, case.spacing)


def reference(i, begin, matrix):
    """The patch and its excluded voxels, from the whole volume, in float64."""
    half = (np.array(PATCH) - 1) / 2
    centre = begin + half
    options = {
        "matrix": matrix,
        "offset": centre - matrix @ half,
        "output_shape": PATCH,
        "mode": "grid-constant",
    }
    image = affine_transform(volume(i).astype(float), order=1, cval=-2.5 - i, **options)
    left_out = mask(i) if i in (1, 4) else np.zeros(SHAPES[i], bool)
    return image, affine_transform(left_out.astype(np.uint8), order=0, cval=1, **options) == 1


@pytest.mark.parametrize("seed", range(3))
def test_resampling_equals_scipys_of_the_whole_volume(store, seed):
    reader = SampleReader(store, PATCH, seed=seed, augment=ALWAYS)
    batch = assembled(*(reader(i) for i in range(15)))
    beyond = 0
    for sample in range(15):
        i, begin, one = drawn(reader, sample)
        image, excluded = reference(i, begin, one.matrix)
        assert batch["case"][sample] == str(i)
        assert np.abs(batch["image"][sample, 0].numpy() - image).max() < 1e-4
        wrong = batch["excluded"][sample, 0].numpy() != excluded
        assert wrong.mean() < 1e-4  # a point that lies in the middle of two voxels
        beyond += excluded.any()
    assert beyond > 5


@pytest.mark.parametrize(
    "options",
    [
        {"rotation_probability": 0.0, "scale_probability": 1.0, "scale": (0.6, 0.6)},
        {"rotation_probability": 0.0, "scale_probability": 1.0, "scale": (2.1, 2.1)},
        {"rotation_probability": 1.0, "scale_probability": 0.0, "rotation": 180.0},
        {"rotation_probability": 1.0, "scale_probability": 0.0, "mirror": False},
    ],
    ids=["zoom in", "zoom out", "any angle", "no flips"],
)
def test_each_transform_alone_equals_scipys(store, options):
    reader = SampleReader(store, PATCH, seed=9, augment=AugmentConfig(**options))
    batch = assembled(*(reader(i) for i in range(10)))
    for sample in range(10):
        i, begin, one = drawn(reader, sample)
        image, excluded = reference(i, begin, one.matrix)
        found = batch["image"][sample, 0].numpy()
        assert np.abs(found - image).max() < 1e-4
        assert (batch["excluded"][sample, 0].numpy() != excluded).mean() < 1e-3


def test_the_same_crop_is_seen_through_every_augmentation(store):
    """The middle of the patch shows the same place of the volume with and without resampling."""
    plain = SampleReader(store, (1, 1, 1), seed=4)
    turned = SampleReader(store, (1, 1, 1), seed=4, augment=ALWAYS)
    for i in range(20):
        a, b = (
            assemble(RawBatch((1, 1, 1), (r(i),)).map(torch.from_numpy)) for r in (plain, turned)
        )
        assert torch.allclose(a["image"], b["image"], atol=1e-4)


def test_flips_are_exact_copies(store):
    only = AugmentConfig(rotation_probability=0.0, scale_probability=0.0)
    plain = SampleReader(store, PATCH, seed=1)
    mirrored = SampleReader(store, PATCH, seed=1, augment=only)
    seen = set()
    for i in range(40):
        _, _, one = drawn(mirrored, i)
        a, b = assembled(plain(i)), assembled(mirrored(i))
        axes = [2 + axis for axis in range(3) if one.flips[axis]]
        assert torch.equal(a["image"].flip(axes), b["image"])
        assert torch.equal(a["excluded"].flip(axes), b["excluded"])
        seen.add((a["case"][0], one.flips))
    assert len({flips for _, flips in seen}) == 8


def test_a_patch_beyond_the_volume_is_background_and_excluded(store):
    reader = SampleReader(store, PATCH, seed=0)
    for i in range(10):
        sample = reader(i)
        n = int(sample.case)
        batch = assembled(sample)
        image, excluded = batch["image"][0, 0].numpy(), batch["excluded"][0, 0].numpy()
        expected, left_out = reference(*drawn_plain(reader, i), np.eye(3))
        assert np.array_equal(image, expected.astype(np.float32))
        assert np.array_equal(excluded, left_out)
        assert sample.beyond == any(a < b for a, b in zip(SHAPES[n], PATCH, strict=True))


def drawn_plain(reader, sample):
    case = reader.case_of(sample)
    rng = generator_of(sample, len(reader.store), reader.seed)
    return int(case.id), reader._begin(case, rng.random(5))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_sample_does_not_depend_on_its_mates(tmp_path, make_store, dtype):
    """Bit for bit: alone, in batches of none, some and all resampled, in any order."""
    store = make_store(tmp_path, {str(i): volume(i) for i in range(4)}, dtype=dtype)
    reader = SampleReader(store, PATCH, seed=2, augment=AugmentConfig(scale_probability=0.4))
    parts = [reader(i) for i in range(24)]
    resampled = [part.grid is not None for part in parts]
    assert 4 < sum(resampled) < 20
    alone = [assembled(part) for part in parts]
    assert all(part.voxels.dtype == dtype for part in parts)
    order = np.random.default_rng(0).permutation(24)
    groups = [order[:5], order[5:12], order[12:]]
    groups += [np.flatnonzero(resampled), np.flatnonzero(~np.array(resampled))]
    for group in groups:
        batch = assembled(*(parts[i] for i in group))
        assert batch["image"].dtype == torch.float32
        assert batch["image"].shape == batch["excluded"].shape == (len(group), 1, *PATCH)
        for row, i in enumerate(group):
            assert torch.equal(batch["image"][row], alone[i]["image"][0])
            assert torch.equal(batch["excluded"][row], alone[i]["excluded"][0])


def test_the_number_of_threads_does_not_matter(store):
    reader = SampleReader(store, PATCH, seed=2, augment=ALWAYS)
    found, threads = [], torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(assembled(*(reader(i) for i in range(4))))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0]["image"], found[1]["image"])
    assert torch.equal(found[0]["excluded"], found[1]["excluded"])


def test_voxels_that_are_read(store, monkeypatch):
    """Exactly the patch without resampling, the least box with it, masks only where there are."""
    read = []

    def count(self, case, start, stop, kind="image"):
        read.append((kind, case.id, tuple(b - a for a, b in zip(start, stop, strict=True))))
        return original(self, case, start, stop, kind)

    original = Store.read_box
    monkeypatch.setattr(Store, "read_box", count)
    reader = SampleReader(store, PATCH, seed=0, augment=AugmentConfig())
    for i in range(60):
        read.clear()
        sample = reader(i)
        n = int(sample.case)
        kinds = ["image", "excluded"] if n in (1, 4) else ["image"]
        assert sorted(kind for kind, *_ in read) == sorted(kinds)
        assert len({box for *_, box in read}) == 1
        size = read[0][2]
        assert size == sample.voxels.shape
        if sample.grid is None:
            assert size == tuple(np.minimum(SHAPES[n], PATCH))
        else:
            _, begin, one = drawn(reader, i)
            start, stop, _ = module.needed_box(begin, PATCH, one.matrix, SHAPES[n])
            assert size == tuple(np.subtract(stop, start))


def test_voxels_outside_the_box_have_no_influence(store):
    """The box holds all that interpolation reads: the same from a volume that is 1e9 elsewhere."""
    reader = SampleReader(store, PATCH, seed=3, augment=ALWAYS)
    for i in range(10):
        batch = assembled(reader(i))
        assert batch["image"].isfinite().all()
        n, begin, one = drawn(reader, i)
        start, stop, _ = module.needed_box(begin, PATCH, one.matrix, SHAPES[n])
        array = np.full(SHAPES[n], 1e9)
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        array[box] = volume(n)[box]
        half = (np.array(PATCH) - 1) / 2
        expected = affine_transform(
            *(array, one.matrix, begin + half - one.matrix @ half, PATCH),
            **{"order": 1, "mode": "grid-constant", "cval": -2.5 - n},
        )
        assert np.abs(batch["image"][0, 0].numpy() - expected).max() < 1e-4


@pytest.mark.gpu
def test_the_gpu_gives_what_the_cpu_gives_without_waiting(store):
    reader = SampleReader(store, PATCH, seed=2, augment=AugmentConfig(scale_probability=0.5))
    raw = RawBatch(PATCH, tuple(reader(i) for i in range(12))).map(torch.from_numpy)
    there = raw.map(torch.Tensor.cuda)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = assemble(there)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = assemble(raw)
    assert torch.allclose(found["image"].cpu(), expected["image"], atol=1e-4)
    assert (found["excluded"].cpu() != expected["excluded"]).float().mean() < 1e-4
