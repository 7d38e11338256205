"""Preparing a data set once: what is kept, what is made again, and what is refused."""

import json
import os
import threading
import time

import nibabel
import numpy as np
import pytest

from sparsemae.data.storing.frame import read_array
from sparsemae.errors import UserError
from sparsemae.files import locked
from sparsemae.segmentation.dataset import read_dataset
from sparsemae.segmentation.making import LOCK, prepare_store
from sparsemae.segmentation.prepare import prepare_case
from sparsemae.segmentation.reading import read_case
from sparsemae.segmentation.store import LabelledStore


@pytest.fixture
def dataset(tmp_path, draw_labelled):
    return read_dataset(draw_labelled(tmp_path / "Dataset001_Few", 3, channels=2))


def times(store):
    files = [file.file for case in store.cases for file in case.files]
    return {name: os.stat(store.path / name).st_mtime_ns for name in files}


def test_a_store_holds_what_preparing_gives(dataset, tmp_path, make_plan):
    plan = make_plan(2, spacing=[1.0, 1.5, 2.0])
    store = prepare_store(dataset, plan, tmp_path / "stores")
    assert [case.id for case in store.cases] == ["case_0", "case_1", "case_2"]
    for source, case in zip(dataset.training, store.cases, strict=True):
        ready = prepare_case(*read_case(source, dataset.classes), plan)
        whole = ((0, 0, 0), case.shape)
        assert case.shape == ready.labels.shape
        np.testing.assert_array_equal(store.read_labels(case, *whole), ready.labels)
        np.testing.assert_allclose(store.read_image(case, *whole), ready.array, atol=2e-3)
        np.testing.assert_allclose(case.affine, ready.affine)
        part = store.read_image(case, (1, 2, 3), (5, 6, 8))
        np.testing.assert_array_equal(part, store.read_image(case, *whole)[:, 1:5, 2:6, 3:8])
        for number, count in enumerate(case.counts, start=1):
            assert count == (ready.labels == number).sum()
            for which in (0, count // 2, count - 1):
                assert ready.labels[tuple(store.location(case, number, which))] == number


def test_workers_make_the_same_bytes(dataset, tmp_path, make_plan):
    one = prepare_store(dataset, make_plan(2), tmp_path / "one")
    two = prepare_store(dataset, make_plan(2), tmp_path / "two", workers=2)
    assert one.fingerprint == two.fingerprint
    for case in one.cases:
        for file in case.files:
            assert (one.path / file.file).read_bytes() == (two.path / file.file).read_bytes()


def test_run_again_nothing_is_made_but_what_changed(dataset, tmp_path, make_plan):
    folder = tmp_path / "stores"
    before = times(prepare_store(dataset, make_plan(2), folder))
    assert times(prepare_store(dataset, make_plan(2), folder)) == before
    image = dataset.training[1].images[0]
    old = nibabel.load(image)
    nibabel.save(nibabel.Nifti1Image(old.get_fdata(dtype=np.float32) * 2 + 1, old.affine), image)
    store = prepare_store(dataset, make_plan(2), folder)
    (store.path / store.cases[2].labels.file).unlink()
    after = times(prepare_store(dataset, make_plan(2), folder))
    same = {name for name in before if after.get(name) == before[name]}
    assert same == {f.file for f in store.cases[0].files}
    # a run that reads the old voxels goes on
    assert all((store.path / name).is_file() for name in before)


def test_voxels_beside_their_header_are_looked_at_too(tmp_path, draw_labelled, make_plan):
    folder = draw_labelled(tmp_path / "Dataset001_Pairs", 1)
    image = nibabel.load(folder / "imagesTr" / "case_0_0000.nii.gz")
    array = np.asarray(image.dataobj)
    for path in (folder / "imagesTr").iterdir():
        path.unlink()
    pair = folder / "imagesTr" / "case_0_0000.hdr"
    nibabel.save(nibabel.Nifti1Pair(array, image.affine), pair)
    about = json.loads((folder / "dataset.json").read_text())
    files = {"images": [f"imagesTr/{pair.name}"], "label": "labelsTr/case_0.nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about | {"dataset": {"case_0": files}}))
    dataset = read_dataset(folder)
    before = prepare_store(dataset, make_plan(), tmp_path / "stores")
    header, status = pair.read_bytes(), pair.stat()
    nibabel.save(nibabel.Nifti1Pair(array[::-1].copy(), image.affine), pair)
    pair.write_bytes(header)
    os.utime(pair, ns=(status.st_atime_ns, status.st_mtime_ns))  # nothing but the voxels changed
    after = prepare_store(dataset, make_plan(), tmp_path / "stores")
    assert after.fingerprint != before.fingerprint


def test_two_data_sets_of_one_name_do_not_meet(tmp_path, draw_labelled, make_plan):
    stores = []
    for parent in ("a", "b"):
        dataset = read_dataset(draw_labelled(tmp_path / parent / "Dataset001_Few", 2))
        stores.append(prepare_store(dataset, make_plan(), tmp_path / "stores"))
    assert stores[0].path != stores[1].path


def test_whatever_ends_it_what_is_whole_is_kept(dataset, tmp_path, make_plan, monkeypatch):
    from sparsemae.segmentation import making

    prepare = making._prepare

    def full(job):
        if job.case.id == "case_2":
            raise OSError(28, "No space left on device")
        return prepare(job)

    monkeypatch.setattr(making, "_prepare", full)
    with pytest.raises(OSError, match="No space left"):
        prepare_store(dataset, make_plan(2), tmp_path / "stores")
    (store,) = (tmp_path / "stores").iterdir()
    assert [case.id for case in LabelledStore.open(store).cases] == ["case_0", "case_1"]


def test_a_file_in_place_of_the_folder_is_named(dataset, tmp_path, make_plan):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="choose another --store"):
        prepare_store(dataset, make_plan(2), tmp_path / "file")


def test_plans_share_a_store_where_the_voxels_are_equal(dataset, tmp_path, make_plan):
    folder = tmp_path / "stores"
    first = prepare_store(dataset, make_plan(2), folder)
    other = make_plan(2, features_per_stage=[8, 8], patch_size=[8, 8, 8], batch_size=3)
    assert prepare_store(dataset, other, folder).path == first.path
    assert prepare_store(dataset, make_plan(2, spacing=[2, 1, 1.0]), folder).path != first.path


def test_all_unfit_cases_are_named_and_the_others_kept(dataset, tmp_path, make_plan):
    label = dataset.training[0].label
    image = nibabel.load(label)
    nibabel.save(nibabel.Nifti1Image(image.get_fdata() * 0.5, image.affine), label)
    (dataset.training[2].images[1]).write_bytes(b"no image")
    with pytest.raises(UserError) as caught:
        prepare_store(dataset, make_plan(2), tmp_path / "stores")
    message = str(caught.value)
    assert "2 cases cannot be used" in message
    assert "case_0: " in message
    assert "case_2: " in message
    assert "a label of 0.5" in message
    (store,) = (tmp_path / "stores").iterdir()
    assert [case.id for case in LabelledStore.open(store).cases] == ["case_1"]


def test_a_damaged_chunk_is_found_and_named(dataset, tmp_path, make_plan):
    store = prepare_store(dataset, make_plan(2), tmp_path / "stores")
    file = store.cases[0].images[0]
    path = store.path / file.file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match=r"damaged: .*sparsemae finetune") as caught:
        store.read_image(store.cases[0], (0, 0, 0), store.cases[0].shape)
    assert str(path) in str(caught.value)
    assert read_array(store.path, store.cases[1].images[0], (0, 0, 0), (2, 2, 2)).size == 8


