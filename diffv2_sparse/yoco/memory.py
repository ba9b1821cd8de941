"""Which chunk of a prompt would fit, when one did not.

    tried = the failed chunk's columns, halved until tried · bytes per column ≤ free

`free` is what the device can give once the failed chunk has let go of its tensors. Bytes per column come from the last
chunk that went through, where one did; else from the failed one, twice what it had allocated when it failed: that much
is only a lower bound of its need. A later chunk may need more than an earlier one (it reads more keys, or is the one
that runs the cross-decoder) and free memory may lie in pieces, so the answer is a size to try.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class ChunkMemory:
    """Watches the chunks of one prefill.

    Args:
        device: where they run. What they need is known on CUDA alone; elsewhere a chunk that fails is halved.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.bytes_per_column: float | None = None

    @contextmanager
    def chunk(self, columns: int) -> Iterator[None]:
        """Around the reading of a chunk.

        Raises:
            torch.OutOfMemoryError: in place of the same from within, which it is raised from; with a size to try.
        """
        held, peak = self._allocated(), self._peak()
        try:
            yield
        except torch.OutOfMemoryError as error:
            traceback.clear_frames(error.__traceback__)  # they hold what the chunk has allocated
            failed = self._peak() - held if self._peak() > peak else 0  # 0: no more than something before it
            raise torch.OutOfMemoryError(self._advice(columns, failed)) from error
        self.bytes_per_column = (self._peak() - held) / columns  # an upper bound if something before took more

    def _advice(self, columns: int, failed: int) -> str:
        per_column, free = self.bytes_per_column, self._free()
        if columns == 1:
            return "prefill: out of memory with a chunk of one column; fewer sequences at once need less"
        if per_column is None:
            per_column, known = 2 * failed / columns, "the failed chunk, which may have needed more"
        else:
            known = "the chunk before it"
        tried = columns // 2
        while tried > 1 and tried * per_column > free:
            tried //= 2
        reason = f", by {known}, and the {free / 2**20:.0f} MiB free now" if per_column else ""
        return (
            f"prefill: out of memory with a chunk of {columns} columns; try chunk_tokens={tried} (`generate`: "
            f"prefill_chunk_size={tried}){reason}. The cache is as it was before the call"
        )

    # What the device says

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0

    def _free(self) -> int:
        """Bytes that the allocator can still hand out: those of the device, of which this process may be allowed a
        part, and those it keeps unused.
        """
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        allowed = int(torch.cuda.get_per_process_memory_fraction(self.device) * total)
        return min(free, allowed - reserved) + reserved - self._allocated()
