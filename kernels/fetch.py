"""Pages of the host's memory, brought to the device's slots without asking the host which.

    page = page_table[b, h, block];  missing = listed pages that no slot holds;  the least recently read slots ← missing

Four launches a read. `look up` turns lists into pages and marks the slots that hold one of them as read now; of all
places that name a missing page the first claims it, so that it is fetched once. `give`, one program, numbers the
missing pages and walks the slots from the one that was read longest ago: those that are not read now go to the missing
pages in turn, and the order of the next read is written beside, so that it is least recently read, exactly, without a
sort. `copy` then moves the pages, read from pinned memory over the bus by address, many programs at a time. Which slot
a page gets depends on lists and earlier reads alone, not on timing. `view` at last writes which slot a listed block is
in, as the page table that attention reads.

Also here: writing new tokens to the host and to the slots at once. All grids follow from shapes, so a captured graph
stays valid while lists and pages change.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .tiles import cdiv, next_power_of_2

PROGRAMS = 1024  # that copy pages at a time
LIST_TILE = 256  # places of lists in one program
GIVE_TILE = 1024  # places, and slots, that `give` takes at a time
PAGE_TILE = 4096  # words of a page that a program holds at once, of keys and of values


@triton.jit
def _place(offs, real, counts, C, H, NM, NB):
    """Of places in lists `[B, C, H, NM, NB]`: sequence, KV head, and whether something is listed there."""
    i_list = offs // NB
    listed = real & (offs % NB < tl.load(counts + i_list, mask=real, other=0))
    return (i_list // (NM * H * C)).to(tl.int64), i_list // NM % H, listed


@triton.jit
def _claim_of(now, place):
    """Rises with reads, and falls with places."""
    return now * 4294967296 + (2147483647 - place)


@triton.jit(do_not_specialize=["n", "NM", "NB", "NP", "P"])
def _look_up_kernel(
    indices,
    counts,
    page_table,
    slot_of,
    last_read,
    claims,
    clock,
    wanted,
    stride_tb,
    stride_th,
    n,
    C,
    H,
    NM,
    NB,
    NP,
    P,
    TILE: tl.constexpr,
):
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    real = offs < n
    i_b, i_h, listed = _place(offs, real, counts, C, H, NM, NB)
    block = tl.load(indices + offs, mask=listed, other=-1)
    page = tl.load(page_table + i_b * stride_tb + i_h * stride_th + block, mask=(block >= 0) & (block < NP), other=-1)
    page = tl.where(page < P, page, -1)
    tl.store(wanted + offs, page, mask=real)
    slot = tl.load(slot_of + page, mask=page >= 0, other=-1)
    now = tl.load(clock)
    tl.store(last_read + slot, tl.zeros([TILE], tl.int64) + now, mask=slot >= 0)
    tl.atomic_max(claims + page, _claim_of(now, offs.to(tl.int64)), mask=(page >= 0) & (slot < 0))


@triton.jit(do_not_specialize=["n", "S"])
def _give_kernel(
    wanted,
    slot_of,
    page_in,
    order,
    last_read,
    claims,
    clock,
    fetched,
    missing,
    given,
    total,
    n,
    S,
    TILE: tl.constexpr,
):
    """One program. `order` has two rows, of which reads write one after the other."""
    now = tl.load(clock)
    misses = 0
    for start in range(0, n, TILE):
        place = start + tl.arange(0, TILE)
        page = tl.load(wanted + place, mask=place < n, other=-1)
        away = (page >= 0) & (tl.load(slot_of + page, mask=page >= 0, other=0) < 0)
        first = away & (tl.load(claims + page, mask=away, other=0) == _claim_of(now, place.to(tl.int64)))
        tl.store(missing + misses + tl.cumsum(first.to(tl.int32), 0) - 1, page, mask=first)
        misses += tl.sum(first.to(tl.int32), 0)
    tl.debug_barrier()  # what this program has stored, its other threads now load
    before = order + (now % 2) * S
    after = order + (1 - now % 2) * S
    idle_before = 0  # slots that were passed and are not read now
    for start in range(0, S, TILE):
        at = start + tl.arange(0, TILE)
        real = at < S
        slot = tl.load(before + at, mask=real, other=0)
        idle = real & (tl.load(last_read + slot, mask=real, other=0) != now)
        rank = idle_before + tl.cumsum(idle.to(tl.int32), 0) - idle.to(tl.int32)
        taken = idle & (rank < misses)
        old = tl.load(page_in + slot, mask=taken, other=-1)
        tl.store(slot_of + old, tl.full([TILE], -1, tl.int32), mask=old >= 0)
        page = tl.load(missing + rank, mask=taken, other=0)
        tl.store(slot_of + page, slot, mask=taken)
        tl.store(page_in + slot, page, mask=taken)
        tl.store(given + rank, slot, mask=taken)
        # idle ones move up, those of this read fill the row from its end
        place_after = tl.where(idle & (rank >= misses), rank - misses, S - 1 - (at - rank + tl.minimum(rank, misses)))
        tl.store(after + place_after, slot, mask=real)
        idle_before += tl.sum(idle.to(tl.int32), 0)
    misses = tl.minimum(misses, idle_before)
    tl.store(total, misses)
    tl.store(fetched, tl.load(fetched) + misses)


@triton.jit(do_not_specialize=["FROM", "TO"])
def _copy_kernel(
    k_from,
    v_from,
    k_to,
    v_to,
    origins,
    places,
    total,
    FROM,
    TO,
    WORDS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Pages as words: `origins[i]` of FROM to `places[i]` of TO, for i below `total`; one that does not exist is left
    out. Without `v_from`, keys alone.
    """
    offs = tl.program_id(1) * TILE + tl.arange(0, TILE)
    mask = offs < WORDS
    for i in range(tl.program_id(0), tl.load(total), tl.num_programs(0)):
        origin = tl.load(origins + i).to(tl.int64)
        place = tl.load(places + i).to(tl.int64)
        there = mask & (origin >= 0) & (origin < FROM) & (place >= 0) & (place < TO)
        k = tl.load(k_from + origin * WORDS + offs, mask=there)
        if v_from is not None:
            v = tl.load(v_from + origin * WORDS + offs, mask=there)
            tl.store(v_to + place * WORDS + offs, v, mask=there)
        tl.store(k_to + place * WORDS + offs, k, mask=there)


