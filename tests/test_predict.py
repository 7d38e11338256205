"""Label maps of whole volumes: right voxels, own grids, several folds, and going on."""

import json
import os
import shutil
from io import StringIO

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console

from sparsemae.config import build_config
from sparsemae.data.read import read_labels, read_volume
from sparsemae.errors import UserError
from sparsemae.finetune import FinetuneConfig, finetune, load_finetuned
from sparsemae.finetuning.runs import FinetunedRun
from sparsemae.predict import predict
from sparsemae.predicting.record import RECORD
from sparsemae.segmentation.prepare import prepare_case

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = {"mirror": False, "step": 1.0}


def coarser(plans, folder, spacing):
    """Plans of other voxels."""
    raw = json.loads(plans.read_text())
    raw["configurations"]["3d_fullres"]["spacing"] = spacing
    (folder / "plans.json").write_text(json.dumps(raw))
    return folder / "plans.json"


def array_of(path):
    return np.asarray(nibabel.load(path).dataobj)


def dice(one, other, number):
    one, other = one == number, other == number
    return 2 * (one & other).sum() / (one.sum() + other.sum())


def test_held_out_cases_are_segmented(finetuned, labelled, tmp_path):
    done = predict([finetuned], None, tmp_path / "out", validation=True)
    assert [p.name for p in done.written] == ["case_0.nii.gz"] or len(done.written) == 1
    for path in done.written:
        truth = labelled / "labelsTr" / path.name
        assert dice(array_of(path), array_of(truth), 1) > 0.85
        image = nibabel.load(path)
        np.testing.assert_array_equal(image.affine, nibabel.load(truth).affine)
        assert image.get_data_dtype() == np.uint8


def test_all_orientations_of_a_volume_get_one_prediction(finetuned, labelled, tmp_path):
    """Six ways to store the same voxels, brought to RAS, are predicted alike, voxel for voxel."""
    image = nibabel.load(labelled / "imagesTr" / "case_0_0000.nii.gz")
    folder = tmp_path / "in"
    folder.mkdir()
    for axes in ("RAS", "LPS", "SRA", "ASR", "IPL", "PIR"):
        turned = nibabel.as_closest_canonical(image).as_reoriented(
            nibabel.orientations.ornt_transform(
                nibabel.orientations.axcodes2ornt("RAS"), nibabel.orientations.axcodes2ornt(axes)
            )
        )
        nibabel.save(turned, folder / f"{axes}.nii.gz")
    done = predict([finetuned], folder, tmp_path / "out", mirror=False)
    assert len(done.written) == 6
    maps = {path.name[:3]: nibabel.load(path) for path in done.written}
    for axes, found in maps.items():
        assert "".join(nibabel.aff2axcodes(found.affine)) == axes
        assert found.shape == nibabel.load(folder / f"{axes}.nii.gz").shape
    ras = {axes: read_labels(tmp_path / "out" / f"{axes}.nii.gz").array for axes in maps}
    for array in ras.values():
        np.testing.assert_array_equal(array, ras["RAS"])
    assert {1, 2} <= set(np.unique(ras["RAS"]))


def test_real_orientations_get_one_prediction(shared, labelled, tmp_path, small_plans):
    """Of a coarse plan, for time: what the network says does not matter here."""
    raw = {
        "plan": {"file": str(coarser(small_plans, tmp_path, [4.0, 5.0, 6.0]))},
        "data": {"augmentation": "none", "validation": 1},
        "train": {"steps": 2, "save_every": 2},
    }
    finetune(labelled, tmp_path / "run", build_config(FinetuneConfig, raw))
    done = predict([tmp_path / "run"], shared / "orientations", tmp_path / "out", **QUICK)
    maps = [read_labels(path).array for path in done.written]
    assert len(maps) == 6
    assert maps[0].any()
    for other in maps[1:]:
        np.testing.assert_array_equal(other, maps[0])


def test_a_finer_grid_is_the_volumes_own(finetuned, labelled, tmp_path):
    """A scan of other voxels: resampled to the plan, predicted, and brought back."""
    source = labelled / "imagesTr" / "case_0_0000.nii.gz"
    image = nibabel.load(source)
    fine = np.asarray(image.dataobj).repeat(2, 0).repeat(2, 2)
    affine = image.affine @ np.diag([0.5, 1, 0.5, 1])
    affine[:3, 3] -= [0.25, 0, 0.25]
    folder = tmp_path / "in"
    folder.mkdir()
    nibabel.save(nibabel.Nifti1Image(fine, affine), folder / "fine.nii.gz")
    shutil.copy(source, folder / "plain.nii.gz")
    predict([finetuned], folder, tmp_path / "out", mirror=False)
    plain, found = (array_of(tmp_path / "out" / f"{n}.nii.gz") for n in ("plain", "fine"))
    assert found.shape == fine.shape
    for number in (1, 2):
        assert dice(found, plain.repeat(2, 0).repeat(2, 2), number) > 0.9


