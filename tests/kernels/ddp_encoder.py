"""One rank of a data-parallel sparse encoder; run by `test_integration.py` through torchrun."""

import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before kernels are imported

import torch
from torch import nn

from sparsemae.kernels import BlockMask, BlockTensor, set_backend
from sparsemae.models.resenc import ResEncUNet


def gradients(encoder, module, rank: int) -> list[torch.Tensor]:
    """Of all parameters for this rank's sample and mask, through `module`."""
    generator = torch.Generator().manual_seed(rank)
    volume = torch.randn(1, 1, 8, 8, 8, generator=generator)
    mask = BlockMask.random(1, (2, 2, 2), 0.5, generator=generator)
    encoder.zero_grad()
    skips = module(BlockTensor.pack(volume, mask))
    sum((i + 1) * s.features.square().sum() for i, s in enumerate(skips)).backward()
    return [p.grad.clone() for p in encoder.parameters()]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    net = ResEncUNet(1, 1, features_per_stage=(4, 4), n_blocks_per_stage=(1, 1), strides=(1, 2))
    encoder = set_backend(net.encoder, "triton")
    alone = gradients(encoder, encoder, rank)
    parallel = nn.parallel.DistributedDataParallel(encoder)
    together = gradients(encoder, parallel, rank)
    torch.save({"alone": alone, "together": together}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
