"""Normalisation: plain for ordinary images, unmoved by absurd voxels, and it fits float16."""

import numpy as np
import pytest

from sparsemae.data.options import PreprocessConfig
from sparsemae.data.preparing.normalize import LARGEST, Flat, measure

ZSCORE = PreprocessConfig()
PERCENTILE = PreprocessConfig(normalization="percentile")
CT = PreprocessConfig(normalization="ct", window=(-200, 300))


def voxels(count=200_000, seed=0, mean=900, std=40):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(count) * std + mean).astype(np.float32)


def test_zscore_is_the_plain_one():
    values = np.abs(voxels()) ** 1.5
    scale = measure(values, 0.0, ZSCORE)
    exact = values.astype(np.float64)
    assert scale.mean == np.float32(exact.mean())
    assert scale.std == np.float32(exact.std())
    assert scale.clipped == 0
    assert scale.low <= values.min()
    assert scale.high == values.max()


def test_ordinary_bright_spots_are_no_outliers():
    values = voxels(mean=100, std=30)
    values[:100] = 1500  # vessels ten times as bright as tissue
    scale = measure(values, 0.0, ZSCORE)
    assert scale.clipped == 0
    assert scale.std == np.float32(values.std(dtype=np.float64))


@pytest.mark.parametrize("value", [3e38, -3e38, 1e6])
def test_absurd_voxels_change_nothing_else(value):
    values = voxels()
    plain = measure(values, 0.0, ZSCORE)
    with np.errstate(all="raise"):
        scale = measure(np.append(values, np.float32([value] * 5)), 0.0, ZSCORE)
    assert scale.clipped == 5
    assert (scale.mean, scale.std, scale.low, scale.high) == (
        *(plain.mean, plain.std, plain.low, plain.high),
    )


def test_large_and_small_units():
    """Nothing is squared in float32."""
    values = voxels()
    for unit in (1e30, 3e35, 1e-30):
        with np.errstate(over="raise", invalid="raise"):
            scale = measure(values * np.float32(unit), 0.0, ZSCORE)
        plain = measure(values, 0.0, ZSCORE)
        assert scale.mean == pytest.approx(plain.mean * unit, rel=1e-6)
        assert scale.std == pytest.approx(plain.std * unit, rel=1e-5)


def test_percentile_clips_then_normalises():
    values = voxels()
    values[:50] = 3e38
    scale = measure(values, 0.0, PERCENTILE)
    low, high = np.percentile(values, (0.5, 99.5))
    assert (scale.low, scale.high) == pytest.approx((low, high), abs=0.1)
    clipped = values.clip(scale.low, scale.high).astype(np.float64)
    assert scale.mean == np.float32(clipped.mean())
    assert scale.std == pytest.approx(clipped.std(), rel=1e-7)
    assert scale.background == 0.0


@pytest.mark.parametrize(("background", "clipped"), [(-1000, -200), (0, 0), (-80, -80)])
def test_ct_maps_the_window_to_plus_minus_one(background, clipped):
    scale = measure(voxels(mean=0, std=400), float(background), CT)
    assert (scale.low, scale.high, scale.background) == (-200, 300, clipped)
    ends = [(v - scale.mean) / scale.std for v in (-200, 50, 300)]
    assert ends == [-1, 0, 1]


@pytest.mark.parametrize(
    ("values", "background", "config", "message"),
    [
        (np.ones(50, np.float32), 0.0, ZSCORE, "one value"),
        (np.ones(0, np.float32), 0.0, ZSCORE, "one value"),
        (voxels(500, mean=0), 0.0, PreprocessConfig(normalization="ct", window=(500, 600)), "HU"),
        (voxels(500, mean=1000, std=1e-3), 0.0, ZSCORE, "nothing beside"),
        (np.float32([1e-42, 2e-42] * 9), 0.0, ZSCORE, "nearly one value"),
        (np.float32([5] * 999 + [6]), 0.0, PERCENTILE, "nearly one value"),
    ],
)
def test_no_contrast(values, background, config, message):
    with pytest.raises(Flat, match=message):
        measure(values, background, config)


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("config", [ZSCORE, PERCENTILE, CT])
def test_stored_values_fit_float16(config, seed):
    """Whatever the distribution: a volume is refused, or all its values can be stored."""
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(3000) * 10.0 ** rng.uniform(-3, 3) + 10.0 ** rng.uniform(-2, 4)
    spikes = rng.integers(0, 3000, rng.integers(0, 40))
    values[spikes] *= 10.0 ** rng.uniform(0, 30, len(spikes))
    values = values.astype(np.float32)
    background = float(np.float32(rng.choice([0.0, -1024.0, values.min() - 1e5])))
    try:
        scale = measure(values, background, config)
    except Flat:
        return
    ends = values.clip(scale.low, scale.high).astype(np.float64)
    ends = np.append(ends, scale.background)
    assert np.abs((ends - scale.mean) / scale.std).max() <= LARGEST * 1.001
