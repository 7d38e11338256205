"""A folder of good files and every kind of bad one, by the command that a person runs."""

import json

import pytest

from sparsemae.data.store import Store


@pytest.mark.slow
def test_good_ones_are_stored_and_each_bad_one_is_recorded_once(
    tmp_path, bad_files, save_volume, sparsemae
):
    source, store = tmp_path / "source", tmp_path / "store"
    source.mkdir()
    expected = {}
    for i, (name, (code, make)) in enumerate(bad_files.items()):
        path = source / f"bad{i:03d}.nii.gz"
        make(path)
        if name not in ("missing", "directory"):  # there is no file then
            expected[path.name[:6]] = code
    for i in range(5):
        save_volume(source / f"good{i}.nii.gz", seed=i, size=24)
    words = ("preprocess", source, "-o", store, "--workers", 2, "--max-failures", 1)
    for _ in range(2):
        run = sparsemae(*words)
        printed = run.communicate(timeout=300)[0]
        assert run.returncode == 3, printed
        assert "Traceback" not in printed
        assert f"{len(expected)} rejected" in printed
        assert "5 volumes stored" in printed
        found = [json.loads(line) for line in (store / "failures.jsonl").read_text().splitlines()]
        assert {record["id"]: record["code"] for record in found} == expected
        assert len(found) == len(expected)
        assert [case.id for case in Store.open(store).cases] == [f"good{i}" for i in range(5)]
