"""BlockTensor and DenseMasked stand for the same dense batch: packing, filling, checks."""

import pytest
import torch

from sparsemae.kernels import BlockMask, BlockTensor, DenseMasked

GRID, CHANNELS = (2, 3, 2), 4
BLOCKS = [(1, 1, 1), (2, 2, 2), (1, 2, 3), (4, 1, 2)]
KINDS = [BlockTensor, DenseMasked]


def uneven() -> BlockMask:
    visible = torch.rand(3, *GRID) < 0.5
    visible[0, 0], visible[2] = True, False
    return BlockMask.from_visible(visible)


def counted(block, dtype=torch.float64) -> torch.Tensor:
    """Every voxel of every channel another number, none of them zero."""
    shape = 3, CHANNELS, *(g * b for g, b in zip(GRID, block, strict=True))
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).view(shape)


@pytest.mark.parametrize("block", BLOCKS)
def test_pack_keeps_each_block_where_the_mask_says(block):
    mask, dense, (bd, bh, bw) = uneven(), counted(block), block
    x = BlockTensor.pack(dense, mask)
    assert (x.block, x.channels, x.shape) == (block, CHANNELS, dense.shape)
    assert x.features.is_contiguous()
    for n, (b, d, h, w) in enumerate(mask.coords.tolist()):
        d, h, w = d * bd, h * bh, w * bw
        expected = dense[b, :, d : d + bd, h : h + bh, w : w + bw].permute(1, 2, 3, 0)
        assert torch.equal(x.features[n], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_unpack_gives_the_visible_voxels_back(kind, block):
    mask, dense = uneven(), counted(block)
    x = kind.pack(dense, mask)
    voxels = mask.voxels(block)
    assert torch.equal(x.unpack(), dense * voxels)
    assert torch.equal(x.unpack(-1.5), torch.where(voxels, dense, -1.5))
    assert (x.block, x.channels, x.shape, x.dtype) == (block, 4, dense.shape, dense.dtype)
    assert x.device == dense.device


@pytest.mark.parametrize("mask_ratio", [0.0, 1.0])
@pytest.mark.parametrize("kind", KINDS)
def test_everything_and_nothing(kind, mask_ratio):
    dense = counted((2, 2, 2))
    x = kind.pack(dense, BlockMask.random(3, GRID, mask_ratio))
    assert torch.equal(x.unpack(), dense * (1 - mask_ratio))
    assert torch.equal(x.unpack(2.0), dense if mask_ratio == 0 else torch.full_like(dense, 2.0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", BLOCKS)
def test_gradients_of_pack_unpack_and_token(kind, block):
    """Against plain autograd of `x * m + token * (1 - m)`."""
    mask = uneven()
    dense, token = torch.randn(counted(block).shape).double(), torch.randn(CHANNELS).double()
    upstream = torch.randn_like(dense)
    visible = mask.voxels(block).double()

    def plain(x, t):
        return x * visible + t.view(-1, 1, 1, 1) * (1 - visible)

    results = []
    for fn in (plain, lambda x, t: kind.pack(x, mask).unpack(t)):
        leaves = [t.clone().requires_grad_() for t in (dense, token)]
        y = fn(*leaves)
        y.backward(upstream)
        results.append([y.detach(), *(t.grad for t in leaves)])
    for expected, value in zip(*results, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)


def test_a_token_of_another_dtype_takes_that_of_the_features():
    token = torch.randn(CHANNELS, requires_grad=True)
    dense = BlockTensor.pack(counted((2, 2, 2), torch.bfloat16), uneven()).unpack(token)
    assert dense.dtype == torch.bfloat16
    dense.float().sum().backward()
    assert token.grad.dtype == torch.float32


def test_masked_voxels_are_never_read():
    mask, dense = uneven(), counted((2, 2, 2))
    spoilt = dense.masked_fill(~mask.voxels((2, 2, 2)), float("nan")).requires_grad_()
    x = BlockTensor.pack(spoilt, mask)
    assert torch.equal(x.unpack(), BlockTensor.pack(dense, mask).unpack())
    x.features.square().sum().backward()
    assert torch.equal(spoilt.grad, (2 * dense) * mask.voxels((2, 2, 2)))


def test_pack_takes_any_memory_layout():
    mask, dense = uneven(), counted((1, 2, 3))
    expected = BlockTensor.pack(dense, mask).features
    last = dense.to(memory_format=torch.channels_last_3d)
    strided = dense.repeat_interleave(2, 4)[..., ::2]
    for other in (last, strided):
        assert other.stride() != dense.stride()
        assert torch.equal(BlockTensor.pack(other, mask).features, expected)


def test_full_holds_one_value_per_channel():
    mask, value = uneven(), torch.randn(CHANNELS, requires_grad=True)
    x = BlockTensor.full(value, mask, (1, 2, 3))
    assert (x.block, x.channels) == ((1, 2, 3), CHANNELS)
    expected = value.view(-1, 1, 1, 1) * mask.voxels((1, 2, 3))
    assert torch.equal(x.unpack(), expected)
    x.unpack().sum().backward()
    assert value.grad.tolist() == [len(mask) * 6] * CHANNELS


@pytest.mark.parametrize("kind", KINDS)
def test_fill_detach_and_dtype(kind):
    mask, dense = uneven(), counted((2, 2, 2)).requires_grad_()
    x = kind.pack(dense, mask)
    expected = torch.full_like(dense, 3.0) * mask.voxels((2, 2, 2))
    assert torch.equal(x.fill(3.0).unpack(), expected)
    assert x.requires_grad
    assert not x.detach().requires_grad
    assert x.to(torch.float32).dtype == x.to(torch.float32).unpack().dtype == torch.float32
    with pytest.raises(ValueError, match=r"move the mask \(BlockMask.to\) and the dense batch"):
        x.to("meta")


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes(kind):
    mask, dense = uneven(), counted((2, 2, 2))
    with pytest.raises(ValueError, match=r"a mask of 3 samples takes \[B, C, D, H, W\]"):
        kind.pack(dense[:2], mask)
    with pytest.raises(ValueError, match=r"a mask of 3 samples takes \[B, C, D, H, W\]"):
        kind.pack(dense[:, 0], mask)
    with pytest.raises(ValueError, match="does not tile onto a grid of"):
        kind.pack(dense[..., 1:], mask)
    with pytest.raises(ValueError, match=r"fill has shape \(1,\), expected \(4,\)"):
        kind.pack(dense, mask).unpack(torch.ones(1))


def test_features_of_another_mask():
    mask = uneven()
    for shape in ((len(mask) + 1, 2, 2, 2, 4), (len(mask), 2, 2, 4)):
        with pytest.raises(ValueError, match=rf"with N = {len(mask)} visible blocks"):
            BlockTensor(torch.zeros(shape), mask)
