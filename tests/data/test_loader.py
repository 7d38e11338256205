"""The stream of samples: a function of the seed, whatever reads it, where and from when."""

import multiprocessing
import threading

import numpy as np
import pytest
import torch

from sparsemae.data.loader import DataConfig, make_loader
from sparsemae.data.loading.affine import AugmentConfig
from sparsemae.data.loading.prefetch import one_ahead, to_device_ahead
from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import Store, decode_blocks, encode_blocks, write_index
from sparsemae.errors import UserError

SHAPES = [(20, 24, 28), (16, 16, 16), (30, 9, 18), (7, 8, 40), (18, 17, 16)]
PATCH = (16, 12, 16)
AUGMENT = AugmentConfig(rotation_probability=0.3, scale_probability=0.3)
MIRROR = AugmentConfig(rotation_probability=0.0, scale_probability=0.0)


def volume(i):
    """Voxel values that tell where they lie."""
    return np.arange(np.prod(SHAPES[i]), dtype=np.float32).reshape(SHAPES[i]) + 1e6 * i


@pytest.fixture(scope="module")
def store(tmp_path_factory, make_case):
    path = tmp_path_factory.mktemp("loader")
    hidden = np.zeros(SHAPES[2], bool)
    hidden[3:9] = True
    cases = [
        make_case(
            *(path, str(i), volume(i), hidden if i == 2 else None, "float32"), background=-2.5 - i
        )
        for i in range(5)
    ]
    write_index(path, cases, PreprocessConfig(dtype="float32"))
    return Store.open(path)


def stream(store, batch_size=2, patch_size=PATCH, **options):
    loader = make_loader(store, patch_size, batch_size, **{"seed": 3, "steps": 9} | options)
    return list(to_device_ahead(loader, "cpu"))


def assert_same(expected, found):
    assert len(expected) == len(found)
    for a, b in zip(expected, found, strict=True):
        assert a["case"] == b["case"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["excluded"], b["excluded"])


def test_batches_have_the_promised_form(store):
    batches = stream(store, 3, steps=4, augment=AUGMENT)
    assert len(batches) == 4
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((3, 1, *PATCH), torch.float32)
        assert (batch["excluded"].shape, batch["excluded"].dtype) == ((3, 1, *PATCH), torch.bool)
        assert len(batch["case"]) == 3
        assert all(isinstance(case, str) for case in batch["case"])


@pytest.mark.parametrize(("workers", "start"), [(2, 0), (3, 0), (0, 5), (2, 5), (3, 7), (0, 9)])
def test_workers_and_start_do_not_change_a_step(store, workers, start):
    options = {"augment": AUGMENT, "foreground": 0.5}
    whole = stream(store, **options)
    loader = make_loader(store, PATCH, 2, seed=3, steps=9, start_step=start)
    assert len(loader) == 9 - start
    assert_same(whole[start:], stream(store, start_step=start, workers=workers, **options))


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 0), (2, 2)])
def test_ranks_share_each_batch(store, ranks, workers):
    """Bit for bit the samples of one rank, where other samples shared a batch with them."""
    whole = stream(store, 4, augment=AUGMENT)
    parts = [
        stream(store, 4, augment=AUGMENT, rank=r, world_size=ranks, workers=workers, start_step=2)
        for r in range(ranks)
    ]
    joined = [
        {
            "image": torch.cat([p["image"] for p in step]),
            "excluded": torch.cat([p["excluded"] for p in step]),
            "case": [case for p in step for case in p["case"]],
        }
        for step in zip(*parts, strict=True)
    ]
    assert_same(whole[2:], joined)


def test_a_run_can_go_on_after_any_number_of_steps(store):
    far = 10**15
    batches = stream(store, start_step=far, steps=far + 3)
    assert_same(batches[1:], stream(store, start_step=far + 1, steps=far + 3))


def test_the_batch_size_only_cuts_the_stream(store):
    ones, fives = stream(store, 1, steps=15), stream(store, 5, steps=3)
    assert torch.equal(
        torch.cat([b["image"] for b in ones]), torch.cat([b["image"] for b in fives])
    )


def test_every_case_once_per_epoch_in_changing_order(store):
    def epochs(seed):
        cases = [batch["case"][0] for batch in stream(store, 1, steps=40, seed=seed)]
        return [cases[5 * e : 5 * e + 5] for e in range(8)]

    assert all(sorted(epoch) == list("01234") for epoch in epochs(0))
    assert len(set(map(tuple, epochs(0)))) > 4
    assert epochs(0) != epochs(1)