def test_folds_average_their_logits(finetuned, labelled, tmp_path, small_plans):
    raw = {
        "fold": 1, "plan": {"file": str(small_plans)},
        "data": {"augmentation": "none", "validation": 2},
        "train": {"steps": 6, "save_every": 6, "optimizer": "adamw", "lr": 1e-2},
    }  # fmt: skip
    folds = tmp_path / "folds"
    folds.mkdir()
    finetune(labelled, folds / "fold1", build_config(FinetuneConfig, raw))
    shutil.copytree(finetuned, folds / "fold0")
    image = labelled / "imagesTr" / "case_3_0000.nii.gz"
    wanted = {"probabilities": True, **QUICK}
    one, two, both, listed = (tmp_path / name for name in ("one", "two", "both", "listed"))
    predict([folds / "fold0"], image, one, **wanted)
    predict([folds / "fold1"], image, two, **wanted)
    predict([folds], image, both, **wanted)
    predict([folds / "fold0", folds / "fold1"], image, listed, **wanted)
    name = "case_3_probabilities.nii.gz"
    logs = [np.log(array_of(folder / name) + 1e-30) for folder in (one, two)]
    mean = np.exp((logs[0] + logs[1]) / 2)
    np.testing.assert_allclose(array_of(both / name), mean / mean.sum(-1, keepdims=True), atol=1e-4)
    for file in (name, "case_3.nii.gz"):
        assert (both / file).read_bytes() == (listed / file).read_bytes()
    assert not np.array_equal(array_of(both / name), array_of(one / name))


def test_probabilities_belong_to_the_labels(finetuned, labelled, tmp_path):
    image = labelled / "imagesTr" / "case_1_0000.nii.gz"
    out = tmp_path / "out"
    predict([finetuned], image, out, probabilities=True, overlay=True, **QUICK)
    probabilities = nibabel.load(out / "case_1_probabilities.nii.gz")
    array = np.asarray(probabilities.dataobj)
    assert array.shape == (*nibabel.load(image).shape, 3)
    np.testing.assert_array_equal(array.argmax(-1), array_of(out / "case_1.nii.gz"))
    np.testing.assert_allclose(array.sum(-1), 1, atol=1e-5)
    np.testing.assert_array_equal(probabilities.affine, nibabel.load(image).affine)
    assert (out / "case_1.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(os.listdir(out)) == [
        "case_1.nii.gz", "case_1.png", "case_1_probabilities.nii.gz", RECORD,
    ]  # fmt: skip


def test_run_again_it_makes_what_is_missing(finetuned, labelled, tmp_path):
    images, out = labelled / "imagesTr", tmp_path / "out"
    part = predict(
        [finetuned], images, out, stopped=lambda: len(list(out.glob("*.nii.gz"))) == 2, **QUICK
    )
    assert part.stopped
    assert len(part.written) == 2
    before = {p.name: p.stat().st_mtime_ns for p in out.glob("*.nii.gz")}
    rest = predict([finetuned], images, out, **QUICK)
    assert [p.name for p in rest.kept] == sorted(before)
    assert [p.name for p in rest.written] == ["case_2.nii.gz", "case_3.nii.gz"]
    assert all((out / name).stat().st_mtime_ns == t for name, t in before.items())


