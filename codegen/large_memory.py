"""Memory for tensors as large as weights on the host: in huge pages where Linux gives them."""

from __future__ import annotations

import ctypes
import sys

import torch

_MADV_HUGEPAGE = 14  # asm-generic/mman-common.h
_HUGE_PAGE_BYTES = 2 << 20


def empty_like_weights(weights: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor like `weights`, not initialised.

    The first write to a page of 4 KiB is a fault, and a gradient of weights is written once: with few tokens the
    faults take longer than the writes. PyTorch asks for huge pages only with THP_MEM_ALLOC_ENABLE=1.
    """
    tensor = weights.new_empty(weights.shape)
    if tensor.device.type == "cpu" and sys.platform == "linux":
        begin = -(-tensor.data_ptr() // _HUGE_PAGE_BYTES) * _HUGE_PAGE_BYTES
        end = (tensor.data_ptr() + tensor.nbytes) // _HUGE_PAGE_BYTES * _HUGE_PAGE_BYTES
        if end > begin:
            # Advice: where it is not taken the tensor is as good.
            ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), _MADV_HUGEPAGE)
    return tensor
