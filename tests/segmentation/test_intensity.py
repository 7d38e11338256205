"""Changes of intensity: each does what it says to the channels it was drawn for, nothing else."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage

from sparsemae.segmentation.intensity import IntensityDraw, change, draw_intensity

NOTHING = IntensityDraw(None, (None, None), None, None, (None, None), None, None, (False, False))


@pytest.fixture
def patch():
    rng = np.random.default_rng(0)
    array = ndimage.gaussian_filter(rng.normal(size=(2, 12, 14, 10)), (0, 1, 1, 1)) * 3 + 1
    return torch.from_numpy(array.astype(np.float32))


def changed(patch, slices=None, **drawn):
    out = patch.clone()
    change(out, replace(NOTHING, **drawn), slices)
    return out


def test_nothing_drawn_changes_nothing(patch):
    assert torch.equal(changed(patch), patch)


def test_noise_has_the_drawn_spread_and_follows_its_seed(patch):
    one, other = changed(patch, noise=(0.1, 7)), changed(patch, noise=(0.1, 8))
    assert (one - patch).std() == pytest.approx(0.1, rel=0.1)
    assert abs((one - patch).mean()) < 0.01
    assert torch.equal(one, changed(patch, noise=(0.1, 7)))
    assert not torch.equal(one, other)


def test_blur_is_a_gaussian_of_its_channel_alone(patch):
    out = changed(patch, blur=((0.9, 0.5, 0.7), None))
    expected = ndimage.gaussian_filter(patch[0].double().numpy(), (0.9, 0.5, 0.7), mode="nearest")
    inner = (slice(5, -5), slice(5, -5), slice(4, -4))
    np.testing.assert_allclose(out[0][inner], expected[inner], atol=2e-3)
    assert torch.equal(out[1], patch[1])


def test_brightness_multiplies(patch):
    out = changed(patch, brightness=(1.2, 0.8))
    torch.testing.assert_close(out, patch * torch.tensor([1.2, 0.8])[:, None, None, None])


def test_contrast_keeps_mean_and_range(patch):
    out = changed(patch, contrast=(1.25, 0.75))
    assert out[0].max() == patch[0].max()
    assert out[0].std() > patch[0].std()
    assert out[1].mean() == pytest.approx(float(patch[1].mean()), abs=1e-4)
    assert out[1].std() == pytest.approx(0.75 * float(patch[1].std()), rel=1e-3)


def test_coarse_keeps_slices_apart(patch):
    out = changed(patch, slices=1, coarse=(0.5, None))
    assert out.shape == patch.shape
    assert torch.equal(out[1], patch[1])
    rough = changed(patch, coarse=(0.5, None))
    assert not torch.equal(out[0], rough[0])
    # a volume that differs between slices only is changed along no other axis
    steps = torch.arange(14.0).expand(2, 12, 10, 14).movedim(-1, 2).contiguous()
    torch.testing.assert_close(changed(steps, slices=1, coarse=(0.6, 0.6)), steps)


def test_gamma_keeps_mean_and_spread_and_order(patch):
    for kind, exponent in (("gamma", 1.4), ("inverted_gamma", 0.7)):
        out = changed(patch, **{kind: (exponent, 1.0)})
        for a, b in zip(out, patch, strict=True):
            assert a.mean() == pytest.approx(float(b.mean()), abs=1e-4)
            assert a.std() == pytest.approx(float(b.std()), rel=1e-4)
        assert torch.equal(out[0].flatten().argsort(), patch[0].flatten().argsort())
        torch.testing.assert_close(out[1], patch[1], atol=1e-4, rtol=0)
    straight, inverted = (
        changed(patch, **{kind: (1.4, 1.0)}) for kind in ("gamma", "inverted_gamma")
    )
    assert not torch.allclose(straight[0], inverted[0], atol=1e-2)


def test_outside_a_mask_stays_zero(patch):
    patch[0, :4] = 0
    patch[1, :4] = 0
    out = changed(patch, noise=(0.1, 1), gamma=(1.3, 1.3), masked=(True, False))
    assert (out[0, :4] == 0).all()
    assert (out[1, :4] != 0).any()


def test_draws_have_nnunets_probabilities():
    draws = [draw_intensity(np.random.default_rng(i), (False, False)) for i in range(3000)]

    def share(hit):
        return np.mean([hit(d) for d in draws])

    assert share(lambda d: d.noise is not None) == pytest.approx(0.1, abs=0.02)
    assert share(lambda d: d.blur[0] is not None) == pytest.approx(0.1, abs=0.02)
    assert share(lambda d: d.brightness is not None) == pytest.approx(0.15, abs=0.02)
    assert share(lambda d: d.contrast is not None) == pytest.approx(0.15, abs=0.02)
    assert share(lambda d: d.coarse[1] is not None) == pytest.approx(0.125, abs=0.02)
    assert share(lambda d: d.inverted_gamma is not None) == pytest.approx(0.1, abs=0.02)
    assert share(lambda d: d.gamma is not None) == pytest.approx(0.3, abs=0.03)
    gammas = np.array([d.gamma for d in draws if d.gamma])
    assert gammas.min() > 0.7
    assert gammas.max() < 1.5
    assert (gammas < 1).mean() == pytest.approx(0.5, abs=0.05)
    assert max(d.noise[0] for d in draws if d.noise) < 0.1
