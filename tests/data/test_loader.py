import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from sparsemae.data.loader import PatchDataset, make_loader
from sparsemae.data.store import Case, StoreWriter, write_array
from sparsemae.errors import UserError

SHAPES = [(20, 24, 28), (16, 16, 16), (30, 9, 18), (7, 8, 40), (18, 17, 16)]
PATCH = (16, 12, 16)
IDENTITY = tuple(map(tuple, np.eye(4).tolist()))


def volume(i):
    """Voxel values that tell where they lie."""
    return np.arange(np.prod(SHAPES[i]), dtype=np.float32).reshape(1, *SHAPES[i]) + 1e6 * i


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    writer = StoreWriter(tmp_path_factory.mktemp("loader") / "store", spacing=None)
    for i, shape in enumerate(SHAPES):
        file, size, crc32 = write_array(writer.path, str(i), volume(i))
        writer.add(
            Case(
                id=str(i),
                file=file,
                shape=shape,
                spacing=(1.0, 1.0, 1.0),
                affine=IDENTITY,
                background=-2.5 - i,
                mean=1.0,
                std=1.0,
                crop_start=(0, 0, 0),
                crop_stop=shape,
                source="",
                source_shape=shape,
                source_affine=IDENTITY,
                bytes=size,
                crc32=crc32,
            )
        )
    return writer.commit()


def assert_same(a, b):
    assert a["case"] == b["case"]
    assert torch.equal(a["image"], b["image"])
    assert torch.equal(a["excluded"], b["excluded"])


def test_batches_have_the_promised_form(store):
    batches = list(make_loader(store, PATCH, 3, seed=0, steps=4))
    assert len(batches) == 4
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((3, 1, *PATCH), torch.float32)
        assert (batch["excluded"].shape, batch["excluded"].dtype) == ((3, 1, *PATCH), torch.bool)
        assert len(batch["case"]) == 3
        assert all(isinstance(case, str) for case in batch["case"])


def test_workers_and_start_do_not_change_a_step(store):
    options = {"seed": 3, "steps": 9, "mirror": True}
    expected = list(make_loader(store, PATCH, 2, **options))
    for workers, start in ((2, 0), (0, 5), (2, 5), (0, 9)):
        loader = make_loader(store, PATCH, 2, start_step=start, workers=workers, **options)
        assert len(loader) == 9 - start
        got = list(loader)
        assert len(got) == 9 - start
        for a, b in zip(expected[start:], got, strict=True):
            assert_same(a, b)


def test_every_case_once_per_epoch_in_changing_order(store):
    dataset = PatchDataset(store, PATCH, seed=0)
    assert len(dataset) == 5
    epochs = [[dataset[5 * e + i]["case"] for i in range(5)] for e in range(8)]
    assert all(sorted(epoch) == list("01234") for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 4
    other = PatchDataset(store, PATCH, seed=1)
    assert [other[i]["case"] for i in range(40)] != [case for epoch in epochs for case in epoch]


def test_crops_are_patches_of_the_volume_and_reach_both_ends(store):
    dataset = PatchDataset(store, (16, 16, 16), seed=0)
    starts = set()
    for index in range(400):
        item = dataset[index]
        if item["case"] != "0":
            continue
        assert not item["excluded"].any()
        image = item["image"].numpy()
        start = np.unravel_index(int(image[0, 0, 0, 0]), SHAPES[0])
        box = tuple(slice(a, a + 16) for a in start)
        assert np.array_equal(image, volume(0)[(slice(None), *box)])
        starts.add(start)
    low, high = np.min(list(starts), 0), np.max(list(starts), 0)
    assert low.tolist() == [0, 0, 0]
    assert high.tolist() == [4, 8, 12]


def test_small_volumes_are_centred_and_marked(store):
    dataset = PatchDataset(store, (16, 12, 16), seed=0)
    item = next(dataset[i] for i in range(5) if dataset[i]["case"] == "3")  # 7, 8, 40
    inside = np.zeros((1, 16, 12, 16), bool)
    inside[:, 4:11, 2:10] = True
    assert np.array_equal(item["excluded"].numpy(), ~inside)
    image = item["image"].numpy()
    assert np.all(image[~inside] == np.float32(-5.5))
    voxels = image[inside].reshape(7, 8, 16)
    start = int(voxels[0, 0, 0] - 3e6)
    assert np.array_equal(voxels, volume(3)[0, :, :, start : start + 16])


def test_mirroring_is_keyed_and_moves_image_and_exclusion_together(store):
    plain, mirrored = (PatchDataset(store, PATCH, seed=5, mirror=m) for m in (False, True))
    seen = set()
    for index in range(60):
        a, b = plain[index], mirrored[index]
        assert a["case"] == b["case"]
        matches = []
        for flips in np.ndindex(2, 2, 2):
            axes = [axis + 1 for axis in range(3) if flips[axis]]
            if torch.equal(a["image"].flip(axes), b["image"]):
                assert torch.equal(a["excluded"].flip(axes), b["excluded"])
                matches.append(flips)
        assert len(matches) == 1
        seen.add(matches[0])
        assert_same(b, mirrored[index])
    assert len(seen) == 8


def test_global_random_state_is_untouched(store):
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for workers in (0, 1):
        list(make_loader(store, PATCH, 2, seed=0, steps=2, workers=workers))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)


def test_workers_survive_a_stop_signal(store):
    iterator = iter(make_loader(store, PATCH, 2, seed=0, steps=40, workers=2))
    next(iterator)
    workers = torch.multiprocessing.active_children()
    assert len(workers) == 2
    for worker in workers:
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGUSR1)
    assert sum(1 for _ in iterator) == 39


def test_an_error_in_the_loop_ends_the_process(store):
    """The workers ignore SIGTERM, which is how Python ends them when the iterator still lives."""
    code = f"""
from sparsemae.data.loader import make_loader
from sparsemae.data.store import Store
store = Store.open({str(store.path)!r})
batches = iter(make_loader(store, {PATCH}, 1, seed=0, steps=50, workers=2))
next(batches)
raise SystemExit(7)
"""
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True)
    assert done.returncode == 7, done.stderr.decode()
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("workers", [0, 1])
def test_an_unreadable_case_is_named_in_one_line(store, tmp_path, workers):
    file = store.path / store.cases[2].file
    data = file.read_bytes()
    try:
        file.write_bytes(b"\0" * len(data))
        with pytest.raises(UserError, match=r"^case 2: cannot read") as caught:
            list(make_loader(store, PATCH, 1, seed=0, steps=5, workers=workers))
        assert "\n" not in str(caught.value)
    finally:
        file.write_bytes(data)


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
    ],
)
def test_impossible_options(store, options, message):
    with pytest.raises(ValueError, match=message):
        make_loader(store, PATCH, **{"batch_size": 2, "seed": 0, "steps": 3, **options})
