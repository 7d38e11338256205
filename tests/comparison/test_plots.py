"""What the pictures show is where the numbers say."""

import io

import numpy as np
import pytest

from sparsemae.comparison.plots import difference_plot, drawn, rank_diagram, short
from sparsemae.comparison.statistics import Estimate

METHODS = ("scratch", "mae", "s3d", "genesis", "fusion", "voco", "dynamic")
RANKS = (4.5, 3.0, 2.0, 3.2, 4.4, 6.3, 4.6)


def lines(figure):
    """Places of all lines of a diagram, with their style."""
    return [(np.array(line.get_xydata()), line) for line in figure.axes[0].lines]


def axis(figure, count):
    """Where ranks are: rank to inches."""
    (line, _), *_ = lines(figure)
    start, stop = line[:, 0]
    return lambda rank: start + (rank - 1) / (count - 1) * (stop - start)


@pytest.mark.parametrize("count", [2, 3, 7])
def test_every_method_stands_at_its_rank(count):
    figure = rank_diagram(METHODS[:count], RANKS[:count], [], "title")
    place = axis(figure, count)
    elbows = {round(xy[0, 0], 6): xy[-1] for xy, _ in lines(figure) if len(xy) == 3}
    texts = {t.get_text(): t.get_position() for t in figure.axes[0].texts}
    for name, rank in zip(METHODS[:count], RANKS, strict=False):
        end = elbows[round(place(rank), 6)]
        x, y = texts[f"{name}  {rank:.2f}"]
        assert y == pytest.approx(end[1])
        assert abs(x - end[0]) < 0.1
    assert len(elbows) == count
    for rank in range(1, count + 1):
        assert texts[str(rank)][0] == pytest.approx(place(rank))


def test_the_best_is_named_left_and_on_top():
    figure = rank_diagram(METHODS, RANKS, [], "title")
    texts = {t.get_text().split()[0]: t.get_position() for t in figure.axes[0].texts}
    left = [name for name in METHODS if texts[name][0] < 4.5]
    assert sorted(left, key=lambda name: -texts[name][1]) == ["s3d", "mae", "genesis", "fusion"]
    right = sorted(set(METHODS) - set(left), key=lambda name: -texts[name][1])
    assert right == ["voco", "dynamic", "scratch"]  # lines do not cross


def test_a_bar_has_a_dot_for_each_of_its_methods_and_for_no_other():
    figure = rank_diagram(METHODS, RANKS, [(1, 2), (1, 4, 6)], "title")
    place = axis(figure, 7)
    dots = [xy for xy, line in lines(figure) if line.get_marker() == "o"]
    found = sorted(tuple(np.round(xy[:, 0], 6)) for xy in dots)
    expected = [(2.0, 3.0), (3.0, 4.4, 4.6)]  # 4.5, scratch, has none
    assert found == sorted(tuple(np.round([place(r) for r in group], 6)) for group in expected)
    heights = {xy[0, 1] for xy in dots}
    assert len(heights) == 2  # they share a method, so they are not in one row


def test_bars_apart_share_a_row():
    figure = rank_diagram(METHODS, RANKS, [(1, 2), (0, 6)], "title")
    dots = [xy for xy, line in lines(figure) if line.get_marker() == "o"]
    assert dots[0][0, 1] == dots[1][0, 1]


def test_one_method_and_ties_are_drawn():
    for count in (1, 2):
        figure = rank_diagram(METHODS[:count], [1.5] * count, [tuple(range(count))], "title")
        assert drawn(figure, "png").startswith(b"\x89PNG")


def test_differences_are_in_points_at_their_data_set():
    rows = [
        ("first", [Estimate(0.01, 0.0, 0.03), Estimate(-0.02, -0.03, -0.01)]),
        ("second", [Estimate(0.04, 0.03, 0.05), Estimate(0.0, -0.01, 0.01)]),
    ]
    figure = difference_plot(("mae", "s3d"), rows, "scratch")
    axes = figure.axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == ["first", "second"]
    assert axes.yaxis_inverted()  # the first is on top
    marks = {line.get_label(): line.get_xydata() for line in axes.lines}
    assert marks["mae"][:, 0] == pytest.approx([1.0, 4.0])
    assert marks["s3d"][:, 0] == pytest.approx([-2.0, 0.0])
    ticks = axes.get_yticks()
    assert np.abs(marks["mae"][:, 1] - ticks).max() < (ticks[1] - ticks[0]) / 2
    first, second = axes.collections
    ends = [segment[:, 0].tolist() for segment in first.get_segments()]
    assert ends == [pytest.approx([0.0, 3.0]), pytest.approx([3.0, 5.0])]
    assert second.get_segments()[0][:, 0].tolist() == pytest.approx([-3.0, -1.0])
    assert "scratch" in axes.get_xlabel()


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_numbers_give_the_same_file(kind):
    files = [drawn(rank_diagram(METHODS, RANKS, [(1, 2)], "title"), kind) for _ in range(2)]
    assert files[0] == files[1]


def test_names_have_room():
    name = "a" * 40 + "b" * 24
    assert len(short(name)) <= 22
    assert short(name)[0] == "a"
    assert short(name)[-1] == "b"
    figure = rank_diagram((name, "x" * 22), (1.0, 2.0), [], "title")
    figure.draw_without_rendering()
    width = figure.get_figwidth() * figure.dpi
    for text in figure.axes[0].texts:
        box = text.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= width


def test_pictures_are_not_blank():
    from matplotlib.image import imread

    for figure in (
        rank_diagram(METHODS[:2], (1.2, 1.8), [(0, 1)], "title"),
        difference_plot(("mae",), [("d", [Estimate(0.01, 0.0, 0.02)])], "scratch"),
    ):
        pixels = imread(io.BytesIO(drawn(figure, "png")))[..., :3]
        assert (pixels == 1).all(-1).mean() > 0.5
        assert (pixels < 0.9).any(-1).mean() > 0.005
