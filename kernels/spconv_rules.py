"""spconv's rulebooks, which voxel meets which under each tap, and the convolution they drive.

The only file that calls spconv. A rulebook depends on the mask, the block and the kernel, not on
features: it is built once and kept in `mask.tables`. On CPU spconv has one algorithm, gather, GEMM
and scatter (Native); on CUDA implicit GEMM is used, and Native beyond the 32 taps that it holds.
**The CUDA paths follow spconv's own modules but have never run: no GPU was at hand.**
spconv reads sizes back to the host: no CUDA graph, and torch.compile breaks its graph here.
"""

import math
import warnings
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sparsemae.kernels.mask import BlockMask

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # 2.3.6 decorates by torch.cuda.amp's old names
    from spconv.core import ConvAlgo
    from spconv.cppconstants import CPU_ONLY_BUILD
    from spconv.pytorch import functional, ops
    from spconv.tools import CUDAKernelTimer

Triple = tuple[int, int, int]
MOST_TAPS = 32  # bits in implicit GEMM's tap mask
FP32_ACCUM = True  # as all backends here; spconv's own choice is fp16 up to 128 channels of 3^3


@dataclass(frozen=True)
class Rulebook:
    """What spconv needs to know of a mask for one kernel."""

    algo: ConvAlgo
    submanifold: bool
    pairs: tuple  # tables in the order spconv's functions take them
    masks: tuple  # of implicit GEMM: the taps of each pass
    active: int  # voxels that spconv computes
    rows: Int[Tensor, "R"] | None  # where each packed voxel lies among them; None: in this order


def rulebook(
    mask: BlockMask, block: Triple, kernel: Triple, stride: Triple, transposed: bool = False
) -> Rulebook:
    """For a convolution of `block` voxels per cell, padded by kernel // 2; unpadded if transposed.

    Raises:
        ValueError: The mask is on CUDA, spconv was built without it.
    """
    key = "spconv", block, kernel, stride, transposed
    if key not in mask.tables:
        mask.tables[key] = _build(mask, block, kernel, stride, transposed)
    return mask.tables[key]


def convolve(
    rows: Float[Tensor, "R Ci"], filters: Float[Tensor, "Co kd kh kw Ci"], book: Rulebook
) -> Float[Tensor, "Ro Co"]:
    """Packed rows, one at least, to packed rows; both arguments contiguous and given gradients."""
    if book.algo is ConvAlgo.Native:
        run = functional.indice_subm_conv if book.submanifold else functional.indice_conv
        out = run(rows, filters, *book.pairs, book.active, book.algo)
    else:
        how = list(book.masks), True, book.submanifold, CUDAKernelTimer(False), FP32_ACCUM
        out = functional.implicit_gemm(rows, filters, *book.pairs, book.active, *how)
    return out if book.rows is None else out.index_select(0, book.rows)


def voxels(mask: BlockMask, block: Triple) -> Int[Tensor, "R 4"]:
    """(sample, d, h, w) of every visible voxel, in packed order."""
    key = "spconv voxels", block
    if key not in mask.tables:
        inside = torch.cartesian_prod(*[torch.arange(b, dtype=torch.int32) for b in block])
        inside = F.pad(inside, (1, 0)).to(mask.coords.device)  # [bd*bh*bw, 4]
        corners = mask.coords * mask.coords.new_tensor([1, *block])
        # spconv reads bare memory: columns laid out one by one would pass for other voxels
        mask.tables[key] = (corners[:, None] + inside).flatten(0, 1).contiguous()
    return mask.tables[key]


def _build(mask: BlockMask, block: Triple, kernel: Triple, stride: Triple, transposed) -> Rulebook:
    algo, masks = _algorithm(mask.coords.device, kernel), ()
    submanifold = stride == (1, 1, 1) and not transposed
    size = [g * b for g, b in zip(mask.grid, block, strict=True)]
    padding = [0 if transposed else k // 2 for k in kernel]
    volume = voxels(mask, block), mask.batch_size, size, algo
    geometry = list(kernel), list(stride), padding, [1, 1, 1], [0, 0, 0], submanifold, transposed
    if algo is ConvAlgo.Native:
        active, *pairs = ops.get_indice_pairs(*volume, *geometry)
    else:
        active, _, *pairs, masks = ops.get_indice_pairs_implicit_gemm(*volume, *geometry)
    rows = None
    if not submanifold:
        made = [b * s if transposed else b // s for b, s in zip(block, stride, strict=True)]
        rows = _positions(active, mask, tuple(made))
    return Rulebook(algo, submanifold, tuple(pairs), tuple(masks), len(active), rows)


def _algorithm(device: torch.device, kernel: Triple) -> ConvAlgo:
    if device.type != "cuda":
        return ConvAlgo.Native
    if CPU_ONLY_BUILD:
        raise ValueError("this spconv has no CUDA: pip install spconv-cu120 (Python 3.12: -cu126)")
    return ConvAlgo.MaskImplicitGemm if math.prod(kernel) <= MOST_TAPS else ConvAlgo.Native


def _positions(active: Int[Tensor, "M 4"], mask: BlockMask, block: Triple) -> Int[Tensor, "R"]:
    """Where each packed voxel lies among spconv's, which may reach beyond the visible blocks."""
    wanted = voxels(mask, block)
    size = [g * b for g, b in zip(mask.grid, block, strict=True)]
    table = torch.full((mask.batch_size, *size), -1, device=wanted.device)
    table[active.long().unbind(1)] = torch.arange(len(active), device=wanted.device)
    rows = table[wanted.long().unbind(1)]
    assert (rows >= 0).all()
    return rows
