"""The slice viewer in a real browser: from disk, offline, and the slice it shows is the slice."""

import re

import numpy as np
import pytest

from sparsemae.report import write_run_report
from sparsemae.reporting.preview import load_preview

PIXELS = """id => {
  const canvas = document.getElementById(id);
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  return [canvas.width, canvas.height, Array.from(data)];
}"""
HIDDEN = (48, 52, 59)
AXES = {"axial": (2, 0, 1), "coronal": (1, 0, 2), "sagittal": (0, 1, 2)}  # fixed, right, up


def opened(page, run):
    page.goto(f"file://{write_run_report(run)}")
    page.wait_for_selector("#viewer[data-drawn]")
    return load_preview(run)


def drawn(page, item, plane, slice_):
    page.wait_for_selector(f'#viewer[data-drawn="{item} {plane} {slice_}"]')


def pixels(page, name):
    width, height, values = page.evaluate(PIXELS, name)
    return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]


def expected(volume, plane, slice_):
    """As radiology does not: left is left, and up is up."""
    fixed, across, up = AXES[plane]
    image = np.take(volume, slice_, fixed)  # the axes that remain stay in order
    assert across < up
    return image.T[::-1]


def assert_shown(page, preview, item, plane, slice_):
    drawn(page, item, plane, slice_)
    hidden = ~preview.visible[item]
    for axis, width in enumerate(preview.block_size):
        hidden = hidden.repeat(width, axis)
    grey = expected(preview.original[item], plane, slice_)
    assert np.array_equal(pixels(page, "original"), np.stack([grey] * 3, -1))
    restored = expected(preview.reconstruction[item], plane, slice_)
    assert np.array_equal(pixels(page, "reconstruction"), np.stack([restored] * 3, -1))
    masked = np.where(expected(hidden, plane, slice_)[..., None], HIDDEN, grey[..., None])
    assert np.array_equal(pixels(page, "masked"), masked)


def test_it_opens_on_the_middle_axial_slice(page, make_run, make_preview):
    preview = opened(page, make_run(preview=make_preview()))
    assert_shown(page, preview, 0, "axial", 4)
    assert page.inner_text("#shown") == "axial slice 5 of 8"
    assert not page.is_visible("#viewer-note")


def test_slider_keys_and_wheel_move_the_slice(page, make_run, make_preview):
    preview = opened(page, make_run(preview=make_preview()))
    page.focus("#slice")
    page.keyboard.press("ArrowRight")
    assert_shown(page, preview, 0, "axial", 5)
    page.keyboard.press("Home")
    assert_shown(page, preview, 0, "axial", 0)
    box = page.query_selector("#slice").bounding_box()
    page.mouse.click(box["x"] + box["width"] - 3, box["y"] + box["height"] / 2)
    assert_shown(page, preview, 0, "axial", 7)
    page.focus("#viewer")
    page.keyboard.press("ArrowDown")
    assert_shown(page, preview, 0, "axial", 6)
    page.hover("#masked")
    page.mouse.wheel(0, 100)
    assert_shown(page, preview, 0, "axial", 5)
    for _ in range(5):
        page.mouse.wheel(0, -100)  # stops at the last slice
    assert_shown(page, preview, 0, "axial", 7)


@pytest.mark.parametrize(("plane", "middle"), [("coronal", 8), ("sagittal", 12)])
def test_planes_show_their_own_slices_in_the_right_shape(
    page, make_run, make_preview, plane, middle
):
    preview = opened(page, make_run(preview=make_preview()))
    page.click(f'[data-plane="{plane}"]')
    assert_shown(page, preview, 0, plane, middle)
    page.focus("#slice")
    page.keyboard.press("ArrowLeft")
    assert_shown(page, preview, 0, plane, middle - 1)
    box = page.query_selector("#original").bounding_box()
    shape, mm = preview.original.shape[1:], preview.spacing[0]
    _, across, up = AXES[plane]
    ratio = shape[across] * mm[across] / (shape[up] * mm[up])
    assert box["width"] / box["height"] == pytest.approx(ratio, rel=0.01)
    letters = {"coronal": "LRSI", "sagittal": "PASI"}[plane]
    sides = ("left", "right", "top", "bottom")
    assert "".join(page.inner_text(f"#viewer .{side}") for side in sides) == letters


def test_another_case_is_shown_at_the_same_place(page, make_run, make_preview):
    preview = opened(page, make_run(preview=make_preview()))
    page.focus("#slice")
    page.keyboard.press("ArrowRight")
    drawn(page, 0, "axial", 5)
    page.select_option("#item", "1")
    assert_shown(page, preview, 1, "axial", 5)
    assert page.inner_text("#item option:checked") == "case b"


def test_a_single_case_is_named_and_not_chosen(page, make_run, make_preview):
    preview = opened(page, make_run(preview=make_preview(cases=("only one",))))
    assert_shown(page, preview, 0, "axial", 4)
    assert "only one" in page.inner_text(".controls")
    assert page.query_selector("#item") is None


def test_a_browser_that_cannot_unpack_says_so(page, make_run, make_preview):
    page.add_init_script("delete window.DecompressionStream")
    page.goto(f"file://{write_run_report(make_run(preview=make_preview()))}")
    assert "lacks DecompressionStream" in page.inner_text("#viewer-note")
    assert not page.is_visible("#viewer")


def test_volumes_that_cannot_be_unpacked_are_said_to_be_damaged(page, make_run, make_preview):
    file = write_run_report(make_run(preview=make_preview()))
    text = file.read_text()
    start = text.index('"original": "') + 13
    file.write_text(text[:start] + text[start + 40 :])
    page.goto(f"file://{file}")
    page.wait_for_selector("#viewer-note:not([hidden])")
    assert "The volumes in this page are damaged" in page.inner_text("#viewer-note")


def test_a_script_that_got_into_the_page_does_not_run(browser, make_run):
    page = browser.new_page()
    file = write_run_report(make_run())
    file.write_text(file.read_text().replace("</h1>", "</h1><script>document.title='bad'</script>"))
    page.goto(f"file://{file}")
    assert page.title() == "run: training"
    page.close()


def test_a_pointer_over_a_curve_reads_its_values(page, make_run):
    page.goto(f"file://{write_run_report(make_run(steps=1000, odd=[500]))}")
    chart = page.locator(".curve").first
    box = chart.locator("svg").bounding_box()
    page.mouse.move(box["x"] + box["width"] - 20, box["y"] + box["height"] / 2)
    words = chart.locator("output").inner_text()
    found = re.fullmatch(
        r"step ([\d,]+): training (\S+) \((\S+) to (\S+)\) · step ([\d,]+): validation (\S+)", words
    )
    step, mean, least, most, validated, value = (float(n.replace(",", "")) for n in found.groups())
    assert 980 < step <= 1000
    assert mean == pytest.approx(3 / step + 0.2, rel=0.01)
    assert least <= mean <= most
    assert (validated, value) == (1000, 0.302)
    page.mouse.move(0, 0)
    assert chart.locator("output").inner_text() == ""


def test_it_works_at_the_width_of_a_phone_without_a_preview_and_with_hostile_names(
    page, make_run, make_preview
):
    page.set_viewport_size({"width": 400, "height": 800})
    evil = "<img src=http://example.com onerror=alert(1)>"
    opened(page, make_run(preview=make_preview(cases=(evil, "b"))))
    width = page.evaluate("document.documentElement.scrollWidth")
    assert width <= 400
    assert page.inner_text("#item option:checked") == evil
    page.goto(f"file://{write_run_report(make_run('bare'))}")
    assert "No volumes to show yet" in page.inner_text("body")
