"""From files to a store: what is recorded, refused, left out, split and shared among shards."""

import dataclasses
import itertools
import json
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from sparsemae.data.codes import CODES
from sparsemae.data.making.case import content_of
from sparsemae.data.making.workers import Lost
from sparsemae.data.options import FilterConfig, PreprocessConfig
from sparsemae.data.phantom import write_heads
from sparsemae.data.preprocess import Shard, preprocess
from sparsemae.data.read import read_volume
from sparsemae.data.store import Store
from sparsemae.data.transforms import prepare
from sparsemae.errors import UserError

KEEP = PreprocessConfig(spacing=None)


def records(store, name="failures.jsonl"):
    file = store / name
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def flat(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.ones((8, 8, 8), np.float32), np.eye(4)), path)


@pytest.fixture(scope="module")
def heads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("heads")
    write_heads(folder, 3, seed=1, size=48)
    return folder


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_store_holds_what_prepare_makes(heads, tmp_path, dtype):
    config = PreprocessConfig(spacing=3.0, dtype=dtype)
    seen = []
    summary = preprocess(
        [heads], tmp_path / "store", config, on_outcome=lambda p, o: seen.append((p.done, o))
    )
    assert (summary.progress.ok, summary.progress.rejected, summary.failures) == (3, 0, ())
    assert [(done, o and o.id) for done, o in seen] == [
        (0, None), (1, "head_00"), (2, "head_01"), (3, "head_02")
    ]  # fmt: skip
    store = Store.open(tmp_path / "store")
    assert store.config == config
    assert store.fingerprint == summary.store.fingerprint
    for case in store.cases:
        source = read_volume(case.source)
        ready = prepare(source, config)
        stored = store.read(case)
        assert stored.dtype == dtype
        np.testing.assert_array_equal(stored[0].astype(np.float32), ready.array)
        assert (case.background, case.mean, case.std) == (ready.background, ready.mean, ready.std)
        assert (case.crop_start, case.crop_stop) == (ready.crop_start, ready.crop_stop)
        assert case.source_shape == source.array.shape
        np.testing.assert_allclose(case.affine, ready.affine)
        np.testing.assert_allclose(case.source_affine, source.affine)
        assert case.spacing == pytest.approx((3, 3, 3))
        assert (case.subject, case.dataset) == (case.id, heads.name)
    assert sorted(p.name for p in (tmp_path / "store").iterdir()) == [
        *(".lock", "cases", "index.json")
    ]


def test_processes_give_the_same_store(heads, tmp_path, contents):
    flat(heads / "flat" / "flat.nii")
    for i, workers in enumerate((0, 1, 2)):
        summary = preprocess([heads], tmp_path / f"{i}", KEEP, workers=workers)
        assert (summary.progress.ok, summary.progress.rejected) == (3, 1)
        assert [f.code for f in summary.failures] == ["intensity.constant"]
    shutil.rmtree(heads / "flat")
    assert contents(tmp_path / "0") == contents(tmp_path / "1") == contents(tmp_path / "2")


def test_orientation_of_the_file_does_not_matter(heads, tmp_path):
    image = nib.load(heads / "head_00.nii.gz")
    turned = image.as_reoriented(nib.orientations.axcodes2ornt("SRP"))
    assert nib.aff2axcodes(turned.affine) != nib.aff2axcodes(image.affine)
    nib.save(image, tmp_path / "a.nii.gz")
    nib.save(turned, tmp_path / "b.nii.gz")
    summary = preprocess([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], tmp_path / "store")
    a, b = summary.store.cases
    np.testing.assert_array_equal(summary.store.read(a), summary.store.read(b))
    np.testing.assert_allclose(a.affine, b.affine, atol=1e-4)
    # and they are found to be one volume, which must not be on both sides of the split
    assert {a.split, b.split} == {"train"}
    for _ in range(2):
        found = records(tmp_path / "store", "warnings.jsonl")
        assert [r["code"] for r in found] == ["duplicate.content"] * 2
        preprocess([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], tmp_path / "store")


