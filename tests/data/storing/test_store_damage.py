"""Bit rot: whatever byte of a store changes, a read gives the truth or an error with a name."""

import json
import shutil

import numpy as np
import pytest

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.store import Store, verify, write_image, write_index, write_mask
from sparsemae.data.storing import frame
from sparsemae.data.storing.frame import check_array, read_array
from sparsemae.errors import UserError

SHAPE = (100, 12, 9)  # two chunks
BOXES = {"first": ((0, 0, 0), (64, 12, 9)), "second": ((64, 0, 0), (100, 12, 9))}


def small_volume():
    """Part noise, part air; a file of about 1 kB."""
    array = np.full((1, *SHAPE), -1.5, np.float32)
    array[:, 10:14] = np.random.default_rng(0).standard_normal((1, 4, 12, 9))
    array[:, 80:84] = 3
    return array


def random_bits():
    """Two volumes that no codec makes smaller."""
    bits = np.random.default_rng(0).integers(0, 2**16, (2, 32, 32, 32), np.uint16)
    bits[(bits & 0x7C00) == 0x7C00] &= 0x83FF  # finite
    return bits.view(np.float16).astype(np.float32)


def flips(count, seed=0):
    """(position, mask) of one random bit in each byte."""
    bits = np.random.default_rng(seed).integers(0, 8, count)
    return [(at, 1 << int(bit)) for at, bit in enumerate(bits)]


def write(tmp_path, kind):
    if kind == "image":
        return write_image(tmp_path, "a", small_volume()), small_volume().astype(np.float16)
    return write_mask(tmp_path, "a", small_volume() > 0), (small_volume() > 0).astype(np.uint8)


@pytest.mark.parametrize("kind", ["image", "excluded"])
def test_no_byte_of_a_case_can_change_unseen(tmp_path, kind):
    stored, truth = write(tmp_path, kind)
    path = tmp_path / stored.file
    good = path.read_bytes()
    refused, messages = dict.fromkeys([*BOXES, "whole", "check"], 0), set()
    for at, mask in flips(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
        for name, (start, stop) in (BOXES | {"whole": ((0, 0, 0), SHAPE)}).items():
            try:
                got = read_array(tmp_path, stored, start, stop)
            except UserError as error:
                messages.add(str(error))
                refused[name] += 1
            else:
                assert np.array_equal(got, truth[:, start[0] : stop[0]])
        try:
            check_array(tmp_path, stored)
        except UserError:
            refused["check"] += 1
    for message in messages:
        assert message.startswith(f"{path}: damaged")
        assert message.endswith("--verify` makes the case again")
        assert "\n" not in message
    assert refused["whole"] == refused["check"] == len(good)
    # each box checks its own chunk and what all share, and is content with damage in the other's
    around = refused["first"] + refused["second"] - len(good)
    assert 200 < around < 700
    assert around < min(refused["first"], refused["second"])


def test_without_the_checksums_damage_passes(tmp_path, monkeypatch):
    """What the others here find is not found by blosc2."""
    array = random_bits()[0]  # stored as it is, so that no decoder stumbles
    stored = write_image(tmp_path, "a", array[None])
    path = tmp_path / stored.file
    good = path.read_bytes()
    monkeypatch.setattr(frame, "_compare", lambda *args: None)
    for at in range(1000, 60_000, 10_000):
        path.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        got = read_array(tmp_path, stored, (0, 0, 0), array.shape)
        assert np.count_nonzero(got != array) == 1


DAMAGES = {
    "cut by a byte": (lambda p: p.write_bytes(p.read_bytes()[:-1]), "damaged: .* bytes"),
    "longer": (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "damaged: .* bytes"),
    "empty": (lambda p: p.write_bytes(b""), "damaged: 0 bytes"),
    "zeros": (lambda p: p.write_bytes(bytes(p.stat().st_size)), "damaged header"),
    "ones": (lambda p: p.write_bytes(b"\xff" * p.stat().st_size), "damaged header"),
    "a hole": (
        lambda p: p.write_bytes(p.read_bytes()[:300] + bytes(99) + p.read_bytes()[399:]),
        "damaged: chunk 0 differs",
    ),
    "gone": (lambda p: p.unlink(), "missing"),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), "cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_coarse_damage_is_named(tmp_path, damage, make_store):
    store = make_store(tmp_path, {"a": small_volume()[0]}, {"a": small_volume()[0] > 0})
    case = store.cases[0]
    assert verify(tmp_path, case)
    do, message = DAMAGES[damage]
    for stored, kind in ((case.image, "image"), (case.excluded, "excluded")):
        shutil.copy(tmp_path / stored.file, tmp_path / "kept")
        do(tmp_path / stored.file)
        with pytest.raises(UserError, match=rf"{stored.file}: {message}"):
            store.read_box(case, (0, 0, 0), SHAPE, kind)
        with pytest.raises(UserError, match=rf"{stored.file}: {message}"):
            store.verify(case)
        assert not verify(tmp_path, case)
        shutil.rmtree(tmp_path / stored.file, ignore_errors=True)
        shutil.move(tmp_path / "kept", tmp_path / stored.file)
    store.verify(case)


def test_swapped_files_are_noticed(tmp_path, make_store):
    """Two whole files of equal shape and length, under each other's names."""
    store = make_store(tmp_path, dict(zip("ab", random_bits(), strict=True)))
    one, two = store.cases
    assert one.bytes == two.bytes
    shutil.move(tmp_path / one.file, tmp_path / "kept")
    shutil.move(tmp_path / two.file, tmp_path / one.file)
    shutil.move(tmp_path / "kept", tmp_path / two.file)
    for case in (one, two):
        with pytest.raises(UserError, match=r"damaged: chunk 0 differs"):
            store.read(case)


@pytest.fixture
def store(tmp_path, make_case):
    cases = [make_case(tmp_path, name, small_volume()[0], subject="ß") for name in "ab"]
    write_index(tmp_path, cases, PreprocessConfig())
    return Store.open(tmp_path)


def test_no_byte_of_the_index_can_change_unseen(store):
    path = store.path / "index.json"
    good = path.read_bytes()
    first = good.index(b"\n") + 1
    every_bit = [(at, 1 << bit) for at in range(first) for bit in range(8)]
    for at, mask in every_bit + flips(len(good)):
        path.write_bytes(good[:at] + bytes([good[at] ^ mask]) + good[at + 1 :])
        with pytest.raises(UserError, match=str(path)) as caught:
            Store.open(store.path)
        assert "\n" not in str(caught.value)
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(UserError, match="damaged index; make the store again"):
            Store.open(store.path)


def test_lines_cannot_be_lost_or_exchanged(store):
    path = store.path / "index.json"
    lines = path.read_bytes().splitlines(keepends=True)
    assert len([line for line in lines if line.startswith(b'{"id"')]) == 2
    swapped = [*lines[:-3], lines[-2].replace(b"}\n", b"},\n"), lines[-3][:-2] + b"\n", lines[-1]]
    assert json.loads(b"".join(swapped))["cases"][0]["id"] == "b"
    for changed in (swapped, lines[:-3] + lines[-2:]):
        path.write_bytes(b"".join(changed))
        with pytest.raises(UserError, match="damaged index"):
            Store.open(store.path)
