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


def test_cells_that_cannot_be_halved_keep_the_volume(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_VOXELS", 10)
    volume = np.zeros((1, 9, 9, 9), np.float32)
    made = Preview(
        1, ("a",), volume, volume, np.ones((1, 3, 3, 3), bool), (3,) * 3, np.ones((1, 3))
    )
    save_preview(tmp_path, made)  # constant, too
    assert load_preview(tmp_path).original.shape == (1, 9, 9, 9)


def test_the_picture_shows_what_is_hidden(tmp_path, make_preview):
    save_preview(tmp_path, make_preview())
    pixels = imread(tmp_path / "preview.png")
    assert pixels.shape[0] > 300
    hidden = np.abs(pixels[..., :3] - np.array([0x30, 0x34, 0x3B]) / 255).max(-1) < 0.01
    assert 0.02 < hidden.mean() < 0.4


def pickled(path):
    np.savez(path, step=1, cases=np.array([print], dtype=object))


@pytest.mark.parametrize(
    "harm",
    [
        lambda p: p.unlink(),
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(p.read_bytes()[:-100]),
        lambda p: p.write_bytes(p.read_bytes()[:300] + b"\xff" * 40 + p.read_bytes()[340:]),
        lambda p: np.savez(p, step=1),
        lambda p: np.savez(p, step=1, cases=np.array(["a"]), original=np.zeros(3)),
        pickled,
    ],
    ids=["gone", "empty", "cut", "damaged", "less", "other shapes", "pickle"],
)
def test_a_damaged_file_is_no_preview(tmp_path, make_preview, harm):
    save_preview(tmp_path, make_preview())
    harm(tmp_path / "preview.npz")
    assert load_preview(tmp_path) is None
