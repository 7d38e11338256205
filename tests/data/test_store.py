import dataclasses
import json
import shutil

import blosc2
import numpy as np
import pytest

from sparsemae.data.store import Case, Store, StoreWriter, write_array
from sparsemae.errors import UserError

SHAPE = (70, 33, 20)


def volume(seed, shape=SHAPE):
    return np.random.default_rng(seed).standard_normal((1, *shape)).astype(np.float32)


def fill(writer, case_id, array):
    file, size, crc32 = write_array(writer.path, case_id, array)
    identity = tuple(map(tuple, np.eye(4).tolist()))
    writer.add(
        Case(
            id=case_id,
            file=file,
            shape=array.shape[1:],
            spacing=(1.0, 1.0, 1.0),
            affine=identity,
            background=-1.5,
            mean=150.0,
            std=100.0,
            crop_start=(0, 0, 0),
            crop_stop=array.shape[1:],
            source=f"/data/{case_id}.nii",
            source_shape=array.shape[1:],
            source_affine=identity,
            bytes=size,
            crc32=crc32,
        )
    )


@pytest.fixture
def store(tmp_path):
    writer = StoreWriter(tmp_path / "store", spacing=(1.0, 1.0, 1.0))
    for i in (1, 0):
        fill(writer, f"case{i}", volume(i))
    return writer.commit()


def test_round_trip_is_exact(store):
    assert len(store) == 2
    assert [case.id for case in store.cases] == ["case0", "case1"]
    for i, case in enumerate(store.cases):
        array = store.read(case)
        assert array.dtype == np.float32
        assert np.array_equal(array, volume(i))
    assert Store.open(store.path) == store


def test_other_programs_can_read_a_case(store):
    array = blosc2.open(str(store.path / store.cases[0].file), mode="r")
    assert array.shape == (1, *SHAPE)
    assert array.schunk.cparams.codec == blosc2.Codec.LZ4HC
    assert np.array_equal(array[...], volume(0))


def test_read_box_is_a_slice(store):
    rng = np.random.default_rng(0)
    for _ in range(50):
        start = rng.integers(0, SHAPE)
        stop = rng.integers(start + 1, np.add(SHAPE, 1))
        box = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
        got = store.read_box(store.cases[1], tuple(start), tuple(stop))
        assert np.array_equal(got, volume(1)[(slice(None), *box)])


@pytest.mark.parametrize(
    ("start", "stop"), [((-1, 0, 0), (2, 2, 2)), ((0, 0, 0), (2, 2, 21)), ((3, 0, 0), (3, 2, 2))]
)
def test_a_box_outside_is_refused(store, start, stop):
    with pytest.raises(ValueError, match="case0: box"):
        store.read_box(store.cases[0], start, stop)


def test_no_index_until_commit(tmp_path, monkeypatch):
    writer = StoreWriter(tmp_path / "store", spacing=None)
    fill(writer, "a", volume(0))
    with pytest.raises(UserError, match="no store there"):
        Store.open(writer.path)

    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", die)  # the last moment before the index appears
    with pytest.raises(KeyboardInterrupt):
        writer.commit()
    assert not (writer.path / "index.json").exists()
    monkeypatch.undo()
    again = StoreWriter(tmp_path / "store", spacing=None)  # no --overwrite: there is no store yet
    assert list((again.path / "cases").iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), "no store there; make it with `sparsemae preprocess SRC -o"),
        (lambda p: (p / "index.json").write_text('{"format": "spars'), "damaged index"),
        (lambda p: (p / "index.json").write_bytes(b"\xff\xfe"), "damaged index"),
        (lambda p: (p / "index.json").write_text("[1, 2]"), "not the index"),
        (lambda p: (p / "cases/case1.b2nd").unlink(), r"case1\.b2nd: missing"),
        (lambda p: (p / "cases/case1.b2nd").write_bytes(b"x"), r"case1\.b2nd: missing or cut"),
    ],
)
def test_open_refuses_a_damaged_store(store, damage, message):
    damage(store.path)
    with pytest.raises(UserError, match=message) as caught:
        Store.open(store.path)
    assert "sparsemae preprocess SRC -o" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 99}, "version 99"),
        ({"cases": []}, "no cases"),
        ({"cases": [{"id": "a"}]}, "damaged index"),
        ({"cases": None}, "damaged index"),
        ({"format": "other"}, "not the index"),
    ],
)
def test_open_refuses_another_index(store, change, message):
    index = json.loads((store.path / "index.json").read_text())
    (store.path / "index.json").write_text(json.dumps({**index, **change}))
    with pytest.raises(UserError, match=message):
        Store.open(store.path)


def test_read_notices_one_flipped_bit(store):
    case = store.cases[0]
    file = store.path / case.file
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=r"case0\.b2nd: the file is damaged"):
        store.read(case)


def test_fingerprint_is_of_the_data_not_of_its_place(store, tmp_path):
    copy = shutil.copytree(store.path, tmp_path / "copy")
    index = json.loads((copy / "index.json").read_text())
    index["cases"][0]["source"] = "/elsewhere/case0.nii"
    (copy / "index.json").write_text(json.dumps(index))
    assert Store.open(copy).fingerprint == store.fingerprint
    index["cases"][0]["crc32"] += 1
    (copy / "index.json").write_text(json.dumps(index))
    assert Store.open(copy).fingerprint != store.fingerprint


def test_case_survives_json(store):
    case = store.cases[0]
    assert isinstance(case.affine[0], tuple)
    assert dataclasses.replace(case) == case
    assert hash(case)
