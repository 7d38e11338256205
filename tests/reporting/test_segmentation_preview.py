"""Previews of a segmentation on disk: classes stay exact, and keep their colours in a picture."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.image import imread

from sparsemae.predicting.overlay import draw_overlay
from sparsemae.reporting import preview as module
from sparsemae.reporting.palette import class_colours, coloured
from sparsemae.reporting.preview import load_preview, save_preview
from sparsemae.reporting.segmentation import StoredSegmentation

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # of classes 1 and 2
OVER = 0.45


def test_classes_come_back_as_they_were(tmp_path, make_segmentation):
    made = make_segmentation(ignore=True, names=("background", "shell", "ignore"))
    save_preview(tmp_path, made)
    found = load_preview(tmp_path)
    assert isinstance(found, StoredSegmentation)
    assert (found.step, found.cases, found.names, found.ignore) == (
        *(40, ("case a", "case b")),
        *(("background", "shell", "ignore"), True),
    )
    assert np.array_equal(found.reference, made.reference)
    assert np.array_equal(found.prediction, made.prediction)
    assert np.array_equal(found.spacing, made.spacing)
    low, high = np.percentile(made.image[1], (0.5, 99.5))
    grey = ((made.image[1] - low) / (high - low) * 255).clip(0, 255).round()
    assert np.abs(found.image[1] - grey).max() <= 1


def test_more_classes_than_a_byte_counts_are_kept(tmp_path, make_segmentation):
    made = make_segmentation(names=tuple(map(str, range(401))))
    made.prediction[0, 0, 0, 0] = 400
    save_preview(tmp_path, made)
    assert load_preview(tmp_path).prediction[0, 0, 0, 0] == 400


def test_large_patches_become_smaller_without_mixing_classes(
    tmp_path, make_segmentation, monkeypatch
):
    monkeypatch.setattr(module, "MOST_VOXELS", 24 * 16 * 8 // 4)
    made = make_segmentation()
    save_preview(tmp_path, made)
    found = load_preview(tmp_path)
    assert found.image.shape == (2, 12, 8, 8)  # the longest axes first
    assert found.spacing.tolist() == [[2.0, 3.0, 3.0]] * 2
    for name in ("reference", "prediction"):
        assert np.array_equal(getattr(found, name), getattr(made, name)[:, 1::2, 1::2])


def test_a_patch_of_odd_size_stays_as_it_is(tmp_path, make_segmentation, monkeypatch):
    monkeypatch.setattr(module, "MOST_VOXELS", 100)
    made = make_segmentation()
    volumes = ("image", "reference", "prediction")
    odd = replace(made, **{name: getattr(made, name)[:, :23, :15, :7] for name in volumes})
    save_preview(tmp_path, odd)
    assert load_preview(tmp_path).image.shape == (2, 23, 15, 7)


def test_a_class_lies_over_the_image_in_its_colour():
    grey = np.array([100, 100, 200, 0], np.uint8)
    mixed = coloured(grey, np.array([0, 1, 2, 2]), class_colours(3))
    expected = [[100] * 3] + [
        [round((1 - OVER) * g + OVER * c) for c in colour]
        for g, colour in ((100, BLUE), (200, ORANGE), (0, ORANGE))
    ]
    assert np.abs(mixed.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("count", [2, 11, 12, 21, 60])
def test_as_many_classes_as_there_are_colours_differ(count):
    colours = class_colours(count)
    assert colours.shape == (count, 3)
    assert len(np.unique(colours[1:], axis=0)) == min(count - 1, 20)


def shares(pixels, colour, grey):
    """Where a picture shows a class over this grey."""
    mixed = (1 - OVER) * grey + OVER * np.array(colour)
    return np.abs(255 * pixels[..., :3] - mixed).max(-1) < 2.5


def test_the_picture_has_reference_and_prediction_in_their_columns(tmp_path, make_segmentation):
    made = make_segmentation(cases=("one",))
    made = replace(made, image=np.zeros_like(made.image))
    made.reference[:], made.prediction[:] = 0, 0
    made.reference[0, 2:8, 10:14], made.prediction[0, 14:20, 10:14] = 1, 2
    save_preview(tmp_path, made)
    pixels = imread(tmp_path / "preview.png")
    pixels = pixels[: int(0.92 * len(pixels))]  # without the legend
    third = pixels.shape[1] // 3
    columns = [pixels[:, i * third : (i + 1) * third] for i in range(3)]
    found = [[shares(c, colour, 0).mean() > 0.01 for c in columns] for colour in (BLUE, ORANGE)]
    assert found == [[False, True, False], [False, False, True]]
    row, column = np.argwhere(shares(columns[1], BLUE, 0)).mean(0)
    assert column < 0.5 * third  # a small first index is left
    assert row < 0.5 * len(pixels)  # a large second one is up


@pytest.mark.parametrize("letters", [4, 13, 60])
def test_many_names_have_room_below_the_picture(tmp_path, make_segmentation, letters):
    made = make_segmentation(names=tuple(f"{i:x>{letters}}" for i in range(30)))
    made.reference[0, :, :, 4] = 1 + np.arange(24)[:, None]
    save_preview(tmp_path, made)
    pixels = imread(tmp_path / "preview.png")[..., :3]
    assert pixels[-80:].max() > 0.8  # names
    assert pixels[:, :4].max() < 0.05  # nothing is cut off
    assert pixels[:, -4:].max() < 0.05


def test_a_prediction_is_drawn_in_the_same_colours(tmp_path):
    image, labels = np.zeros((20, 20, 20), np.float32), np.zeros((20, 20, 20), np.uint8)
    labels[2:18, 2:10, 2:18], labels[2:18, 10:18, 2:18] = 1, 2
    names = ("background", "$x^", "名前" * 40)  # as a formula, the first would be an error
    draw_overlay(image, labels, (1.0, 1.0, 1.0), names, tmp_path / "a.png")
    pixels = imread(tmp_path / "a.png")
    upper, lower = np.split(pixels[: len(pixels) // 2 * 2], 2)
    for colour in (BLUE, ORANGE):
        assert shares(lower, colour, 0).mean() > 0.02
        assert not shares(upper, colour, 0).any()


def test_nothing_that_is_odd_breaks_the_picture(tmp_path, make_segmentation, recwarn):
    made = make_segmentation(cases=("$x^", "名前" * 200), names=("$x^", "名前" * 200, "b" * 999))
    made.image[1, :4] = np.nan
    save_preview(tmp_path, made)
    assert load_preview(tmp_path).cases == made.cases
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


@pytest.mark.parametrize(
    "changes",
    [
        {"reference": np.zeros((2, 24, 16, 7), np.uint16)},
        {"reference": np.zeros((2, 24, 16, 8), np.uint8)},
        {"prediction": np.full((2, 24, 16, 8), 3, np.uint16)},
        {"image": np.zeros((2, 24, 16, 8), np.float32)},
        {"image": np.zeros(3, np.uint8)},
        {"names": np.array(["background"])},
        {"names": np.array([], str)},
        {"cases": np.array(["a"])},
        {"spacing": np.array([[1.0, np.nan, 1.0]] * 2)},
        {"ignore": np.array([1, 2])},
        {"image": None},
    ],
    ids=str,
)
def test_arrays_that_do_not_go_together_are_no_preview(tmp_path, make_segmentation, changes):
    save_preview(tmp_path, make_segmentation())
    with np.load(tmp_path / "preview.npz") as arrays:
        kept = {k: v for k, v in {**arrays, **changes}.items() if v is not None}
    np.savez(tmp_path / "preview.npz", **kept)
    assert load_preview(tmp_path) is None