def test_bad_volumes_are_recorded_once_and_the_rest_goes_on(tmp_path, save_volume):
    source, store = tmp_path / "source", tmp_path / "store"
    save_volume(source / "good.nii.gz", size=24)
    flat(source / "flat.nii.gz")
    save_volume(source / "huge.nii.gz", size=90, affine=np.diag([50.0, 50, 50, 1]))
    (source / "text.nii").write_text("no image")
    (source / "list.csv").write_text("path\ngood.nii.gz\nmissing.nii.gz\n")
    for _ in range(2):  # a second run finds the same, and does nothing
        summary = preprocess([source, source / "list.csv"], store)
        assert (summary.progress.ok, summary.progress.rejected) == (1, 4)
        found = records(store)
        assert [(r["id"], r["code"], r["stage"]) for r in found] == [
            ("flat", "intensity.constant", "read"),
            ("huge", "geometry.too_large", "preprocess"),
            ("missing", "source.missing", "find"),
            ("text", "container.not_nifti", "read"),
        ]
    assert summary.progress.kept == 4
    assert summary.progress.done == summary.progress.total == 5
    for record in found:
        assert record["path"] in record["message"]
        assert record["code"] in CODES
        assert record["seconds"] >= 0
        if record["stage"] != "find":
            assert record["size"] > 0
            assert record["mtime"] > 1e9
    assert [case.id for case in Store.open(store).cases] == ["good"]


def test_the_filter_gives_its_reasons(tmp_path, save_volume):
    source = tmp_path / "source"
    save_volume(source / "large.nii.gz", size=40, affine=np.diag([3.0, 3, 3, 1]))
    save_volume(source / "small.nii.gz", size=40, affine=np.diag([1.0, 1, 1, 1]))
    save_volume(source / "thick.nii.gz", size=40, affine=np.diag([3.0, 3, 9, 1]))
    config = PreprocessConfig(filter=FilterConfig())
    # left out as asked, so they are no failures that could be too many
    summary = preprocess([source], tmp_path / "store", config, max_failures=0.0)
    assert (summary.progress.ok, summary.progress.filtered, summary.progress.rejected) == (1, 2, 0)
    assert {(r["id"], r["code"], r["stage"]) for r in records(tmp_path / "store")} == {
        ("small", "quality.field_of_view", "filter"),
        ("thick", "quality.spacing", "filter"),
    }


def test_masks_of_a_list_go_into_the_store(tmp_path, save_volume):
    save_volume(tmp_path / "a.nii.gz", size=24)
    face = np.zeros((24, 24, 24), np.uint8)
    face[:, 12:, :12] = 1
    nib.save(nib.Nifti1Image(face, nib.load(tmp_path / "a.nii.gz").affine), tmp_path / "face.nii")
    (tmp_path / "list.csv").write_text("path,excluded\na.nii.gz,face.nii\n")
    summary = preprocess([tmp_path / "list.csv"], tmp_path / "store", KEEP)
    (case,) = summary.store.cases
    mask = summary.store.read_box(case, (0, 0, 0), case.shape, kind="excluded")[0]
    box = tuple(map(slice, case.crop_start, case.crop_stop))
    np.testing.assert_array_equal(mask, face[box] != 0)
    # a mask that changes makes its case again
    face[:, :, :12] = 1
    nib.save(nib.Nifti1Image(face, nib.load(tmp_path / "a.nii.gz").affine), tmp_path / "face.nii")
    summary = preprocess([tmp_path / "list.csv"], tmp_path / "store", KEEP)
    assert summary.progress.kept == 0
    assert preprocess([tmp_path / "list.csv"], tmp_path / "store", KEEP).progress.kept == 1
    (tmp_path / "face.nii").unlink()
    with pytest.raises(UserError, match=r"as a, are not among .* --prune"):
        preprocess([tmp_path / "list.csv"], tmp_path / "store", KEEP)
    with pytest.raises(UserError, match=r"none of the 1 volumes.*face\.nii"):
        preprocess([tmp_path / "list.csv"], tmp_path / "store", KEEP, prune=True)


def test_too_many_failures_are_fatal_and_what_is_done_is_kept(volumes, tmp_path):
    source, store = volumes(30), tmp_path / "store"
    for i in range(20):
        (source / f"v{i:03d}.nii.gz").write_bytes(b"")
    with pytest.raises(
        UserError, match=r"20 of 30 volumes rejected.*--max-failures.*first: .*v000"
    ):
        preprocess([source], store)
    assert not (store / "index.json").exists()
    assert len(records(store)) == 20
    seen = []
    summary = preprocess(
        [source], store, max_failures=0.7, on_outcome=lambda p, o: seen.append(p.kept)
    )
    assert seen[0] >= 20
    assert (summary.progress.ok, summary.progress.rejected) == (10, 20)
    with pytest.raises(UserError, match="rejected"):
        preprocess([source], tmp_path / "strict", max_failures=0.0)
    assert len(records(tmp_path / "strict")) == 1  # at the first


