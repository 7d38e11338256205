"""The triton backend: our own kernels for NVIDIA (sm_80 and later) and AMD GPUs."""

from sparsemae.kernels.triton_conv import conv3d, conv_transpose3d

__all__ = ["conv3d", "conv_transpose3d"]
