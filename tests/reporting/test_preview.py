"""Previews on disk: small, whole or not at all, and masks that stay exact."""

import numpy as np
import pytest
from matplotlib.image import imread

from sparsemae.reporting import preview as module
from sparsemae.reporting.preview import Preview, load_preview, save_preview


def test_volumes_come_back_in_grey_with_their_masks(tmp_path, make_preview):
    made = make_preview()
    save_preview(tmp_path, made)
    found = load_preview(tmp_path)
    assert (found.step, found.cases) == (40, ("case a", "case b"))
    assert found.original.shape == made.original.shape
    assert np.array_equal(found.visible, made.visible)
    assert np.array_equal(found.spacing, made.spacing)
    assert found.block_size == made.block_size
    low, high = np.percentile(made.original[0], (0.5, 99.5))
    expected = ((made.original[0] - low) / (high - low) * 255).clip(0, 255).round()
    assert np.abs(found.original[0] - expected).max() <= 1
    restored = ((made.reconstruction[0] - low) / (high - low) * 255).clip(0, 255).round()
    assert np.abs(found.reconstruction[0] - restored).max() <= 1  # on the original's scale


def test_large_volumes_are_averaged_down_in_whole_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_VOXELS", 600)
    rng = np.random.default_rng(0)
    volume = rng.standard_normal((1, 16, 16, 8)).astype(np.float32)
    visible = rng.random((1, 4, 4, 1)) < 0.5
    made = Preview(1, ("a",), volume, volume, visible, (4, 4, 8), np.ones((1, 3)))
    save_preview(tmp_path, made)
    found = load_preview(tmp_path)
    assert found.original.shape == (1, 8, 8, 8)
    assert found.block_size == (2, 2, 8)
    assert found.spacing.tolist() == [[2, 2, 1]]
    mean = volume.reshape(1, 8, 2, 8, 2, 8).mean((2, 4))
    low, high = np.percentile(mean, (0.5, 99.5))
    assert np.abs(found.original - (mean - low) / (high - low) * 255).max() < 30
    assert np.corrcoef(found.original.ravel(), mean.ravel())[0, 1] > 0.99


@pytest.mark.parametrize(("most", "side"), [(30, 3), (700, 9)])
def test_cells_of_any_width_become_smaller_as_a_whole(tmp_path, monkeypatch, most, side):
    monkeypatch.setattr(module, "MOST_VOXELS", most)
    volume = np.zeros((1, 9, 9, 9), np.float32)  # constant, too
    visible = np.ones((1, 3, 3, 3), bool)
    save_preview(tmp_path, Preview(1, ("a",), volume, volume, visible, (3,) * 3, np.ones((1, 3))))
    found = load_preview(tmp_path)
    assert found.original.size <= most
    assert min(found.original.shape[1:]) == 3
    assert max(found.original.shape[1:]) == side
    assert np.array_equal(found.visible, visible)


def test_a_volume_of_cells_of_one_voxel_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_VOXELS", 10)
    volume, visible = np.zeros((1, 3, 3, 3), np.float32), np.ones((1, 3, 3, 3), bool)
    save_preview(tmp_path, Preview(1, ("a",), volume, volume, visible, (1,) * 3, np.ones((1, 3))))
    assert load_preview(tmp_path).original.shape == (1, 3, 3, 3)


def test_the_picture_shows_what_is_hidden(tmp_path, make_preview):
    save_preview(tmp_path, make_preview())
    pixels = imread(tmp_path / "preview.png")
    assert pixels.shape[0] > 300
    hidden = np.abs(pixels[..., :3] - np.array([0x30, 0x34, 0x3B]) / 255).max(-1) < 0.01
    assert 0.02 < hidden.mean() < 0.4


def test_a_bit_that_flips_anywhere_raises_nothing(tmp_path, make_preview):
    save_preview(tmp_path, make_preview(cases=("a",), shape=(8, 8, 8)))
    file = tmp_path / "preview.npz"
    whole = file.read_bytes()
    kept = 0
    for place in range(0, len(whole), 3):
        harmed = bytearray(whole)
        harmed[place] ^= 1 << place % 8
        file.write_bytes(harmed)
        found = load_preview(tmp_path)
        kept += found is not None
        assert found is None or found.original.shape == (1, 8, 8, 8)
    assert kept < 0.5 * len(whole) / 3  # most damage is seen


def test_nothing_that_is_not_finite_or_long_or_foreign_breaks_the_picture(
    tmp_path, make_preview, recwarn
):
    made = make_preview(cases=("$x^", "名前" * 200))
    made.original[1, :4] = np.nan
    made.reconstruction[:] = np.inf
    save_preview(tmp_path, made)
    assert load_preview(tmp_path).cases == made.cases
    assert not [w for w in recwarn if "Glyph" in str(w.message)]


def other(**changes):
    """A file whose arrays do not go together."""

    def harm(path):
        with np.load(path) as arrays:
            np.savez(path, **{**arrays, **changes})

    return harm


class Harm:
    """Says so when it is unpickled."""

    def __reduce__(self):
        return print, ("code from a file has run",)


def pickled(path):
    other(cases=np.array([Harm()] * 2, dtype=object))(path)


@pytest.mark.parametrize(
    "harm",
    [
        pytest.param(lambda p: p.unlink(), id="gone"),
        pytest.param(lambda p: p.write_bytes(b""), id="empty"),
        pytest.param(lambda p: p.write_bytes(p.read_bytes()[:-100]), id="cut"),
        pytest.param(lambda p: np.savez(p, step=1), id="less"),
        pytest.param(other(original=np.zeros(3)), id="other shapes"),
        pytest.param(pickled, id="pickle"),
        pytest.param(other(spacing=np.array([[1.0, np.nan, 1.0]] * 2)), id="spacing nan"),
        pytest.param(other(spacing=np.array([[1.0, 0.0, 1.0]] * 2)), id="spacing 0"),
        pytest.param(other(visible=np.ones((2, 5, 4, 2), bool)), id="grid"),
        pytest.param(other(visible=np.ones((2, 6, 4, 2), np.uint8)), id="mask type"),
        pytest.param(other(visible=np.ones((2, 0, 4, 2), bool)), id="no cells"),
        pytest.param(other(cases=np.array(["a"])), id="cases"),
    ],
)
def test_a_damaged_file_is_no_preview(tmp_path, make_preview, harm, capsys):
    save_preview(tmp_path, make_preview())
    harm(tmp_path / "preview.npz")
    assert load_preview(tmp_path) is None
    assert capsys.readouterr().out == ""