@triton.jit(do_not_specialize=["n", "NM", "NB", "NP"])
def _view_kernel(indices, counts, wanted, slot_of, view, n, C, H, NM, NB, NP, TILE: tl.constexpr):
    offs = tl.program_id(0) * TILE + tl.arange(0, TILE)
    i_b, i_h, _ = _place(offs, offs < n, counts, C, H, NM, NB)
    page = tl.load(wanted + offs, mask=offs < n, other=-1)
    block = tl.load(indices + offs, mask=page >= 0, other=0)
    slot = tl.load(slot_of + page, mask=page >= 0, other=-1)
    tl.store(view + (i_b * H + i_h) * NP + block, slot, mask=page >= 0)


@triton.jit(do_not_specialize=["P"])
def _write_kernel(
    k,
    v,
    block,
    offset,
    slot_of,
    k_pages,
    v_pages,
    k_slots,
    v_slots,
    P,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    DP: tl.constexpr,
):
    """One token: its keys and values `[H, D]` to their pages, and to the slots that hold those."""
    i = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, ROWS)
    dims = tl.arange(0, DP)
    page = tl.load(block + i) * H + head
    row = tl.load(offset + i)
    there = (head < H) & (page >= 0) & (page < P) & (row >= 0) & (row < BLOCK_N)
    slot = tl.load(slot_of + page, mask=there, other=-1).to(tl.int64)
    mask = (head < H)[:, None] & (dims < D)[None, :]
    own = i * H * D + head[:, None] * D + dims[None, :]
    k_row = tl.load(k + own, mask=mask)
    v_row = tl.load(v + own, mask=mask)
    at_home = (page * BLOCK_N + row)[:, None] * D + dims[None, :]
    in_slot = (slot * BLOCK_N + row)[:, None] * D + dims[None, :]
    tl.store(k_pages + at_home, k_row, mask=mask & there[:, None])
    tl.store(v_pages + at_home, v_row, mask=mask & there[:, None])
    tl.store(k_slots + in_slot, k_row, mask=mask & (slot >= 0)[:, None])
    tl.store(v_slots + in_slot, v_row, mask=mask & (slot >= 0)[:, None])


