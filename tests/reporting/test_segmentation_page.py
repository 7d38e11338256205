"""The page of a fine-tuning run: its classes in a real browser, its Dice, its data set and plan."""

import json
import re
import shutil
from io import StringIO

import nibabel
import numpy as np
import pytest
import torch
from rich.console import Console

from sparsemae.config import build_config
from sparsemae.finetune import FinetuneConfig, finetune, load_finetuned
from sparsemae.kinds import FINETUNING, PRETRAINING, kind_of
from sparsemae.report import write_run_report
from sparsemae.reporting.facts import read_facts
from sparsemae.reporting.preview import load_preview
from sparsemae.status import describe, read_status
from sparsemae.training.loop import StepRecord
from sparsemae.training.progress import TrainingProgress

PIXELS = """id => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.width, canvas.height, Array.from(data)];
}"""
BLUE, ORANGE, WHITE = (31, 119, 180), (255, 127, 14), (255, 255, 255)
OVER = 0.45  # of a class over the image
EVIL = "<img src=x onerror=alert(1)>&\"'</script>"
TASK = {
    "dataset": "Dataset009_Eggs", "path": "/raw/Dataset009_Eggs", "channels": ["T1", "T2"],
    "classes": ["background", "shell", "core"], "ignore": None, "train": ["a", "b", "c"],
    "val": ["d"], "init": "pre/run", "transfer": "parameters: 9 M copied; 100% of the encoder",
}  # fmt: skip
PLAN = {
    "planner": "like_pretrained", "spacing": [1.0, 0.75, 2.5], "patch_size": [96, 128, 32],
    "batch_size": 2, "features_per_stage": [32, 64], "n_blocks_per_stage": [1, 3],
    "channels": [{"name": "T1", "normalization": "zscore"}, {"name": "T2", "normalization": "ct"}],
    "strides": [[1, 1, 1], [2, 2, 1]], "kernel_sizes": [[3, 3, 1], [3, 3, 3]],
    "n_conv_per_stage_decoder": [1], "batch_dice": False,
}  # fmt: skip


@pytest.fixture
def make_finetuned(make_run):
    """`make_finetuned(task={}, plan={}, ...)`: a fine-tuning run's folder; see make_run."""

    def make(*, task=(), plan=(), **options):
        run = make_run(**options)
        (run / "task.json").write_text(json.dumps(TASK | dict(task)))
        (run / "plan.json").write_text(json.dumps(PLAN | dict(plan)))
        return run

    return make


def words(run):
    page = write_run_report(run).read_text(encoding="utf-8")
    return " ".join(re.sub(r"<(script|style|svg).*?</\1>|<[^>]*>", " ", page, flags=re.S).split())


def assert_shown(page, preview, item, plane, slice_):
    page.wait_for_selector(f'#viewer[data-drawn="{item} {plane} {slice_}"]')
    fixed = {"sagittal": 0, "coronal": 1, "axial": 2}[plane]
    # to the right and up is along the axes that remain, in order
    upright = (np.take(v[item], slice_, fixed).T[::-1] for v in (preview.image, preview.reference))
    grey, reference = upright
    prediction = np.take(preview.prediction[item], slice_, fixed).T[::-1]
    colours = [(0, 0, 0), BLUE, WHITE if preview.ignore else ORANGE]
    nothing = np.zeros_like(reference)
    views = (("image", nothing), ("reference", reference), ("prediction", prediction))
    for name, classes in views:
        width, height, values = page.evaluate(PIXELS, name)
        found = np.array(values).reshape(height, width, 4)[..., :3]
        share = OVER * (classes > 0)[..., None]
        expected = (1 - share) * grey[..., None] + share * np.array(colours)[classes]
        assert np.abs(found - expected).max() <= 1, name