def test_a_lost_worker_is_not_the_last_word(volumes, tmp_path, monkeypatch):
    """Memory may have been short: a later run tries again what a broken file fails for ever."""
    source, store = volumes(4), tmp_path / "store"
    (source / "v001.nii.gz").write_bytes(b"")

    def lose_one(function, jobs, *args, **kwargs):
        for job in jobs:
            lost = Lost("worker.killed", "its process ended with signal SIGKILL", 2.5)
            yield job, lost if job.source.id == "v002" else function(job)

    with monkeypatch.context() as patch:
        patch.setattr("sparsemae.data.preprocess.run_jobs", lose_one)
        summary = preprocess([source], store)
    assert [(f.id, f.code, f.stage) for f in summary.failures] == [
        ("v001", "container.empty", "read"),
        ("v002", "worker.killed", "worker"),
    ]
    assert "v002.nii.gz: processing it twice failed" in summary.failures[1].message
    assert "SIGKILL" in summary.failures[1].message
    assert summary.failures[1].seconds == 2.5
    with monkeypatch.context() as patch:
        patch.setattr("sparsemae.data.preprocess.run_jobs", lose_one)
        preprocess([source], tmp_path / "shards", shard=Shard(0, 1))
    merged = preprocess([source], tmp_path / "shards", merge=True)  # which processes nothing
    assert [f.code for f in merged.failures] == ["container.empty", "worker.killed"]
    summary = preprocess([source], store)
    assert (summary.progress.kept, summary.progress.ok) == (3, 3)
    assert [f.id for f in summary.failures] == ["v001"]


def test_voxels_beside_their_header_are_noticed(tmp_path):
    pair = nib.Nifti1Pair(np.random.default_rng(0).integers(1, 9, (9, 9, 9), np.int16), np.eye(4))
    nib.save(pair, tmp_path / "a.img")
    for name, other in (("a.hdr", "a.img"), ("a.img", "a.hdr")):
        store = tmp_path / name[2:]
        assert preprocess([tmp_path / name], store, KEEP).progress.ok == 1
        assert preprocess([tmp_path / name], store, KEEP).progress.kept == 1
        os.utime(tmp_path / other, (1e9, 1e9))
        assert preprocess([tmp_path / name], store, KEEP).progress.kept == 0


