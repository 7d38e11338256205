"""The data benchmark compares the same voxels, and records what it measured."""

import json
import random

import nibabel as nib
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from sparsemae.bench import __main__ as command
from sparsemae.bench import data
from sparsemae.bench.data import PARTS, Plan, measure_data
from sparsemae.bench.datareport import tables
from sparsemae.bench.readers import Nifti, NnUNet, Stored, nnunet_layout
from sparsemae.data.phantom import draw_head


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    """Two heads of 40^3 voxels, called 1 mm so that they stay that small."""
    folder = tmp_path_factory.mktemp("volumes")
    for seed in range(2):
        image = nib.Nifti1Image(draw_head(seed, 40)[0].astype(np.int16), np.eye(4))
        nib.save(image, folder / f"{seed}.nii.gz")
    return folder


def plan(volumes):
    return Plan((16,), ("read",), volumes, 0, 0, 3, 2, torch.device("cpu"), "tiny", 1, 2)


def test_every_part_leaves_complete_lines(tmp_path, volumes):
    record = tmp_path / "deep" / "record.jsonl"
    options = ["--patch", "32", "--patch", "24", "--volumes", str(volumes), "--samples", "3"]
    options += ["--preset", "tiny", "--steps", "2", "--threads", "1", "--work", str(tmp_path)]
    result = CliRunner().invoke(command.app, ["data", *options, "--json", str(record)])
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in record.read_text().splitlines()]
    assert all({"case", "source", "device", "torch", "commit"} <= set(row) for row in rows)
    assert list(dict.fromkeys(row["case"] for row in rows)) == list(PARTS)

    reads = [row for row in rows if row["case"] == "read"]
    assert len(reads) == 2 * 2 * 6  # patches, states of the cache, ways
    for row in reads:
        assert row["rounds"] == 3
        assert 0 < row["ms_p20"] <= row["ms"] <= row["ms_p80"]
        if row["cache"] == "warm":
            assert row["patches_per_second"] > 0
            assert row["mb_file"] > 0
    for name in ("nibabel", "nnU-Net"):
        ratio = "ratio_" + name.replace("-", "").lower()
        speed = {
            (row["patch"], row["cache"]): row["patches_per_second"]
            for row in reads
            if row["form"].startswith(name)
        }
        for row in reads:
            if row["cache"] == "warm":
                theirs = speed[row["patch"], "warm"]
                assert row[ratio] == pytest.approx(row["patches_per_second"] / theirs)

    (pre,) = (row for row in rows if row["case"] == "preprocess")
    assert pre["volumes"] == 2
    assert pre["scale_core_hours"] == pytest.approx(44_000 * pre["seconds_per_volume"] / 3600)
    assert pre["scale_gb_stored"] == pytest.approx(44 * pre["mb_stored"])
    (wait,) = (row for row in rows if row["case"] == "wait")
    assert 0 <= wait["wait_share"] < 1
    augments = [row for row in rows if row["case"] == "augment"]
    assert [(row["patch"], row["augment"]) for row in augments] == [
        (patch, name) for patch in (32, 24) for name in ("", "drawn", "all resampled")
    ]
    assert all(word in result.output for word in ("nnU-Net b2nd", "nibabel", "ResEnc-tiny"))
    assert [p.name for p in tmp_path.iterdir()] == ["deep"]  # the volumes are gone


def test_heads_are_drawn_where_there_are_no_volumes():
    options = ["--count", "1", "--size", "16", "--part", "preprocess"]
    result = CliRunner().invoke(command.app, ["data", *options])
    assert result.exit_code == 0, result.output
    assert "drawn 16^3" in result.output
    assert "form" not in result.output


@pytest.mark.parametrize("option", [["--part", "nothing"], ["--device", "tpu"]])
def test_options_are_checked(option):
    result = CliRunner().invoke(command.app, ["data", *option])
    assert str(result.exception).startswith(option[0])


@pytest.mark.parametrize("form", [Stored, NnUNet, Nifti])
def test_wrong_voxels_are_not_timed(monkeypatch, volumes, form):
    right = form.read

    def wrong(self, case, box):
        voxels = np.array(right(self, case, box))
        voxels.flat[voxels.size // 2] += 0.1
        return voxels

    monkeypatch.setattr(form, "read", wrong)
    monkeypatch.setattr(data, "_time", lambda *args: pytest.fail("timed"))
    with pytest.raises(RuntimeError, match="gives other voxels of case"):
        list(measure_data(plan(volumes), None))


def test_a_cold_read_is_dropped_first_and_a_warm_one_is_not(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"x")
    events = []
    monkeypatch.setattr(data, "drop_from_cache", lambda path: events.append(path))
    way = data.Reads("store", "", lambda i: events.append(i), lambda i: [file])
    data._time([way], 2, "warm")
    assert events == [0, 0, 1]
    events.clear()
    data._time([way], 2, "cold")
    assert events == [file, 0, file, 0, file, 1]
    assert [len(way.seconds[state]) for state in ("warm", "cold")] == [2, 2]


def test_a_cache_that_stays_is_not_called_cold(monkeypatch, volumes):
    monkeypatch.setattr(data, "bytes_from_disk", lambda: 0)
    rows = list(measure_data(plan(volumes), None))
    assert {row["cache"] for row in rows if row["skipped"]} == {"cold"}
    assert all((row["patches_per_second"] is None) == bool(row["skipped"]) for row in rows)
    lines = next(tables(rows))[2]
    assert sum("cannot be dropped" in line[4] for line in lines) == 6


# what `comp_blosc2_params` of nnunetv2 2.8.1 gives
LAYOUTS = [
    ((182, 218, 182), 96, (1, 32, 32, 32), (1, 128, 128, 96)),
    ((182, 218, 182), 160, (1, 32, 32, 32), (1, 128, 128, 96)),
    ((150, 190, 160), 160, (1, 32, 32, 32), (1, 96, 128, 128)),
    ((40, 512, 512), 96, (1, 16, 64, 32), (1, 40, 144, 144)),
    ((40, 512, 512), 160, (1, 8, 64, 64), (1, 32, 240, 192)),
    ((20, 20, 20), 96, (1, 20, 20, 20), (1, 20, 20, 20)),
]


@pytest.mark.parametrize(("image", "patch", "blocks", "chunks"), LAYOUTS)
def test_chunks_are_those_of_nnunet(image, patch, blocks, chunks):
    assert nnunet_layout(image, (patch,) * 3, 4) == (blocks, chunks)


def test_chunks_are_those_of_the_installed_nnunet():
    theirs = pytest.importorskip("nnunetv2.training.dataloading.nnunet_dataset")
    rng = random.Random(0)
    for _ in range(300):
        image = tuple(rng.randint(1, 400) for _ in range(3))
        patch, size = (rng.choice([32, 64, 96, 128, 160]),) * 3, rng.choice([2, 4])
        assert nnunet_layout(image, patch, size) == theirs.comp_blosc2_params(
            (1, *image), patch, size
        )


def test_the_nifti_form_is_an_ordinary_file(tmp_path):
    array = np.random.default_rng(0).standard_normal((9, 10, 11)).astype(np.float32)
    form = Nifti(tmp_path / "nifti")
    form.write(0, array, np.eye(4))
    image = nib.load(form.files(0)[0])
    assert image.get_data_dtype() == np.int16
    assert np.abs(image.get_fdata() - array).max() <= form.allowed(0)