@pytest.mark.parametrize(("plane", "middle"), [("axial", 4), ("coronal", 8), ("sagittal", 12)])
def test_views_show_image_reference_and_prediction_in_colour(
    page, make_finetuned, make_segmentation, plane, middle
):
    run = make_finetuned(preview=make_segmentation())
    page.goto(f"file://{write_run_report(run)}")
    preview = load_preview(run)
    page.click(f'[data-plane="{plane}"]')
    assert_shown(page, preview, 0, plane, middle)
    page.focus("#slice")
    page.keyboard.press("ArrowLeft")
    page.select_option("#item", "1")
    assert_shown(page, preview, 1, plane, middle - 1)
    canvas = page.query_selector("#prediction").bounding_box()
    mm = {"sagittal": 24 * 1.0, "coronal": 16 * 1.5, "axial": 8 * 3.0}  # along what each leaves out
    across, up = (width for name, width in mm.items() if name != plane)
    assert canvas["width"] / canvas["height"] == pytest.approx(across / up, rel=0.01)


def test_what_the_page_shows_is_what_was_saved(make_finetuned, make_segmentation):
    made = make_segmentation()
    found = load_preview(make_finetuned(preview=made))
    assert np.array_equal(found.reference, made.reference)
    assert np.array_equal(found.prediction, made.prediction)


def test_classes_that_occur_are_named_beside_their_colours(page, make_finetuned, make_segmentation):
    names = ("background", EVIL, "nowhere", "core")
    made = make_segmentation(names=names)
    for volume in (made.reference, made.prediction):
        volume[volume == 2] = 3
    page.goto(f"file://{write_run_report(make_finetuned(preview=made))}")
    page.wait_for_selector("#viewer[data-drawn]")
    items = page.locator(".classes li")
    assert items.all_inner_texts() == [EVIL, "core"]
    style = "e => getComputedStyle(e).backgroundColor"
    shown = [items.nth(i).locator("i").evaluate(style) for i in range(2)]
    assert shown == ["rgb(31, 119, 180)", "rgb(44, 160, 44)"]  # green is that of class 3


def test_voxels_of_unknown_class_are_white(page, make_finetuned, make_segmentation):
    made = make_segmentation(names=("background", "shell", "ignore"), ignore=True)
    for volume in (made.reference, made.prediction):
        volume[:, :10][volume[:, :10] == 2] = 1
    run = make_finetuned(preview=made)
    page.goto(f"file://{write_run_report(run)}")
    page.click('[data-plane="axial"]')
    assert_shown(page, load_preview(run), 0, "axial", 4)
    assert page.locator(".classes li").all_inner_texts() == ["shell", "ignore"]


def test_words_are_those_of_a_segmentation(make_finetuned, make_segmentation):
    run = make_finetuned(preview=make_segmentation(), best={"step": 30, "val_loss": 0.125})
    told = words(run)
    assert "0.875 best validation Dice, step 30" in told
    assert "Segmentation Unpacking the volumes" in told
    assert "Validation Dice, mean of the classes over fixed patches" in told
    for word in ("Reconstruction", "validation loss", "masked", "mask"):
        assert word not in told
    text = describe(read_status(run)).split("\n")
    assert "best validation Dice 0.8750 at step 30" in text


def test_the_curve_is_of_dice_from_0_and_apart_from_the_loss(make_finetuned):
    page = write_run_report(make_finetuned()).read_text()
    charts = re.findall(r'data-read="([^"]*)"><output></output><svg[^>]*aria-label="([^"]*)"', page)
    read = {label: json.loads(text.replace("&quot;", '"')) for text, label in charts}
    assert [curve["name"] for curve in read["loss"]] == ["training"]
    (dice,) = read["validation Dice"]
    assert dice["steps"] == [10, 20, 30, 40]  # there val_loss is 2 / step + 0.3
    assert [float(v[0]) for v in dice["values"]] == pytest.approx([0.5, 0.6, 0.633, 0.65])
    chart = page[page.index('aria-label="validation Dice"') :].partition("</svg>")[0]
    assert ">0</text>" in chart


def test_pages_of_pretraining_say_validation_loss(make_run, make_preview):
    told = words(make_run(preview=make_preview()))
    assert "best validation loss, step 40" in told
    assert "Reconstruction Unpacking the volumes" in told
    assert "Data set and plan" not in told
    assert "Dice" not in told


