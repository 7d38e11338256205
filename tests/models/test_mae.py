"""SparseMAE: nothing leaks from masked voxels, and both backends compute the model's definition."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsemae.kernels import BlockMask, BlockTensor, DenseMasked, set_backend
from sparsemae.models.mae import SparseMAE, masked_mse, on_cells
from sparsemae.models.masking import Masks
from sparsemae.models.resenc import ResEncUNet

pytestmark = pytest.mark.usefixtures("one_thread")

PATCH = (16, 16, 8)
CUBIC = {
    "features_per_stage": (4, 6, 8),
    "strides": (1, 2, 2),
    "n_blocks_per_stage": (1, 1, 2),
}
FLAT = CUBIC | {  # thick slices: no stride and no kernel across them at first
    "strides": (1, (2, 2, 1), 2),
    "kernel_sizes": ((3, 3, 1), 3, 3),
}
# plan, cell, levels a restricted decode may restrict (0: "all" only)
GRIDS = {
    "cell = total stride": (CUBIC, (4, 4, 4), 2),
    "two voxels a cell at the bottleneck": (CUBIC, (8, 8, 4), 2),
    "dense bottleneck": (CUBIC, (2, 2, 2), 1),
    "dense but for the finest stage": (CUBIC, (1, 1, 1), 0),
    "anisotropic": (FLAT, (4, 4, 2), 2),
    "coarser on one axis only": (FLAT, (2, 4, 2), 1),
}
CASES = [
    pytest.param(grid, decode, id=f"{grid}, {decode}")
    for grid, (*_, levels) in GRIDS.items()
    for decode in ("all", "masked", 0.33)
    if levels or decode == "all"
]
BACKENDS = ("torch", "reference")


def make(plan=CUBIC, cell=(4, 4, 4), *, channels=1, dtype=torch.float32, **options):
    """A model in which every parameter matters: none is zero, and no norm has weight zero."""
    torch.manual_seed(1)
    mae = SparseMAE(ResEncUNet(channels, channels, **plan), cell, **options)
    for module in mae.modules():
        if isinstance(module, nn.InstanceNorm3d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
        if getattr(module, "bias", None) is not None:
            nn.init.normal_(module.bias, std=0.2)
    for token in mae.mask_tokens.values():
        nn.init.normal_(token)
    return mae.to(dtype)


def make_case(grid, decode, **options):
    plan, cell, levels = GRIDS[grid]
    return make(plan, cell, decode=decode, decode_levels=levels or 1, **options)


def draw(mae, batch=2, ratio=0.6):
    return mae.draw_masks(batch, PATCH, ratio, generator=torch.Generator().manual_seed(2))


def dense(y):
    return y if isinstance(y, torch.Tensor) else y.unpack()


def gradients(mae, x, masks, upstream):
    """Output on scored cells and gradients of all parameters, by name; None where unused."""
    mae.zero_grad()
    y = on_cells(mae(x, masks), masks.scored).features
    (y * upstream.to(y.dtype)).sum().backward()
    return y.detach(), {name: p.grad for name, p in mae.named_parameters()}


def assert_close(ours, theirs, tolerance):
    """Norm of the difference, relative to the tensor's or, for tensors that are zero in theory
    (biases before a norm), a hundredth of the whole gradient's."""
    assert ours.keys() == theirs.keys()
    used = [n for n in ours if ours[n] is not None]
    assert used == [n for n in theirs if theirs[n] is not None]
    whole = torch.stack([theirs[n].norm() for n in used]).norm()
    for name in used:
        gap = (ours[name] - theirs[name]).norm() / max(theirs[name].norm(), 0.01 * whole)
        assert gap < tolerance, (name, gap.item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("grid", "decode"), CASES)
def test_no_leak_bit_for_bit(grid, decode, backend):
    mae = make_case(grid, decode, backend=backend)
    masks, x = draw(mae), torch.randn(2, 1, *PATCH)
    hidden = ~masks.visible.voxels(mae.block_size)
    kept = x.clone()

    def encode_and_decode(x):
        skips = mae.network.encoder(mae.masked_input(x, masks.visible))
        return [*(dense(s) for s in skips), dense(mae(x, masks))]

    with torch.no_grad():
        expected = encode_and_decode(x)
        assert all(t.isfinite().all() for t in expected)
        for junk in (torch.randn_like(x), 1e30, float("nan"), float("inf")):
            content = torch.where(hidden, junk, x)
            for a, b in zip(encode_and_decode(content), expected, strict=True):
                assert torch.equal(a, b), junk
        assert torch.equal(x, kept)  # the caller's volume is not touched


