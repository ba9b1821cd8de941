"""Pages of keys and values from one bounded pool, and who holds them.

A page holds `block_n` keys of one KV head. The H pages of a key block are taken, shared and given back together, so the
books are kept in **blocks**: page `block · H + h` is that of head h. Blocks are shared by counting who holds them, and
copied by the first who writes to one that others hold as well. The books are plain numbers on the host; nothing here
waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .selection import BlockSelection
from .selectors import block_summaries


@dataclass(frozen=True)
class PagedKV:
    """The view of paged keys and values that attention sees.

    Key position s of sequence b and KV head h is in page `page_table[b, h, s // block_n]`, slot `s % block_n`.

    Attributes:
        k_pages, v_pages: `[P, block_n, D]`.
        page_table: int32 `[B, H, NP]`.
        lengths: int32 `[B]`, keys of each sequence.
    """

    k_pages: Tensor
    v_pages: Tensor
    page_table: Tensor
    lengths: Tensor

    @property
    def block_n(self) -> int:
        return self.k_pages.shape[1]


def sent(values: Sequence, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers of the host as a tensor on `device`, without waiting for it."""
    x = torch.tensor(values, dtype=dtype)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


class PagePool:
    """A bounded number of blocks, used by one cache or by several that share prompts.

    Attributes:
        k_pages, v_pages: `[blocks · H, block_n, D]`.
        summaries: `[blocks, H, D]`, the mean key of every full page; beside other pages it has no meaning.
        holders: per block, how many sequences hold it.
        free: the blocks that none holds, as the keys of a dict: in order, and any of them quickly removed.
        moves: how often `grow` has moved the pages.
    """

    def __init__(
        self, blocks: int, kv_heads: int, block_n: int, head_dim: int, dtype: torch.dtype, device: torch.device
    ):
        shape = blocks * kv_heads, block_n, head_dim
        self.k_pages, self.v_pages = (self._new_pages(*shape, dtype, device) for _ in range(2))
        self.summaries = torch.zeros(blocks, kv_heads, head_dim, dtype=dtype, device=device)
        self.holders = [0] * blocks
        self.free = dict.fromkeys(range(blocks))
        self.moves = 0

    @property
    def kv_heads(self) -> int:
        return self.summaries.shape[1]

    @property
    def block_n(self) -> int:
        return self.k_pages.shape[1]

    def require(self, blocks: int) -> None:
        """Raises ValueError unless so many blocks are free."""
        if blocks > len(self.free):
            H, total = self.kv_heads, len(self.holders)
            raise ValueError(
                f"cache: expected {blocks} free key blocks ({blocks * H} pages), got {len(self.free)} "
                f"({len(self.free) * H} pages) of a pool of {total}; give blocks back with `reset` or by dropping "
                "forks, enlarge the pool with `grow`, or make the cache with more `blocks`"
            )

    def take(self, wanted: int) -> int:
        """A free block, `wanted` if that is one. There must be one."""
        if wanted in self.free:
            del self.free[wanted]
            block = wanted
        else:
            block = self.free.popitem()[0]
        self.holders[block] = 1
        return block

    def hold(self, blocks: Sequence[int]) -> None:
        """One more sequence holds each of these."""
        for block in blocks:
            self.holders[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """One sequence less holds each of these."""
        for block in blocks:
            self.holders[block] -= 1
            if not self.holders[block]:
                self.free[block] = None

    def copy(self, origins: Sequence[int], copies: Sequence[int]) -> None:
        """Copies keys and values from block to block; not the summaries, which open blocks do not have."""
        at = sent([origins, copies], torch.long, self.k_pages.device)
        origin, copied = (self.pages_of(block).flatten() for block in at)
        for pages in (self.k_pages, self.v_pages):
            pages[copied] = pages[origin]

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
        """`write` for the next tokens of some sequences, and the summaries of the blocks that become full.

        Args:
            open_, new: the blocks written to: those that hold tokens already, and the others.
            full: those of them that become full.
        """
        self.write(k, v, block, slot)
        if full:
            self.summarise(sent(full, torch.long, self.summaries.device))

    def write(self, k: Tensor, v: Tensor, block: Tensor, slot: Tensor) -> None:
        """Writes k and v `[N, H, D]` to slots int64 `[N]` of blocks int64 `[N]`."""
        page = self.pages_of(block)
        self.k_pages[page, slot[:, None]] = k.detach().to(self.k_pages.dtype)
        self.v_pages[page, slot[:, None]] = v.detach().to(self.v_pages.dtype)

    def summarise(self, block: Tensor) -> None:
        """Computes the summaries of blocks int64 `[N]` from their pages; those of open blocks mean nothing yet."""
        keys = self._keys(self.pages_of(block).flatten())
        means = block_summaries(keys[:, :, None], self.block_n)  # [N · H, 1, 1, D]
        self.summaries[block] = means.view(-1, *self.summaries.shape[1:])

    def paged(self, page_table: Tensor, lengths: Tensor, selection: BlockSelection | None) -> PagedKV:
        """What attention reads of sequences with these pages and lengths, of all of them or of a selection."""
        return PagedKV(self.k_pages, self.v_pages, page_table, lengths)

    def grow(self, blocks: int) -> None:
        """Enlarges the pool to `blocks`. The pages keep their numbers and move to other memory; both exist for a
        while.
        """
        before = len(self.holders)
        more = blocks - before
        if more <= 0:
            return
        self.moves += 1  # of some tensors even if there is no memory for all
        try:
            for name in ("k_pages", "v_pages"):
                x = getattr(self, name)
                pages = self._new_pages(blocks * self.kv_heads, *x.shape[1:], x.dtype, self.summaries.device)
                pages[: len(x)] = x
                setattr(self, name, pages)
            self.summaries = torch.cat([self.summaries, self.summaries.new_zeros(more, *self.summaries.shape[1:])])
        except BaseException:
            self.k_pages, self.v_pages = (x[: before * self.kv_heads] for x in (self.k_pages, self.v_pages))
            raise
        self.free |= dict.fromkeys(range(before, blocks))
        self.holders += [0] * more

    def _new_pages(self, pages: int, block_n: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.zeros(pages, block_n, head_dim, dtype=dtype, device=device)

    def _keys(self, page: Tensor) -> Tensor:
        """The keys of pages int64 `[M]`, `[M, block_n, D]`."""
        return self.k_pages[page]

    def pages_of(self, block: Tensor) -> Tensor:
        """The pages int64 `[N, H]` of blocks int64 `[N]`."""
        return block[:, None] * self.kv_heads + torch.arange(self.kv_heads, device=block.device)


class PageTable:
    """The blocks of some sequences in order, on the host, and the same as pages on the device.

    Where it can, block j of sequence b is block `b · NP + j` of the pool, its home: as long as all are at home, the
    pool's summaries are those of the sequences, in order.

    Attributes:
        blocks: per sequence, the blocks it holds.
        pages: int32 `[B, H, NP]`; entries past a sequence's blocks have no meaning.
        numbers: int64 `[B, NP]`, the blocks again, on the device. Writes go by these: damaged `pages` lead none astray.
        at_home: whether all blocks are.
    """

    def __init__(self, pool: PagePool, batch_size: int, width: int):
        device = pool.summaries.device
        self.pool, self.at_home = pool, True
        self.blocks: list[list[int]] = [[] for _ in range(batch_size)]
        self.pages = torch.zeros(batch_size, pool.kv_heads, width, dtype=torch.int32, device=device)
        self.numbers = torch.zeros(batch_size, width, dtype=torch.long, device=device)

    @property
    def width(self) -> int:
        return self.pages.shape[2]

    def blocks_needed(self, tokens: Sequence[int], counts: Sequence[int]) -> int:
        """Free blocks that `counts[b]` tokens after `tokens[b]` take, those for copies of shared ones included."""
        block_n, needed, writers = self.pool.block_n, 0, {}
        for own, start, count in zip(self.blocks, tokens, counts):
            needed += max(0, -(-(start + count) // block_n) - len(own))
            if count and start % block_n:
                block = own[start // block_n]
                writers[block] = writers.get(block, 0) + 1
        # the last holder of a block writes to it in place
        return needed + sum(min(n, self.pool.holders[block] - 1) for block, n in writers.items())

    def extend(self, tokens: Sequence[int], counts: Sequence[int]) -> None:
        """Makes room for `counts[b]` tokens after `tokens[b]`: takes blocks, and copies open ones that others hold.

        Undone by `cut`, but for the copies: they hold what the shared blocks did. When it raises, no copy is kept.
        """
        pool, block_n, places, copied = self.pool, self.pool.block_n, [], []
        pool.require(self.blocks_needed(tokens, counts))
        for b, (own, start, count) in enumerate(zip(self.blocks, tokens, counts)):
            j = start // block_n
            if count and start % block_n and pool.holders[own[j]] > 1:
                copy = pool.take(b * self.width + j)
                copied.append((own, j, own[j], copy))
                pool.release([own[j]])
                own[j] = copy
                places.append((b, j))
            for j in range(len(own), -(-(start + count) // block_n)):
                own.append(pool.take(b * self.width + j))
                places.append((b, j))
        try:
            if copied:
                _, _, origins, copies = zip(*copied)
                pool.copy(origins, copies)
            self._publish(places)
        except BaseException:  # else the books would name blocks that the device does not know
            for own, j, origin, copy in copied:
                pool.hold([origin])
                pool.release([copy])
                own[j] = origin
            raise

    def locate(self, sequence: Tensor, position: Tensor) -> Tensor:
        """The blocks of tokens, int64, from sequences and positions of one shape, which `extend` made room for."""
        return self.numbers[sequence, position // self.pool.block_n]

    def written(self, tokens: Sequence[int], counts: Sequence[int]) -> tuple[list[int], list[int], list[int]]:
        """The blocks that `counts[b]` tokens after `tokens[b]` go to: those that are open, new ones, and which of both
        become full.
        """
        block_n, open_, new, full = self.pool.block_n, [], [], []
        for own, start, count in zip(self.blocks, tokens, counts):
            end = start + count
            begun = -(-start // block_n)
            if count:
                open_ += own[start // block_n : begun]
                new += own[begun : -(-end // block_n)]
                full += own[start // block_n : end // block_n]
        return open_, new, full

    def cut(self, tokens: Sequence[int]) -> None:
        """Gives back what lies beyond `tokens[b]` of each sequence."""
        for own, left in zip(self.blocks, tokens):
            kept = -(-left // self.pool.block_n)
            self.pool.release(own[kept:])
            del own[kept:]
        self.at_home = self.at_home or not any(self.blocks)

    def follow(self, origin: PageTable, order: Sequence[int]) -> None:
        """Sequence i goes on from what sequence `order[i]` of `origin` holds, over the same pool."""
        at = sent(order, torch.long, self.pages.device)
        pages, numbers = origin.pages[at], origin.numbers[at]  # what can fail comes first
        fresh = [list(origin.blocks[b]) for b in order]
        kept = [_shared(old, new) for old, new in zip(self.blocks, fresh)]
        for new, n in zip(fresh, kept):  # all are held before any is given back
            self.pool.hold(new[n:])
        for old, n in zip(self.blocks, kept):
            self.pool.release(old[n:])
        self.at_home = origin.at_home and (list(order) == list(range(len(order))) or not any(fresh))
        self.blocks = fresh
        self.pages.copy_(pages)
        self.numbers.copy_(numbers)

    def widen(self, width: int) -> None:
        """Makes room for `width` blocks per sequence, in other memory."""
        self.at_home = not any(self.blocks[1:]) and self.at_home
        more = width - self.width
        self.pages, self.numbers = (torch.nn.functional.pad(x, (0, more)) for x in (self.pages, self.numbers))

    def summaries(self, sequence: Tensor | slice, blocks: int) -> Tensor:
        """The summaries of the first `blocks` blocks of some sequences, `[b, blocks, H, D]`."""
        B, H, NP = self.pages.shape
        pool = self.pool.summaries
        if self.at_home and isinstance(sequence, slice) and pool.shape[0] >= B * NP:
            return pool[: B * NP].unflatten(0, (B, NP))[sequence, :blocks]
        return pool[self.numbers[sequence, :blocks]]

    def _publish(self, places: list[tuple[int, int]]) -> None:
        """Brings entries of `pages` in line with `blocks`."""
        if not places:
            return
        numbers = [(b, j, self.blocks[b][j]) for b, j in places]
        self.at_home = self.at_home and all(block == b * self.width + j for b, j, block in numbers)
        b, j, block = sent(numbers, torch.long, self.pages.device).unbind(1)
        self.pages[b, :, j] = self.pool.pages_of(block).int()
        self.numbers[b, j] = block


def _shared(old: list[int], new: list[int]) -> int:
    """How many blocks two lists begin with in common. Beyond the first difference none is the same: sharing begins with
    a copy of a list and ends at its last block.
    """
    low, high = 0, min(len(old), len(new))
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if old[middle] == new[middle] else (low, middle)
    return low