def test_the_page_tells_data_set_start_and_plan(make_finetuned):
    told = words(make_finetuned())
    for row in (
        "data set Dataset009_Eggs",
        "its folder /raw/Dataset009_Eggs",
        "classes background, shell, core",
        "channels T1, T2",
        "cases trained on 3: a, b, c",
        "cases held out 1: d",
        "started from pre/run",
        "transferred parameters: 9 M copied; 100% of the encoder",
        "planned by like_pretrained",
        "voxel, mm 1 x 0.75 x 2.5",
        "patch, voxels 96 x 128 x 32",
        "patches per step 2",
        "normalization T1 zscore, T2 ct",
        "features of the stages 32, 64",
        "their strides 1 x 1 x 1, 2 x 2 x 1",
        "their kernels 3 x 3 x 1, 3 x 3 x 3",
    ):
        assert row in told, row


def test_what_is_not_told_has_no_row(make_finetuned):
    run = make_finetuned(task={"init": "none", "transfer": None, "val": []})
    rows = dict(read_facts(run))
    assert rows["started from"] == "random weights"
    assert rows["cases held out"] == "none"
    assert not {"transferred", "ignored label"} & rows.keys()
    assert dict(read_facts(make_finetuned(name="b", task={"ignore": 3})))["ignored label"] == "3"


ODD = [None, True, 1e400, 10**30, EVIL, [], [1, [EVIL]], [[[[[]]]]], {"a": 1}, "\ud800", [None]]


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
def test_no_value_of_another_kind_breaks_the_page(make_finetuned, value):
    run = make_finetuned()
    for name, good in (("task.json", TASK), ("plan.json", PLAN)):
        for changed in ({**good, key: value} for key in good):
            (run / name).write_text(json.dumps(changed))
            read_facts(run)
        (run / name).write_text(json.dumps(dict.fromkeys(good, value)))
    page = write_run_report(run).read_text(encoding="utf-8")
    assert "model.preset" in page
    assert "<img" not in page


@pytest.mark.parametrize("data", [b"", b"[1]", b"\xff", b"[" * 100_000], ids=range(4))
def test_damaged_files_cost_their_rows_only(make_finetuned, data):
    run = make_finetuned()
    (run / "task.json").write_bytes(data)
    (run / "plan.json").write_bytes(data)
    told = words(run)
    assert "model.preset" in told
    assert "best validation Dice" in told  # still known to be one


@pytest.mark.parametrize(("kind", "data"), [(PRETRAINING, "STORE"), (FINETUNING, "DATASET")])
def test_how_to_go_on_is_told_for_both_kinds(make_run, make_finetuned, kind, data):
    run = (make_run if kind is PRETRAINING else make_finetuned)(state="preempted")
    command = f"sparsemae {kind.command} /data/store -o {run} --resume"
    assert describe(read_status(run)).endswith(command)
    (run / "status.json").unlink()
    assert f" {kind.command} {data} -o {run} --resume" in describe(read_status(run))
    assert kind_of(run) is kind


@pytest.mark.parametrize("terminal", [True, False])
def test_the_terminal_shows_dice(terminal):
    console = Console(file=StringIO(), force_terminal=terminal, width=200)
    times = {"seconds": 0.5, "wait_seconds": 0.0, "samples": 6, "memory": None}
    record = StepRecord(40, 0.5, 1e-2, 3.0, skipped=False, spike=False, **times)
    with TrainingProgress(100, 0, console, FINETUNING.measure) as progress:
        progress.update(record)
        progress.validated(40, 0.25)
    told = console.file.getvalue()
    assert "validation Dice" in told
    assert "0.7500" in told
    assert "validation Dice 0.7500" in told or terminal  # which has names above numbers


@pytest.fixture(scope="module")
def shown(finetuned):
    """What a run of the command kept to show."""
    return load_preview(finetuned)