def fetch(
    indices: Tensor,
    counts: Tensor,
    page_table: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
    slot_of: Tensor,
    page_in: Tensor,
    order: Tensor,
    last_read: Tensor,
    claims: Tensor,
    clock: Tensor,
    fetched: Tensor,
) -> Tensor:
    """Sees to it that the pages on the lists are in slots, of which there must be as many as different pages.

    Args:
        indices, counts: contiguous, as in BlockSelection.
        page_table: int32 `[B, H, NP]`, the last dimension contiguous.
        k_pages, v_pages: contiguous, in memory that the device can address. The rest as in `OffloadedPool`.

    Returns:
        A page table int32 `[B, H, NP]` of slots, −1 for blocks that no list names and pages that do not exist.
    """
    _, C, H, NM, NB = indices.shape
    n, NP, S = indices.numel(), page_table.shape[2], order.shape[1]
    view = torch.full(page_table.shape, -1, dtype=torch.int32, device=indices.device)
    wanted, missing, given = torch.empty(3, n, dtype=torch.int32, device=indices.device)
    total = torch.empty(1, dtype=torch.int32, device=indices.device)
    clock += 1
    sizes = n, C, H, NM, NB, NP
    grid, strides = (cdiv(n, LIST_TILE),), page_table.stride()[:2]
    marks = last_read, claims, clock
    _look_up_kernel[grid](
        indices, counts, page_table, slot_of, *marks, wanted, *strides, *sizes, len(slot_of), TILE=LIST_TILE
    )
    _give_kernel[(1,)](
        wanted, slot_of, page_in, order, *marks, fetched, missing, given, total, n, S, TILE=GIVE_TILE, num_warps=8
    )
    _copy(k_pages, v_pages, k_slots, v_slots, missing, given, total, n)
    _view_kernel[grid](indices, counts, wanted, slot_of, view, *sizes, TILE=LIST_TILE)
    return view


def copy_pages(
    k_from: Tensor, v_from: Tensor | None, k_to: Tensor, v_to: Tensor | None, origins: Tensor, places: Tensor
) -> None:
    """Copies pages `origins[i]` to `places[i]`, integers `[n]` on the device, which also launches.

    Args:
        k_from, v_from, k_to, v_to: `[pages, block_n, D]`, contiguous, in memory that the device can address; without
            `v_from`, keys alone.
    """
    n = origins.numel()
    total = torch.full((1,), n, dtype=torch.int32, device=origins.device)
    _copy(k_from, v_from, k_to, v_to, origins, places, total, n)


def _copy(k_from, v_from, k_to, v_to, origins, places, total, most):
    k_from, v_from, k_to, v_to = map(_words, (k_from, v_from, k_to, v_to))
    words = k_from.shape[1]
    tile = min(next_power_of_2(words), PAGE_TILE)
    _copy_kernel[(min(most, PROGRAMS), cdiv(words, tile))](
        k_from,
        v_from,
        k_to,
        v_to,
        origins,
        places,
        total,
        len(k_from),
        len(k_to),
        WORDS=words,
        TILE=tile,
    )


def _words(pages: Tensor | None) -> Tensor | None:
    """`[pages, words]`."""
    if pages is None:
        return None
    pages = pages.flatten(1)
    return pages.view(torch.int32 if pages.shape[1] * pages.itemsize % 4 == 0 else torch.int16)


def write(
    k: Tensor,
    v: Tensor,
    block: Tensor,
    offset: Tensor,
    slot_of: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_slots: Tensor,
    v_slots: Tensor,
) -> None:
    """Writes k and v `[N, H, D]`, contiguous and of the pages' dtype, to rows `offset` of blocks `block`, both int64
    `[N]`: to the pages, and to the slots that hold them.
    """
    N, H, D = k.shape
    _write_kernel[(N,)](
        k,
        v,
        block,
        offset,
        slot_of,
        k_pages,
        v_pages,
        k_slots,
        v_slots,
        len(slot_of),
        H=H,
        D=D,
        BLOCK_N=k_pages.shape[1],
        ROWS=next_power_of_2(H),
        DP=next_power_of_2(D),
    )