def test_a_frame_of_several(tmp_path):
    frames = np.random.default_rng(0).integers(1, 900, (12, 12, 12, 3)).astype(np.int16)
    nib.save(nib.Nifti1Image(frames, np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(UserError, match="frame"):
        preprocess([tmp_path / "a.nii"], tmp_path / "store", KEEP)
    config = PreprocessConfig(spacing=None, frame=1)
    store = preprocess([tmp_path / "a.nii"], tmp_path / "store", config, overwrite=True).store
    (case,) = store.cases
    found = store.read(case)[0] * case.std + case.mean
    np.testing.assert_allclose(found, frames[..., 1], atol=1)


def test_equal_content_is_equal_shape_and_voxels():
    array = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    assert content_of(array) == content_of(np.asfortranarray(array))
    assert content_of(array) != content_of(array.reshape(4, 3, 2))
    assert content_of(array) != content_of(array + 1)


def test_the_split_is_by_subject(tmp_path, save_volume):
    lines = ["path,subject"]
    for i in range(20):
        save_volume(tmp_path / f"v{i:02d}.nii.gz", seed=i)
        lines.append(f"v{i:02d}.nii.gz,s{i // 2}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    splits = {}
    for seed, share in ((0, 0.3), (0, 0.3), (1, 0.3), (0, 0.0)):
        summary = preprocess(
            [tmp_path / "list.csv"], tmp_path / "store", KEEP, validation=share, seed=seed
        )
        sides = {}
        for case in summary.store.cases:
            sides.setdefault(case.subject, set()).add(case.split)
        assert all(len(side) == 1 for side in sides.values())
        held_out = sorted(s for s, side in sides.items() if side == {"val"})
        assert len(held_out) == (3 if share else 0)
        assert splits.setdefault((seed, share), held_out) == held_out
        assert len(summary.store.split("val")) == 2 * len(held_out)
    assert splits[0, 0.3] != splits[1, 0.3]


def test_other_options_are_refused_unless_the_store_is_emptied(volumes, tmp_path):
    source, store = volumes(3), tmp_path / "store"
    preprocess([source], store)
    other = PreprocessConfig(spacing=2.0, dtype="float32")
    with pytest.raises(UserError, match=r"spacing \[1.0, 1.0, 1.0\] there, \[2.0, .*dtype float16"):
        preprocess([source], store, other)
    assert len(Store.open(store)) == 3
    (source / "v001.nii.gz").rename(source / "w001.nii.gz")
    with pytest.raises(UserError, match="as v001, are not among"):
        preprocess([source], store)
    summary = preprocess([source], store, other, overwrite=True)
    assert summary.store.config == other
    assert [p.name for p in sorted((store / "cases").iterdir())] == [
        "v000.b2nd", "v002.b2nd", "w001.b2nd"
    ]  # fmt: skip
    preprocess(
        [source],
        tmp_path / "part",
        stopped=itertools.chain([False], itertools.repeat(True)).__next__,
    )
    with pytest.raises(UserError, match="other options"):
        preprocess([source], tmp_path / "part", other)


def test_refused_before_anything_is_written(tmp_path, save_volume):
    save_volume(tmp_path / "src" / "a.nii")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    (tmp_path / "file").touch()
    for store, options, message in (
        (tmp_path / "src", {}, "overlap"),
        (tmp_path / "src" / "store", {}, "overlap"),
        (tmp_path, {}, "overlap"),
        (tmp_path / "photos", {}, "other files.*cat.jpg"),
        (tmp_path / "photos", {"overwrite": True}, "other files"),
        (tmp_path / "file", {}, "cannot write"),
        (tmp_path / "store", {"workers": -1}, "workers -1"),
        (tmp_path / "store", {"layout": "bid"}, "did you mean bids"),
        (tmp_path / "store", {"max_failures": 5}, "share from 0 to 1"),
        (tmp_path / "store", {"validation": 1.0}, "validation"),
        (tmp_path / "store", {"shard": Shard(3, 3)}, "counted from 0 to 2"),
        (tmp_path / "store", {"shard": Shard(0, 3), "merge": True}, "then one run with --merge"),
        (tmp_path / "store", {"shard": Shard(0, 3), "overwrite": True}, "remove the store"),
        (tmp_path / "store", {"merge": True, "overwrite": True}, "drop --overwrite"),
        (tmp_path / "store", {"merge": True, "verify": True}, "drop --overwrite, --verify"),
        (tmp_path / "store", {"merge": True}, "no shard has begun"),
        (tmp_path / "store", {"timeout": 0.0}, "--timeout 0: give a positive"),
        (tmp_path / "store", {"timeout": float("nan")}, "--timeout nan"),
        (tmp_path / "store", {"dask": "tcp://x:1", "timeout": 5.0}, "drop it, or --dask"),
    ):
        with pytest.raises(UserError, match=message):
            preprocess([tmp_path / "src"], store, **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "photos", "src"]
    assert [p.name for p in (tmp_path / "src").iterdir()] == ["a.nii"]


def test_outcomes_survive_as_lines(tmp_path, volumes):
    """What a journal says is what was said: the index of a later run comes from it."""
    source, seen = volumes(2), []
    preprocess([source], tmp_path / "a", on_outcome=lambda _, o: seen.append(o))
    (source / "v002.nii.gz").write_bytes(b"")
    preprocess([source], tmp_path / "a", on_outcome=lambda _, o: seen.append(o))
    cases = {case.id: case for case in Store.open(tmp_path / "a").cases}
    for outcome in filter(None, seen):
        if outcome.case is not None:
            split = cases[outcome.id].split
            assert cases[outcome.id] == dataclasses.replace(outcome.case, split=split)


def test_real_volumes(shared, tmp_path):
    """Images, one volume in six orientations, and label maps, all as they come."""
    summary = preprocess(
        [shared / "images", shared / "orientations", shared / "labels"],
        tmp_path / "store",
        PreprocessConfig(spacing=2.0),
    )
    assert (summary.progress.ok, summary.progress.rejected) == (25, 0)
    store = summary.store
    for case in store.cases:
        array = store.read(case)
        assert array.shape == (1, *case.shape)
        assert case.spacing == pytest.approx((2, 2, 2))
        assert np.isfinite(array).all()
        assert case.background == array.min() or case.background < 0.1
    turned = [case for case in store.cases if "orientations" in case.source]
    assert len({case.content for case in turned}) == 1
    assert len({case.shape for case in turned}) == 1
    assert len({case.split for case in turned}) == 1
