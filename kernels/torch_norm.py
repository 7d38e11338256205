"""Instance normalisation over visible voxels, from the library's batch normalisation.

The packed rows of one sample are contiguous, so a sample is one channels-last "image" of its
visible voxels, and batch normalisation of a batch of one is instance normalisation.
"""

import torch
from torch import Tensor

from sparsemae.kernels.rows import own
from sparsemae.kernels.tensor import BlockTensor


def instance_norm(
    x: BlockTensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> BlockTensor:
    return x.with_values(_InstanceNorm.apply(x.features, weight, bias, x.mask, eps))


class _InstanceNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, features, weight, bias, mask, eps):
        features = features.contiguous()
        out, means, inverse_stds = [], [], []
        for image in _samples(features, mask):
            y, mean, inverse_std = torch.native_batch_norm(
                image, weight, bias, None, None, True, 0.0, eps
            )
            out.append(_rows(y))
            means.append(mean)
            inverse_stds.append(inverse_std)
        ctx.mask, ctx.eps = mask, eps
        ctx.save_for_backward(features, weight, *means, *inverse_stds)
        return own(_join(out, features))

    @staticmethod
    def backward(ctx, grad):
        features, weight, *saved = ctx.saved_tensors
        means, inverse_stds = saved[: len(saved) // 2], saved[len(saved) // 2 :]
        wanted = tuple(ctx.needs_input_grad[:3])
        out, dw, db = [], None, None
        images = zip(
            *(_samples(grad.contiguous(), ctx.mask), _samples(features, ctx.mask)),
            *(means, inverse_stds),
            strict=True,
        )
        for dy, image, mean, inverse_std in images:
            dx, dw_sample, db_sample = torch.ops.aten.native_batch_norm_backward(
                dy, image, weight, None, None, mean, inverse_std, True, ctx.eps, wanted
            )
            out.append(_rows(dx) if wanted[0] else None)
            if wanted[1]:
                dw = dw_sample if dw is None else dw + dw_sample
            if wanted[2]:
                db = db_sample if db is None else db + db_sample
        dx = _join(out, features) if wanted[0] else None
        if not out:  # no visible voxel at all
            dw, db = (features.new_zeros(features.shape[4]) if w else None for w in wanted[1:])
        return dx, dw, db, None, None


def _samples(features: Tensor, mask):
    """The rows of each sample that has any, as a channels-last image [1, C, rows, 1]."""
    n, channels = features.shape[0], features.shape[4]
    rows = features.reshape(-1, channels)
    per_block = rows.shape[0] // n if n else 0
    for part in rows.split([count * per_block for count in mask.counts]):
        if len(part):
            yield part[None, :, None].permute(0, 3, 1, 2)


def _rows(image: Tensor) -> Tensor:
    return image.permute(0, 2, 3, 1).reshape(-1, image.shape[1])


def _join(parts: list[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return torch.zeros_like(like)
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.view_as(like)
