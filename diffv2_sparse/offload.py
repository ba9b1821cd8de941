"""A pool whose pages live in the host's memory, and on the device only while they are being read.

**Who owns what.** The host owns all keys and values, in pinned memory beside a CUDA device. The device owns the
summaries and the page tables, which the choice of blocks needs whole, and `resident_blocks` · H *slots*, each room for
one page. A page in a slot is a copy: whatever is written goes to both, so a slot can be given away at any time.

**Reading.** The choice of blocks is made on the device. The pages that it names are looked up through the page table
there, and their numbers go to the host: the one wait per layer. Those that no slot holds are gathered into pinned
memory and sent; they take the slots that have not been read for the longest. `PagedKV` then consists of the slots and
of a page table that maps key blocks to slots, −1 where there is none, so that kernels need no change. All layers and
all caches over a pool share its slots: as the layers read one K/V, a page that several of them choose is there once.
A model makes a cache with slots for the lists of all layers that choose: so what the last step read stays, and a step
fetches only what none of them read then.

**Writing.** New tokens are laid out as whole pages in a small pool on the device, which begins with what the open pages
held; summaries are computed there, by the code of any other pool; then the pages are sent to the host, and to the slots
that hold them. A prompt so takes memory for one chunk of it, not for itself.

**Sharing, truncating.** Books, copies on write and lengths are those of `pages.py`; a copy is made on the host, and the
page it overwrites leaves its slot. **Refused**: dense attention, which would fetch everything for each token, a read of
more pages than there are slots, and CUDA graphs of steps, as fetching asks the host.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from .pages import PagePool, sent
from .selection import BlockSelection

RESIDENT_BLOCKS = 64  # per sequence and cross-decoder layer, where a caller does not say


class OffloadedPool(PagePool):
    """A `PagePool` with `k_pages` and `v_pages` on the host.

    Attributes:
        k_slots, v_slots: `[resident_blocks · H + 1, block_n, D]` on the device; the last slot is written in place of
            pages that have none.
        slot_of: int32 `[pages]` on the device, the slot of every page, −1 where it has none.
        fetched: pages that were sent to the device to be read, so far.
    """

    def __init__(
        self,
        blocks: int,
        kv_heads: int,
        block_n: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        resident_blocks: int,
    ):
        super().__init__(blocks, kv_heads, block_n, head_dim, dtype, device)
        slots = resident_blocks * kv_heads
        self.k_slots, self.v_slots = (
            torch.zeros(slots + 1, block_n, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.slot_of = torch.full((blocks * kv_heads,), -1, dtype=torch.int32, device=device)
        self.fetched = 0
        # the same on the host, by which slots are given: the slot of every page, the page in every slot, its last read
        self._slot_of = torch.full((blocks * kv_heads,), -1)
        self._page_in = torch.full((slots,), -1)
        self._last_read = torch.zeros(slots, dtype=torch.long)
        self._reads = 0
        self._sent_home: torch.cuda.Event | None = None  # after the last pages that were sent to the host

    def __getstate__(self) -> dict:
        self._wait()
        return vars(self) | {"_sent_home": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self._device.type == "cuda":
            self.k_pages, self.v_pages = self.k_pages.pin_memory(), self.v_pages.pin_memory()

    @property
    def _device(self) -> torch.device:
        return self.summaries.device

    def _new_pages(self, pages: int, block_n: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(pages, block_n, head_dim, dtype=dtype, pin_memory=device.type == "cuda")

    # Writing

    def append(
        self,
        k: Tensor,
        v: Tensor,
        block: Tensor,
        slot: Tensor,
        open_: Sequence[int],
        new: Sequence[int],
        full: Sequence[int],
    ) -> None:
        H, touched = self.kv_heads, [*open_, *new]
        stage = PagePool(len(touched), H, *self.k_slots.shape[1:], self.k_slots.dtype, self._device)
        for pages, own in ((self.k_pages, stage.k_pages), (self.v_pages, stage.v_pages)):
            for i, n in enumerate(open_):
                own[i * H : (i + 1) * H].copy_(pages[n * H : (n + 1) * H], non_blocking=True)
        touched_ = sent(touched, torch.long, self._device)
        place = torch.zeros(len(self.holders), dtype=torch.long, device=self._device)
        place[touched_] = torch.arange(len(touched), device=self._device)
        stage.write(k, v, place[block], slot)
        if full:
            full_ = sent(full, torch.long, self._device)
            stage.summarise(place[full_])
            self.summaries[full_] = stage.summaries[place[full_]]
        slots = self.slot_of[self._pages(touched_)].long()  # −1, the last, where there is none
        for pages, resident, own in (
            (self.k_pages, self.k_slots, stage.k_pages),
            (self.v_pages, self.v_slots, stage.v_pages),
        ):
            resident[slots] = own
            for i, n, blocks in _runs(touched):
                pages[n * H : (n + blocks) * H].copy_(own[i * H : (i + blocks) * H], non_blocking=True)
        if self._device.type == "cuda":
            self._sent_home = torch.cuda.Event()
            self._sent_home.record(torch.cuda.current_stream(self._device))

    def copy(self, origins: Sequence[int], copies: Sequence[int]) -> None:
        self._wait()
        origin, copied = (self._pages(torch.tensor(blocks)) for blocks in (origins, copies))
        self._forget(self._slot_of[copied])
        for pages in (self.k_pages, self.v_pages):
            pages[copied] = pages[origin]

    def grow(self, blocks: int) -> None:
        self._wait()
        more = max(0, blocks - len(self.holders)) * self.kv_heads
        slots = [torch.cat([x, x.new_full((more,), -1)]) for x in (self.slot_of, self._slot_of)]
        super().grow(blocks)
        self.slot_of, self._slot_of = slots

    # Reading

    def fetch(self, pages: Tensor) -> None:
        """Sees to it that pages are in slots; waits for the device.

        Args:
            pages: integers of any shape on the device; −1 is none, as is any other that does not exist.

        Raises:
            ValueError: they are more than there are slots. Nothing changes.
        """
        wanted = pages.flatten().to("cpu", torch.long)
        wanted = wanted[(wanted >= 0) & (wanted < len(self._slot_of))].unique()
        H, slots = self.kv_heads, len(self._page_in)
        if len(wanted) > slots:
            raise ValueError(
                f"resident_blocks: expected at least {-(-len(wanted) // H)} for a read of {len(wanted)} pages, got "
                f"{slots // H}; read fewer tokens at once, or make the cache with more"
            )
        own = self._slot_of[wanted]
        self._reads += 1
        self._last_read[own[own >= 0]] = self._reads
        missing = wanted[own < 0]
        if not len(missing):
            return
        given = self._last_read.topk(len(missing), largest=False).indices  # none of them is read now
        self._forget(given)
        self._wait()
        at = _moved(given, self._device)
        for pages, resident in ((self.k_pages, self.k_slots), (self.v_pages, self.v_slots)):
            resident[at] = _moved(pages, self._device, missing)
        self.slot_of[_moved(missing, self._device)] = at.int()
        self._slot_of[missing], self._page_in[given], self._last_read[given] = given, missing, self._reads
        self.fetched += len(missing)

    def slots(self, page_table: Tensor) -> Tensor:
        """A page table int32 of any shape as one of slots; −1 for pages that have none or do not exist."""
        exists = (page_table >= 0) & (page_table < len(self.slot_of))
        return torch.where(exists, self.slot_of[page_table.long().clamp(0, len(self.slot_of) - 1)], -1)

    def _forget(self, slots: Tensor) -> None:
        """Empties slots, −1 being none."""
        slots = slots[slots >= 0]
        slots = slots[self._page_in[slots] >= 0]
        pages = self._page_in[slots]
        if len(pages):
            self.slot_of.index_fill_(0, _moved(pages, self._device), -1)
            self._slot_of[pages], self._page_in[slots] = -1, -1

    def _wait(self) -> None:
        """Until the host has what was sent to it."""
        if self._sent_home is not None:
            self._sent_home.synchronize()
            self._sent_home = None


def selected_pages(page_table: Tensor, selection: BlockSelection) -> Tensor:
    """The pages that lists name, int64 `[B, C, H, NM, NB]`, −1 past their ends.

    Args:
        page_table: int32 `[B, H, NP]`.
    """
    indices, NP = selection.indices.long(), page_table.shape[-1]
    listed = torch.arange(indices.shape[-1], device=indices.device) < selection.counts[..., None]
    table = page_table[:, None, :, None].expand(*indices.shape[:-1], NP)
    pages = table.gather(-1, indices.clamp(0, NP - 1)).long()
    return torch.where(listed & (indices >= 0) & (indices < NP), pages, -1)


def _moved(x: Tensor, device: torch.device, rows: Tensor | None = None) -> Tensor:
    """A tensor of the host, or rows of it, on the device, without waiting for it."""
    if device.type != "cuda":
        return x if rows is None else x[rows]
    if rows is None:
        return x.pin_memory().to(device, non_blocking=True)
    gathered = torch.empty(len(rows), *x.shape[1:], dtype=x.dtype, pin_memory=True)
    return torch.index_select(x, 0, rows, out=gathered).to(device, non_blocking=True)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive numbers: place of the first, the first, how many."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield first, blocks[first], i - first
            first = i