def test_a_damaged_index_is_made_anew(dataset, tmp_path, make_plan):
    store = prepare_store(dataset, make_plan(2), tmp_path / "stores")
    index = store.path / "index.json"
    raw = json.loads(index.read_text())
    raw["cases"][0]["shape"][0] += 1
    index.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="damaged index"):
        LabelledStore.open(store.path)
    again = prepare_store(dataset, make_plan(2), tmp_path / "stores")
    assert again.fingerprint == store.fingerprint


def test_a_second_process_waits_for_the_first(dataset, tmp_path, make_plan, monkeypatch):
    monkeypatch.setattr("sparsemae.segmentation.making._WAIT", 0.05)
    folder = prepare_store(dataset, make_plan(2), tmp_path / "stores").path
    done = threading.Event()

    def prepare():
        prepare_store(dataset, make_plan(2), tmp_path / "stores")
        done.set()

    with locked(folder / LOCK, busy="in use"):
        thread = threading.Thread(target=prepare)
        thread.start()
        time.sleep(0.5)
        assert not done.is_set()
    thread.join(10)
    assert done.is_set()


def test_what_a_kill_left_half_written_is_removed(dataset, tmp_path, make_plan):
    """Also where nothing else is left to do."""
    store = prepare_store(dataset, make_plan(2), tmp_path / "stores")
    file = store.cases[0].labels.file
    for name in ("index.json.0a1b2c3d.tmp", f"{file}.0a1b2c3d.tmp"):
        (store.path / name).write_bytes(b"{")
    before = times(store)
    assert times(prepare_store(dataset, make_plan(2), tmp_path / "stores")) == before
    assert not list(store.path.rglob("*.tmp"))


def test_stopped_it_keeps_what_is_whole(dataset, tmp_path, make_plan):
    asked = []

    def stopped():
        asked.append(1)
        return len(asked) > 1

    assert prepare_store(dataset, make_plan(2), tmp_path / "stores", stopped=stopped) is None
    (store,) = (tmp_path / "stores").iterdir()
    kept = LabelledStore.open(store)
    assert len(kept) == 1
    before = times(kept)
    whole = prepare_store(dataset, make_plan(2), tmp_path / "stores")
    assert len(whole) == 3
    assert before.items() <= times(whole).items()


def test_only_gives_cases_that_are_there(prepared):
    assert [case.id for case in prepared.only(["case_2", "case_0"]).cases] == ["case_0", "case_2"]
    assert prepared.only(["case_0"]).fingerprint != prepared.only(["case_1"]).fingerprint
    with pytest.raises(UserError, match="case case_9 is not in it"):
        prepared.only(["case_9"])