def test_every_visible_voxel_matters():
    mae = make(dtype=torch.float64)
    masks, x = draw(mae), torch.randn(2, 1, *PATCH, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(mae(x, masks).square().sum(), x)
    visible = masks.visible.voxels(mae.block_size)
    assert (grad[visible] != 0).all()
    assert (grad[~visible] == 0).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize(("grid", "decode"), CASES)
def test_backends_agree_on_output_and_all_gradients(grid, decode, dtype, tolerance):
    found = []
    for backend in BACKENDS:
        mae = make_case(grid, decode, backend=backend, dtype=dtype, channels=2)
        masks = draw(mae)
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(2, 2, *PATCH, generator=generator, dtype=torch.float64).to(dtype)
        shape = (len(masks.scored), *mae.block_size, 2)
        upstream = torch.randn(shape, generator=generator)
        found.append(gradients(mae, x, masks, upstream))
    (ours, our_grads), (theirs, their_grads) = found
    assert (ours - theirs).norm() < tolerance * theirs.norm()
    assert_close(our_grads, their_grads, tolerance)
    unused = {name for name, grad in our_grads.items() if grad is None}
    # without deep supervision only the finest output layer is used
    assert unused == {"network.decoder.seg_layers.0.weight", "network.decoder.seg_layers.0.bias"}
    assert all(our_grads[n].norm() > 0 for n in our_grads if "token" in n or "densify" in n)


@pytest.mark.parametrize("densify", [True, False])
@pytest.mark.parametrize(("grid", "decode"), CASES)
def test_equals_the_dense_formula_token_gradients_included(grid, decode, densify):
    """The definition, spelled out with plain tensors; each token filled in by a where()."""
    mae = make_case(grid, decode, densify=densify, dtype=torch.float64)
    masks, x = draw(mae), torch.randn(2, 1, *PATCH, dtype=torch.float64)
    twin = set_backend(copy.deepcopy(mae), "reference")

    tokens = set()

    def formula():
        visible = masks.visible.voxels(mae.block_size)
        skips = twin.network.encoder(DenseMasked(torch.where(visible, x, 0), masks.visible))
        finest = 0 if decode == "all" else mae.decode_levels
        out = []
        for level, skip in enumerate(skips):
            if isinstance(skip, DenseMasked):
                tokens.add(str(level))
                token = twin.mask_tokens[str(level)].view(1, -1, 1, 1, 1)
                skip = torch.where(masks.visible.voxels(skip.block), skip.dense, token)
            if densify and level > 0:
                conv = twin.densify[str(level)]
                skip = F.conv3d(skip, conv.weight, conv.bias, padding="same")
            out.append(DenseMasked.pack(skip, masks.scored) if level < finest else skip)
        y = twin.network.decoder(out)
        return y if decode == "all" else y.dense

    ours, theirs = dense(mae(x, masks)), formula()
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(theirs)
    torch.autograd.backward([ours, theirs], [upstream, upstream])
    grads = [{n: p.grad for n, p in m.named_parameters()} for m in (mae, twin)]
    assert_close(*grads, 1e-9)
    assert set(mae.mask_tokens) == tokens
    assert set(mae.densify) == ({"1", "2"} if densify else set())


@pytest.mark.parametrize("grid", [g for g, (*_, levels) in GRIDS.items() if levels])
@pytest.mark.parametrize("backend", BACKENDS)
def test_restricted_decode_of_all_cells_is_the_dense_decode(grid, backend):
    """With every cell scored no halo is zero and norms see every voxel, so the two are equal.

    They are not for a part of the cells, by design: beyond it lie zeros, and the norms of the
    restricted levels count its voxels only. Nothing is visible here, because scored cells must not
    be: the finest skip is taken to be all token there.
    """
    both = [
        make_case(grid, decode, backend=backend, dtype=torch.float64)
        for decode in ("all", "masked")
    ]
    cells = tuple(p // c for p, c in zip(PATCH, both[0].block_size, strict=True))
    everything = BlockMask.from_visible(torch.ones(2, *cells, dtype=torch.bool))
    masks = Masks(everything.hidden(), everything)
    x = torch.full((2, 1, *PATCH), float("nan"), dtype=torch.float64)
    upstream = torch.randn(len(everything), *both[0].block_size, 1)
    (y_all, all_), (y_masked, masked) = (gradients(m, x, masks, upstream) for m in both)
    torch.testing.assert_close(y_masked, y_all, rtol=1e-9, atol=1e-9)
    assert_close(masked, all_, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decode", ["all", "masked"])
def test_sparse_false_is_the_plain_network_on_masked_input(decode, backend):
    mae = make(sparse=False, decode=decode, backend=backend)
    assert len(mae.mask_tokens) == len(mae.densify) == 0
    masks, x = draw(mae), torch.randn(2, 1, *PATCH)
    plain = mae.network(x * masks.visible.voxels(mae.block_size))
    reconstruction = mae(x, masks)
    if decode == "all":
        assert torch.equal(reconstruction, plain)
    else:  # the encoder is the same; the finest decoder levels see the scored cells only
        assert reconstruction.mask is masks.scored
        assert reconstruction.shape == plain.shape
    junk = torch.where(masks.visible.voxels(mae.block_size), x, float("nan"))
    assert torch.equal(dense(mae(junk, masks)), dense(reconstruction))


@pytest.mark.parametrize("options", [{}, {"backend": "reference"}, {"sparse": False}], ids=str)
@pytest.mark.parametrize("decode", ["all", "masked", 0.33])
def test_bf16_autocast_is_finite_and_near_fp32(decode, options):
    mae = make(decode=decode, **options)
    masks, x = draw(mae), torch.randn(2, 1, *PATCH)

    def loss_and_gradient(enabled):
        mae.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss = masked_mse(mae(x, masks), x, masks.scored)
        loss.backward()
        grads = [p.grad for p in mae.parameters() if p.grad is not None]
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        return loss, torch.cat([g.flatten() for g in grads])

    (exact, exact_grad), (loss, grad) = loss_and_gradient(False), loss_and_gradient(True)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=0.05)
    assert F.cosine_similarity(grad, exact_grad, dim=0) > 0.9


@pytest.mark.parametrize(("grid", "decode"), CASES)
def test_reconstruct_replaces_scored_voxels_and_no_others(grid, decode):
    mae = make_case(grid, decode)
    masks, x = draw(mae), torch.randn(2, 1, *PATCH)
    x = torch.where(masks.visible.voxels(mae.block_size), x, float("nan"))
    out = mae.reconstruct(x, masks)
    scored = masks.scored.voxels(mae.block_size)
    assert torch.equal(out[~scored].view(torch.int32), x[~scored].view(torch.int32))  # NaN too
    assert torch.equal(out[scored], dense(mae(x, masks))[scored])
    assert out[scored].isfinite().all()
    assert not out.requires_grad


def test_masked_mse_is_the_mean_over_scored_voxels_that_are_not_excluded():
    scored = BlockMask.random(2, (2, 2, 1), 0.5)
    prediction = torch.randn(2, 3, *PATCH, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 3, *PATCH, dtype=torch.float64)
    excluded = torch.rand(2, 1, *PATCH) < 0.3
    for left_out in (None, excluded):
        counted = scored.voxels((8, 8, 8)).expand(2, 3, *PATCH)
        if left_out is not None:
            counted = counted & ~left_out
            target = target.masked_fill(left_out, float("nan"))  # defaced: anything may be there
        expected = ((prediction - target)[counted] ** 2).mean()
        (grad,) = torch.autograd.grad(expected, prediction)
        for form in (prediction, BlockTensor.pack(prediction, scored)):
            loss = masked_mse(form, target, scored, left_out)
            assert loss.dtype == torch.float64
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, prediction)[0], grad)


def test_masked_mse_is_zero_with_zero_gradients_where_all_is_excluded():
    mae = make(decode="masked")
    masks, x = draw(mae), torch.randn(2, 1, *PATCH)
    loss = masked_mse(mae(x, masks), x, masks.scored, torch.ones(2, 1, *PATCH, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in mae.parameters() if p.grad is not None)