def test_crops_are_patches_of_the_volume_and_reach_both_ends(store):
    starts = set()
    for batch in stream(store, 1, (16, 16, 16), steps=400):
        if batch["case"] != ["0"]:
            continue
        assert not batch["excluded"].any()
        image = batch["image"][0, 0].numpy()
        start = np.unravel_index(int(image[0, 0, 0]), SHAPES[0])
        assert np.array_equal(image, volume(0)[tuple(slice(a, a + 16) for a in start)])
        starts.add(start)
    low, high = np.min(list(starts), 0), np.max(list(starts), 0)
    assert low.tolist() == [0, 0, 0]
    assert high.tolist() == [4, 8, 12]


def test_small_volumes_are_centred_and_marked(store):
    batch = next(b for b in stream(store, 1) if b["case"] == ["3"])  # 7, 8, 40
    inside = np.zeros(PATCH, bool)
    inside[4:11, 2:10] = True
    assert np.array_equal(batch["excluded"][0, 0].numpy(), ~inside)
    image = batch["image"][0, 0].numpy()
    assert np.all(image[~inside] == np.float32(-5.5))
    voxels = image[inside].reshape(7, 8, 16)
    start = int(voxels[0, 0, 0] - 3e6)
    assert np.array_equal(voxels, volume(3)[:, :, start : start + 16])


def test_mirroring_keeps_the_crops(store):
    seen = set()
    plain, mirrored = (stream(store, 1, steps=60, augment=a) for a in (None, MIRROR))
    for a, b in zip(plain, mirrored, strict=True):
        assert a["case"] == b["case"]
        matches = [
            flips
            for flips in np.ndindex(2, 2, 2)
            if torch.equal(a["image"].flip([2 + i for i in range(3) if flips[i]]), b["image"])
        ]
        assert len(matches) == 1
        axes = [2 + i for i in range(3) if matches[0][i]]
        assert torch.equal(a["excluded"].flip(axes), b["excluded"])
        seen.add(matches[0])
    assert len(seen) == 8


def test_excluded_voxels_come_with_their_patch(store):
    for batch in stream(store, 1, (30, 9, 18), steps=10):
        if batch["case"] == ["2"]:
            excluded = batch["excluded"][0, 0]
            assert excluded[3:9].all()
            assert not excluded[:3].any()
            assert not excluded[9:].any()


@pytest.fixture(scope="module")
def spots(tmp_path_factory, make_store):
    """Volumes of 64 x 48 x 40 with foreground in few blocks, one without any that is known."""
    foreground = np.zeros((64, 48, 40), bool)
    foreground[16:32, 16:32, 16:32] = foreground[40:64, :16, 32:] = True
    array = np.arange(foreground.size, dtype=np.float32).reshape(foreground.shape)
    text = encode_blocks(foreground)
    path = tmp_path_factory.mktemp("spots")
    return make_store(path, {"a": array}, dtype="float32", foreground=text)


