"""Host memory that a GPU reads and writes by address: pinned, and no more of it than was asked for.

torch's own pinned memory comes in powers of two and is kept for reuse, so that pages of 20 GB would take 32 GiB until
the process ends. Here the memory is the system's own, in large pages where it has them, touched by all threads, which
is faster than by the driver's one, then registered with CUDA, and given back as soon as no tensor lies in it.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import suppress

import torch
from torch import Tensor

PORTABLE = 1  # to all devices


class PinnedMemory(mmap.mmap):
    """Anonymous memory; after `register`, CUDA's to address until nothing refers to it any more."""

    address = 0

    def __new__(cls, size: int) -> PinnedMemory:
        memory = super().__new__(cls, -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def register(self, address: int) -> None:
        """Raises RuntimeError where so much cannot be pinned."""
        code = int(torch.cuda.cudart().cudaHostRegister(address, len(self), PORTABLE))
        if code:
            raise RuntimeError(
                f"offload: {len(self) / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {code})"
            )
        self.address = address

    def __del__(self):
        if self.address and not sys.is_finalizing():  # else the process gives it back
            torch.cuda.synchronize()  # copies may be on their way
            torch.cuda.cudart().cudaHostUnregister(self.address)


def pinned_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros in pinned memory; of at least one number."""
    memory = PinnedMemory(math.prod(shape) * dtype.itemsize)
    numbers = torch.frombuffer(memory, dtype=dtype).view(shape).zero_()
    memory.register(numbers.data_ptr())
    return numbers
