"""A pool whose pages live in the host's memory, and on the device only while they are being read.

**Who owns what.** The host owns all keys and values, in pinned memory beside a CUDA device. The device owns the
summaries and the page tables, which the choice of blocks needs whole, and `resident_blocks` · H *slots*, each room for
one page. A page in a slot is a copy: whatever is written goes to both, so a slot can be given away at any time.

**Reading.** Pinned memory has addresses that the device can read, so it fetches for itself and the host is never asked:
kernels look the chosen pages up, give those that no slot holds the slots that have not been read for the longest, and
copy them (kernels/fetch.py). `PagedKV` then consists of the slots and of a page table that maps the chosen key blocks
to slots, −1 elsewhere, so that kernels of attention need no change. A step is launches alone and can be a CUDA graph.
Without such kernels the same is done in torch, slot for slot, and the host waits for the lists.

All layers and all caches over a pool share its slots: as the layers read one K/V, a page that several of them choose is
there once. A model makes a cache with slots for the lists of all layers that choose: so what the last step read is
there when the next begins. A layer that chooses other pages takes the slots that were read first in the last step; what
a later layer would have found there again is then fetched again.

**Writing.** A few tokens are written to the host and to the slots by one kernel. Those of a prompt are laid out as
whole pages in a small pool on the device, which begins with what the open pages held; summaries are computed there, by
the code of any other pool; then the pages are sent to the host, and to the slots that hold them. A prompt so takes
memory for one chunk of it, not for itself.

**Sharing, truncating.** Books, copies on write and lengths are those of `pages.py`; a page that a copy overwrites
leaves its slot. Forks share the slots, whose number stays that of the first cache: where many sequences go on from one
prompt, it takes a cache with more `resident_blocks`.

**Refused**: dense attention, which would fetch everything for each token, and a read of more pages than there are
slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from . import ops
from .pages import PagedKV, PagePool, sent
from .pinned import pinned_zeros
from .selection import BlockSelection

RESIDENT_BLOCKS = 64  # per sequence and cross-decoder layer, where a caller does not say
WRITTEN_SINGLY = 256  # tokens at most; more are laid out as pages


class OffloadedPool(PagePool):
    """A `PagePool` with `k_pages` and `v_pages` on the host.

    Attributes:
        k_slots, v_slots: `[resident_blocks · H + 1, block_n, D]` on the device; the last slot is written in place of
            pages that have none.
        slot_of: int32 `[pages]`, the slot of every page, −1 where it has none.
        page_in: int32 `[slots + 1]`, the page in every slot, −1 where there is none.
        order: int32 `[2, slots]`, the slots from the least to the most recently read; read `clock` wrote row
            `(clock + 1) % 2` from the other.
        last_read: int64 `[slots]`, when every slot was last found to hold what a read wanted, by `clock`.
        claims: int64 `[pages]`, which place of a list fetches a page (kernels/fetch.py).
        clock: int64 `[1]`, reads so far.
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
        slots, pages = resident_blocks * kv_heads, blocks * kv_heads
        self.k_slots, self.v_slots = (
            torch.zeros(slots + 1, block_n, head_dim, dtype=dtype, device=device) for _ in range(2)
        )
        self.slot_of = torch.full((pages,), -1, dtype=torch.int32, device=device)
        self.page_in = torch.full((slots + 1,), -1, dtype=torch.int32, device=device)
        self.order = torch.arange(slots, dtype=torch.int32, device=device).repeat(2, 1)
        self.last_read = torch.zeros(slots, dtype=torch.long, device=device)
        self.claims = torch.zeros(pages, dtype=torch.long, device=device)
        self.clock, self._fetched = (torch.zeros(1, dtype=torch.long, device=device) for _ in range(2))

    def __getstate__(self) -> dict:
        self._wait()
        return vars(self)

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self._device.type == "cuda":
            pages = self.k_pages, self.v_pages
            self.k_pages, self.v_pages = (self._new_pages(*x.shape, x.dtype, self._device).copy_(x) for x in pages)

    @property
    def fetched(self) -> int:
        """Pages that were sent to the device to be read, so far; waits for it."""
        return int(self._fetched)

    @property
    def _device(self) -> torch.device:
        return self.summaries.device

    def _new_pages(self, pages: int, block_n: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        if device.type == "cuda":
            return pinned_zeros(pages, block_n, head_dim, dtype=dtype, device=device)
        return super()._new_pages(pages, block_n, head_dim, dtype, device)

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
        if by_kernels(self.k_slots) and len(k) <= WRITTEN_SINGLY:
            self.write(k, v, block, slot)
            if full:
                self.summarise(sent(full, torch.long, self._device))
            return
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
        slots = self.slot_of[self.pages_of(touched_).flatten()].long()  # −1, the last, where there is none
        for pages, resident, own in (
            (self.k_pages, self.k_slots, stage.k_pages),
            (self.v_pages, self.v_slots, stage.v_pages),
        ):
            resident[slots] = own
            for i, n, blocks in _runs(touched):
                pages[n * H : (n + blocks) * H].copy_(own[i * H : (i + blocks) * H], non_blocking=True)

    def write(self, k: Tensor, v: Tensor, block: Tensor, slot: Tensor) -> None:
        if by_kernels(self.k_slots):
            pages = self.k_pages, self.v_pages, self.k_slots, self.v_slots
            ops.triton_write_pages(k.detach(), v.detach(), block, slot, self.slot_of, *pages)
            return
        self._wait()
        page = self.pages_of(block)
        for pages, resident, x in ((self.k_pages, self.k_slots, k), (self.v_pages, self.v_slots, v)):
            x = x.detach().to(pages.dtype)
            pages[page.cpu(), slot[:, None].cpu()] = x.cpu()
            resident[self.slot_of[page].long(), slot[:, None]] = x  # −1, the last, where there is none

    def copy(self, origins: Sequence[int], copies: Sequence[int]) -> None:
        blocks = sent([origins, copies], torch.long, self._device)
        origin, copied = (self.pages_of(block).flatten() for block in blocks)
        self.page_in.index_fill_(0, self.slot_of[copied].long(), -1)  # the last, where there is none
        self.slot_of.index_fill_(0, copied, -1)
        if by_kernels(self.k_slots):
            ops.triton_copy_pages(self.k_pages, self.v_pages, self.k_pages, self.v_pages, origin, copied)
            return
        self._wait()
        for pages in (self.k_pages, self.v_pages):
            pages[copied.cpu()] = pages[origin.cpu()]

    def grow(self, blocks: int) -> None:
        self._wait()
        more = (blocks - len(self.holders)) * self.kv_heads
        if more > 0:
            slot_of = torch.cat([self.slot_of, self.slot_of.new_full((more,), -1)])
            claims = torch.cat([self.claims, self.claims.new_zeros(more)])
            super().grow(blocks)
            self.slot_of, self.claims = slot_of, claims

    def _keys(self, page: Tensor) -> Tensor:
        if by_kernels(self.k_slots):
            keys = torch.empty(len(page), *self.k_slots.shape[1:], dtype=self.k_slots.dtype, device=self._device)
            ops.triton_copy_pages(self.k_pages, None, keys, None, page, torch.arange(len(page), device=self._device))
            return keys
        self._wait()
        return self.k_pages[page.cpu()].to(self._device)

    # Reading

    def holds(self, places: int) -> bool:
        """Whether lists of one KV head with so many places in all are sure to fit, whatever they name."""
        return places * self.kv_heads < len(self.page_in)

    def paged(self, page_table: Tensor, lengths: Tensor, selection: BlockSelection | None) -> PagedKV:
        """Fetches what the selection names; nothing else is in the pages that are returned, until the next call.

        Raises:
            ValueError: it names more pages than there are slots. Nothing changes.
        """
        if selection.indices.numel() >= len(self.page_in):
            self._check_fits(selected_pages(page_table, selection, len(self.slot_of)))
        try:
            view = self._read(page_table, selection)
        except BaseException:  # what is in the slots is not known
            self.slot_of.fill_(-1)
            self.page_in.fill_(-1)
            raise
        return PagedKV(self.k_slots, self.v_slots, view, lengths)

    def _check_fits(self, pages: Tensor) -> None:
        """Waits for the device."""
        needed, slots = len(pages[pages >= 0].unique()), len(self.page_in) - 1
        if needed > slots:
            raise ValueError(
                f"resident_blocks: expected at least {-(-needed // self.kv_heads)} for a read of {needed} pages, got "
                f"{slots // self.kv_heads}; read fewer tokens at once, or make the cache with more"
            )

    def _read(self, page_table: Tensor, selection: BlockSelection) -> Tensor:
        """The page table of slots, int32 `[B, H, NP]`."""
        if by_kernels(self.k_slots):
            lists, pages = (selection.indices, selection.counts, page_table), (self.k_pages, self.v_pages)
            books = self.slot_of, self.page_in, self.order, self.last_read, self.claims, self.clock, self._fetched
            return ops.triton_fetch(*lists, *pages, self.k_slots, self.v_slots, *books)
        pages = selected_pages(page_table, selection, len(self.slot_of))
        self._fetch(pages[pages >= 0])
        B, H, NP = page_table.shape
        view = torch.full((B, H, NP + 1), -1, dtype=torch.int32, device=self._device)
        block = torch.where(pages >= 0, selection.indices, NP).movedim(2, 1).flatten(2)  # [B, H, C · NM · NB]
        view.scatter_(2, block.long(), self.slot_of[pages].movedim(2, 1).flatten(2))
        return view[..., :NP]

    def _fetch(self, wanted: Tensor) -> None:
        """What kernels/fetch.py does, in torch: pages int64 `[n]` that exist, in the order of the lists."""
        self.clock += 1
        now = int(self.clock)
        own = self.slot_of[wanted].long()
        self.last_read[own[own >= 0]] = now
        missing, place = wanted[own < 0].unique(return_inverse=True)
        first = torch.full_like(missing, len(wanted)).scatter_reduce(
            0, place, torch.arange(len(place), device=place.device), "amin"
        )
        missing = missing[first.argsort()]
        order = self.order[now % 2]
        idle = self.last_read[order] != now
        taken = idle & (idle.cumsum(0) <= len(missing))
        given = order[taken].long()
        old = self.page_in[given].long()
        self.slot_of[old[old >= 0]] = -1
        self._wait()
        for pages, resident in ((self.k_pages, self.k_slots), (self.v_pages, self.v_slots)):
            resident[given] = pages[missing.cpu()].to(self._device)
        self.page_in[given], self.slot_of[missing] = missing.int(), given.int()
        self.order[1 - now % 2] = torch.cat([order[idle & ~taken], order[~idle | taken].flip(0)])
        self._fetched += len(missing)

    def _wait(self) -> None:
        """Until the host has what was sent to it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def by_kernels(slots: Tensor) -> bool:
    """Whether pages can be moved by kernels."""
    return slots.is_cuda and ops.obstacle(slots) is None


def selected_pages(page_table: Tensor, selection: BlockSelection, pages: int) -> Tensor:
    """The pages that lists name, int64 `[B, C, H, NM, NB]`, −1 past their ends and where there is none of so many.

    Args:
        page_table: int32 `[B, H, NP]`.
    """
    indices, NP = selection.indices.long(), page_table.shape[-1]
    listed = torch.arange(indices.shape[-1], device=indices.device) < selection.counts[..., None]
    table = page_table[:, None, :, None].expand(*indices.shape[:-1], NP)
    page = table.gather(-1, indices.clamp(0, NP - 1)).long()
    return torch.where(listed & (indices >= 0) & (indices < NP) & (page >= 0) & (page < pages), page, -1)


def _runs(blocks: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Stretches of consecutive numbers: place of the first, the first, how many."""
    first = 0
    for i in range(1, len(blocks) + 1):
        if i == len(blocks) or blocks[i] != blocks[i - 1] + 1:
            yield first, blocks[first], i - first
            first = i