def centres(store, patch_size, **options):
    for batch in stream(store, 1, patch_size, steps=300, **options):
        first = int(batch["image"][0, 0, 0, 0, 0])
        yield np.unravel_index(first, (64, 48, 40)) + np.array(patch_size) // 2


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_the_given_fraction_of_patches_is_centred_on_foreground(spots, fraction):
    """Uniformly: the corner block, of which only a part can be a centre, no less than the other."""
    patch = (20, 12, 14)
    blocks = decode_blocks(spots.cases[0].foreground, (64, 48, 40))
    found = np.array(list(centres(spots, patch, foreground=fraction)))
    assert (found >= np.array(patch) // 2).all()
    assert (found <= np.array((64, 48, 40)) - np.array(patch) + np.array(patch) // 2).all()
    on = np.array([blocks[tuple(c // 16)] for c in found])
    able = np.zeros((64, 48, 40), bool)  # all places of a centre
    able[10:55, 6:43, 7:34] = True
    chance = np.kron(blocks, np.ones((16, 16, 16), bool))[:64, :48, :40][able].mean()
    assert abs(on.mean() - (fraction + (1 - fraction) * chance)) < 0.1
    if fraction == 1:
        assert on.all()
        assert {tuple(c // 16) for c in found} == {(1, 1, 1), (2, 0, 2), (3, 0, 2)}
        middle = found[(found // 16 == 1).all(1)]
        assert (middle.min(0) == 16).all()
        assert (middle.max(0) == 31).all()


def test_foreground_that_cannot_be_a_centre_is_let_be(spots):
    patch = (64, 48, 40)
    assert all((c == np.array(patch) // 2).all() for c in centres(spots, patch, foreground=1.0))
    larger = stream(spots, 1, (80, 48, 40), steps=2, foreground=1.0)
    assert larger[0]["excluded"][0, 0].sum() == 16 * 48 * 40


def test_global_random_state_is_untouched(store):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        stream(store, steps=2, workers=workers, augment=AUGMENT)
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_one_ahead_passes_items_and_errors_on():
    def stage(item):
        if item == 4:
            raise KeyError(item)
        return -item

    staged = one_ahead(range(10), stage)
    assert [next(staged) for _ in range(4)] == [0, -1, -2, -3]
    with pytest.raises(KeyError, match="4"):
        next(staged)
    assert list(one_ahead([], stage)) == []
    assert list(one_ahead([3, 2], stage)) == [-3, -2]


@pytest.mark.timeout(30)
def test_one_ahead_is_one_ahead():
    made = [threading.Event() for _ in range(10)]
    staged = one_ahead(range(10), lambda item: made[item].set())
    for item in range(3):
        next(staged)
        assert made[item + 1].wait(20)
        assert not made[item + 2].wait(0.05)
    staged.close()
    assert not made[4].is_set()
    assert "sparsemae-prefetch" not in {thread.name for thread in threading.enumerate()}


def test_one_ahead_ends_its_thread_and_its_source(store):
    staged = one_ahead(make_loader(store, PATCH, 2, seed=0, steps=50, workers=2), lambda b: b)
    for _ in range(2):
        next(staged)
    assert len(multiprocessing.active_children()) == 2
    staged.close()
    assert multiprocessing.active_children() == []
    assert "sparsemae-prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.mark.gpu
def test_the_stream_is_the_same_through_pinned_memory(store):
    loader = make_loader(store, PATCH, 4, seed=3, steps=20, workers=2, augment=AUGMENT)
    found = list(to_device_ahead(loader, "cuda"))
    assert all(batch["image"].is_cuda for batch in found)
    expected = stream(store, 4, steps=20, augment=AUGMENT)
    for a, b in zip(expected, found, strict=True):
        assert a["case"] == b["case"]
        # values up to 4e6 tell where a voxel lies; a resampled one is off by rounding alone
        assert torch.allclose(a["image"], b["image"].cpu(), rtol=1e-4, atol=1e-1)


@pytest.mark.parametrize("patch_size", [(16, 0, 16), (16, -4, 16), (16, 16)])
def test_impossible_patch(store, patch_size):
    with pytest.raises(ValueError, match="patch_size"):
        make_loader(store, patch_size, 2, seed=0, steps=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size 0"),
        ({"start_step": 4}, "start_step 4"),
        ({"seed": -1}, "seed -1"),
        ({"foreground": 1.5}, "foreground 1.5"),
        ({"rank": 2, "world_size": 2}, "rank 2"),
    ],
)
def test_impossible_options(store, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(store, PATCH, **{"batch_size": 2, "seed": 0, "steps": 3, **options})


@pytest.mark.parametrize(("batch", "ranks", "valid"), [(7, 4, "4 and 8"), (2, 3, "3")])
def test_a_batch_that_ranks_cannot_share_is_refused(store, batch, ranks, valid):
    with pytest.raises(UserError) as error:
        make_loader(store, PATCH, batch, seed=0, steps=1, rank=0, world_size=ranks)
    assert str(error.value) == (
        f"data.batch_size {batch} does not divide by {ranks} ranks: "
        f"the nearest valid sizes are {valid}"
    )


def test_a_store_without_training_cases_is_refused(store):
    with pytest.raises(UserError, match="has no cases to train on"):
        make_loader(store.split("val"), PATCH, 2, seed=0, steps=1)


def test_the_section_of_a_config_is_the_augmentation_too():
    config = DataConfig(patch_size=16, batch_size=2, scale=[0.9, 1.1])
    assert config.patch_size == (16, 16, 16)
    assert config.scale == (0.9, 1.1)
    assert (config.rotation, config.mirror, config.foreground) == (30.0, True, 0.0)
