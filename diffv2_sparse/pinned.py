"""Host memory that a GPU reads and writes by address: pinned, and no more of it than was asked for.

torch's own pinned memory comes in powers of two and is kept for reuse, so that pages of 20 GB would take 32 GiB until
the process ends. Here the memory is the system's own, in large pages where it has them, touched by all threads, which
is faster than by the driver's one, then registered with CUDA, and given back as soon as no tensor lies in it.
"""

from __future__ import annotations

import math
import mmap
import sys
from contextlib import nullcontext, suppress

import torch
from torch import Tensor

PORTABLE = 1  # to all devices


class PinnedMemory(mmap.mmap):
    """Anonymous memory; after `register`, a CUDA device's to address until nothing refers to it any more."""

    address = 0
    device: torch.device | None = None

    def __new__(cls, size: int) -> PinnedMemory:
        """Raises RuntimeError where the system does not give so much."""
        try:
            memory = super().__new__(cls, -1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise RuntimeError(f"offload: {size / 2**30:.1f} GiB of host memory are not to be had ({error})") from error
        with suppress(OSError):  # a system without large pages
            memory.madvise(mmap.MADV_HUGEPAGE)
        return memory

    def register(self, address: int, device: torch.device) -> None:
        """Raises RuntimeError where so much cannot be pinned."""
        with _current(device):
            code = int(torch.cuda.cudart().cudaHostRegister(address, len(self), PORTABLE))
            if code:
                with suppress(RuntimeError):
                    torch.zeros(1, device=device)  # or the next launch, whoever's, would be told of this error
                raise RuntimeError(
                    f"offload: {len(self) / 2**30:.1f} GiB of host memory cannot be pinned (CUDA error {code})"
                )
        self.address, self.device = address, device

    def __del__(self):
        if self.address and not sys.is_finalizing():  # else the process gives it back
            torch.cuda.synchronize(self.device)  # copies may be on their way
            with _current(self.device):
                torch.cuda.cudart().cudaHostUnregister(self.address)


def _current(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def pinned_zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in pinned memory, of at least one number, for a CUDA device to address.

    Raises:
        RuntimeError: there is not so much memory, or it cannot be pinned.
    """
    memory = PinnedMemory(math.prod(shape) * dtype.itemsize)
    numbers = torch.frombuffer(memory, dtype=dtype).view(shape).zero_()
    memory.register(numbers.data_ptr(), device)
    return numbers