def test_a_run_shows_patches_of_the_cases_it_held_out(finetuned, shown, labelled):
    task = json.loads((finetuned / "task.json").read_text())
    assert shown.cases == tuple(task["val"]) * 3  # one is held out
    assert shown.names == ("background", "shell", "core")
    assert shown.spacing.tolist() == [[1.0, 1.0, 1.0]] * 3
    for i, case in enumerate(shown.cases):
        image, labels = (
            np.asarray(nibabel.load(labelled / part / name).dataobj)
            for part, name in (
                *[("imagesTr", f"{case}_0000.nii.gz"), ("labelsTr", f"{case}.nii.gz")],
            )
        )
        windows = np.lib.stride_tricks.sliding_window_view(labels, shown.reference.shape[1:])
        same = np.argwhere((windows == shown.reference[i]).all((3, 4, 5)))
        (begin,) = same  # at one place, in the order of axes that the file has
        place = tuple(slice(b, b + n) for b, n in zip(begin, (16, 16, 16), strict=True))
        assert np.corrcoef(image[place].ravel(), shown.image[i].ravel())[0, 1] > 0.95
        assert shown.reference[i, 8, 8, 8] > 0 or (begin == 0).any() or (begin > 3).any()


def test_a_run_shows_what_its_network_predicts(finetuned, shown):
    assert not np.array_equal(shown.prediction, shown.reference)
    loaded = load_finetuned(finetuned)
    for i in range(len(shown.cases)):
        # the grey scale keeps the patch, but for its contrast; the stem's norm does not see that
        image = torch.from_numpy(shown.image[i].astype(np.float32))
        image = (image - image.mean()) / image.std()
        with torch.no_grad():
            found = loaded.network(image[None, None]).argmax(1)[0].numpy()
        assert (found == shown.prediction[i]).mean() > 0.9
        assert (shown.reference[i] == shown.prediction[i]).mean() > 0.8


@pytest.mark.parametrize(("val", "told"), [([], "none"), (None, "none: validated on those")])
def test_without_cases_held_out_patches_of_the_others_are_shown(
    labelled, tmp_path, small_plans, val, told
):
    raw = {
        "plan": {"file": str(small_plans)},
        "data": {"augmentation": "plain", "validation": 1},
        "train": {"steps": 2, "save_every": 2},
    }
    if val is None:
        raw["fold"] = "all"  # as nnU-Net, it scores what it trains on
    else:
        split = {"train": ["case_0", "case_2", "case_3"], "val": val}
        (tmp_path / "splits.json").write_text(json.dumps([split]))
        raw["splits"] = str(tmp_path / "splits.json")
    finetune(labelled, tmp_path / "run", build_config(FinetuneConfig, raw))
    assert len(set(load_preview(tmp_path / "run").cases)) == 3
    assert f"cases held out {told}" in words(tmp_path / "run")
    assert ("best validation Dice" in words(tmp_path / "run")) == (val is None)


def test_what_was_transferred_is_still_told_when_a_run_goes_on(
    labelled, tmp_path, small_plans, finetuned
):
    start, run = tmp_path / "start", tmp_path / "run"
    shutil.copytree(finetuned, start, ignore=shutil.ignore_patterns("store"))
    raw = {
        "init": str(start),
        "plan": {"file": str(small_plans)},
        "data": {"augmentation": "plain", "validation": 1},
        "train": {"steps": 3, "save_every": 3},
    }
    console = Console(file=StringIO(), width=200)
    finetune(labelled, run, build_config(FinetuneConfig, raw), console=console)
    assert re.search(r"step 3/3  validation Dice 0\.[3-9]", console.file.getvalue())
    before = (run / "task.json").read_bytes()
    rows = dict(read_facts(run))
    assert rows["started from"] == str(start)
    assert re.fullmatch(r"parameters: .* copied.*100% of the encoder.*", rows["transferred"])
    shutil.rmtree(start)  # it has been taken in
    finetune(labelled, run, None, overrides=["train.steps=4"], resume=True)
    assert (run / "task.json").read_bytes() == before
    (run / "task.json").unlink()
    finetune(labelled, run, None, overrides=["train.steps=5"], resume=True)
    assert "transferred" not in dict(read_facts(run))
    assert dict(read_facts(run))["data set"] == "Dataset009_Eggs"