def test_another_image_of_the_same_name_is_predicted_anew(finetuned, labelled, tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    source, other = (labelled / "imagesTr" / f"case_{i}_0000.nii.gz" for i in (0, 1))
    shutil.copy(source, folder / "scan.nii.gz")
    predict([finetuned], folder, out, **QUICK)
    before = array_of(out / "scan.nii.gz")
    shutil.copy(other, folder / "scan.nii.gz")
    done = predict([finetuned], folder, out, **QUICK)
    assert [p.name for p in done.written] == ["scan.nii.gz"]
    assert not np.array_equal(array_of(out / "scan.nii.gz"), before)
    assert predict([finetuned], folder, out, **QUICK).kept


def test_overwriting_leaves_what_it_did_not_make(finetuned, labelled, tmp_path):
    images, out = labelled / "imagesTr", tmp_path / "out"
    predict([finetuned], images / "case_0_0000.nii.gz", out, overlay=True, **QUICK)
    (out / "my_correction.nii.gz").write_bytes(b"hours of work")
    predict([finetuned], images / "case_1_0000.nii.gz", out, overwrite=True, **QUICK)
    names = sorted(path.name for path in out.iterdir())
    assert names == ["case_1.nii.gz", "my_correction.nii.gz", RECORD]


def test_a_folder_of_runs_that_are_no_folds_is_refused(finetuned, labelled, tmp_path, small_plans):
    image = labelled / "imagesTr" / "case_0_0000.nii.gz"
    for name in ("first", "second"):
        shutil.copytree(finetuned, tmp_path / "runs" / name)
    with pytest.raises(UserError, match=r"hold out the same cases.*--also"):
        predict([tmp_path / "runs"], image, tmp_path / "out", **QUICK)
    both = [tmp_path / "runs" / name for name in ("first", "second")]
    text = StringIO()
    predict(both, image, tmp_path / "out", console=Console(file=text, width=200), **QUICK)
    assert text.getvalue().count("step 80 of 80, fold 0 of Dataset009_Eggs") == 2
    shutil.move(tmp_path / "runs", tmp_path / "moved")
    moved = [tmp_path / "moved" / name for name in ("first", "second")]
    assert predict(moved, image, tmp_path / "out", **QUICK).kept


@pytest.mark.parametrize("option", ["device", "sums_on"])
def test_an_unknown_device_is_named_by_its_option(finetuned, labelled, tmp_path, option):
    image = labelled / "imagesTr" / "case_0_0000.nii.gz"
    with pytest.raises(UserError, match=f"--{option.replace('_', '-')} gpu: not on this machine"):
        predict([finetuned], image, tmp_path / "out", **{option: "gpu"})
    assert not (tmp_path / "out").exists()


def test_other_predictions_are_not_mixed_in(finetuned, labelled, tmp_path):
    image, out = labelled / "imagesTr" / "case_0_0000.nii.gz", tmp_path / "out"
    predict([finetuned], image, out, **QUICK)
    with pytest.raises(UserError, match="by other weights or options"):
        predict([finetuned], image, out, mirror=False, step=0.5)
    assert predict([finetuned], image, out, mirror=False, step=0.5, overwrite=True).written
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").touch()
    with pytest.raises(UserError, match="no predictions"):
        predict([finetuned], image, tmp_path / "own", **QUICK)
    with pytest.raises(UserError, match="a file; choose another"):
        predict([finetuned], image, tmp_path / "own" / "thesis.txt", **QUICK)


def test_an_unfit_case_is_left_out_and_named(finetuned, labelled, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    source = labelled / "imagesTr" / "case_0_0000.nii.gz"
    shutil.copy(source, folder / "good.nii.gz")
    (folder / "bad.nii.gz").write_bytes(source.read_bytes()[:-40])
    done = predict([finetuned], folder, tmp_path / "out", **QUICK)
    assert [p.name for p in done.written] == ["good.nii.gz"]
    assert "bad.nii.gz" in done.failures["bad"]


def test_weights_that_give_nonsense_are_named(finetuned, labelled, tmp_path, monkeypatch):
    def spoiled(path, *, best=False):
        run = load_finetuned(path, best=best)
        with torch.no_grad():
            run.network.decoder.seg_layers[-1].bias.fill_(float("nan"))
        return FinetunedRun(**vars(run))

    monkeypatch.setattr("sparsemae.predicting.ensemble.load_finetuned", spoiled)
    image = labelled / "imagesTr" / "case_0_0000.nii.gz"
    with pytest.raises(UserError, match=r"case_0: .*not finite"):
        predict([finetuned], image, tmp_path / "out", **QUICK)


def test_runs_that_do_not_belong_together_are_refused(finetuned, labelled, tmp_path, small_plans):
    image = labelled / "imagesTr" / "case_0_0000.nii.gz"
    raw = {
        "plan": {"file": str(coarser(small_plans, tmp_path, [1.0, 1.0, 2.0]))},
        "data": {"augmentation": "none", "validation": 1},
        "train": {"steps": 1, "save_every": 1},
    }
    finetune(labelled, tmp_path / "other", build_config(FinetuneConfig, raw))
    with pytest.raises(UserError, match=r"differs from that of .* in spacing"):
        predict([finetuned, tmp_path / "other"], image, tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="named twice"):
        predict([finetuned, finetuned], image, tmp_path / "out", **QUICK)
    with pytest.raises(UserError, match="no run there"):
        predict([tmp_path / "nothing"], image, tmp_path / "out", **QUICK)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nor a folder of them"):
        predict([tmp_path / "empty"], image, tmp_path / "out", **QUICK)
    shutil.copytree(finetuned, tmp_path / "twin")
    with pytest.raises(UserError, match="name one run"):
        predict([finetuned, tmp_path / "twin"], None, tmp_path / "out", validation=True)
    assert not (tmp_path / "out").exists()


def test_what_is_predicted_is_what_the_network_says(finetuned, labelled, tmp_path):
    """A volume of one window, computed by hand."""
    source = labelled / "imagesTr" / "case_2_0000.nii.gz"
    image = nibabel.load(source)
    small = nibabel.Nifti1Image(np.asarray(image.dataobj)[2:18, 4:20, 3:19], image.affine)
    nibabel.save(small, tmp_path / "small.nii.gz")
    predict([finetuned], tmp_path / "small.nii.gz", tmp_path / "out", mirror=False)
    loaded = load_finetuned(finetuned)
    ready = prepare_case([read_volume(tmp_path / "small.nii.gz")], None, loaded.plan)
    with torch.no_grad():
        logits = loaded.network(torch.from_numpy(ready.array)[None])
    np.testing.assert_array_equal(
        array_of(tmp_path / "out" / "small.nii.gz"), logits[0].argmax(0).numpy()
    )
