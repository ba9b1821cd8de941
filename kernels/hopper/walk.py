"""Which keys a tile of queries walks, and which of them each query sees, as the Hopper kernels take them: by numbers.

A walk goes over tiles of KEYS keys (see `walk_of` in primitives.py): a tile is one or several entries of a list, or a
piece of one; without lists, KEYS keys in a row. The producer needs to know where each part of a tile begins, the
consumers only where a mask is due. What is missing to a whole tile begins NOWHERE: past every query, and past the end
of k and v.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from ..primitives import tile_start, visible, walk_of

NOWHERE = tl.constexpr(1 << 30)


class Steps:
    """How `walk_of` takes the walks of a form with BLOCK_N."""

    KEYS = 128  # of a tile

    @property
    def SUB(self) -> int:
        """Tiles of a block."""
        return max(1, self.BLOCK_N // self.KEYS)

    @property
    def PER(self) -> int:
        """Parts of a tile: blocks, or one piece of a block."""
        return max(1, self.KEYS // self.BLOCK_N)


class Walk(NamedTuple):
    entries: tl.tensor  # of this tile's list, and the bits of who chose them
    bits: tl.tensor
    n: tl.tensor  # how many entries
    tiles: tl.tensor  # of keys: at least one, the first `clear` of which need no mask
    clear: tl.tensor
    low: tl.tensor  # without lists: see walk_of
    clear_from: tl.tensor
    window: tl.tensor


@triton.jit
def begin_walk(walks, i_list, NE, tokens, pos_first, pos_last, window, form: tl.constexpr):
    """The walk of a tile of `tokens` queries, at pos_first … pos_last; of one tile if there is nothing to see."""
    tiles, clear, low, clear_from, n = walk_of(i_list, pos_first, pos_last, walks.lengths, window, form)
    tiles = tl.where(tokens > 0, tl.maximum(tiles, 1), 1)
    return Walk(
        walks.entries + i_list * NE if form.LISTS else 0,
        walks.bits + i_list * NE if form.MEMBERS else 0,
        n,
        tiles,
        tl.minimum(clear, tiles),
        low,
        clear_from,
        window,
    )


@triton.jit
def starts_of(walk, i, form: tl.constexpr):
    """First keys of the parts of tile i."""
    PER: tl.constexpr = form.PER
    starts = ()
    if form.LISTS:
        for part in tl.static_range(PER):
            entry = i // form.SUB * PER + part
            block = tl.load(walk.entries + entry, mask=entry < walk.n, other=NOWHERE // form.BLOCK_N)
            starts += (block * form.BLOCK_N + i % form.SUB * form.KEYS,)
    else:
        starts = (tile_start(i, walk.clear, walk.low, walk.clear_from) * form.KEYS,)
    return starts


@triton.jit
def bits_of(walk, i, form: tl.constexpr):
    """Who chose the parts of tile i."""
    PER: tl.constexpr = form.PER
    bits = ()
    for part in tl.static_range(PER):
        entry = i // form.SUB * PER + part
        bits += (tl.load(walk.bits + entry, mask=entry < walk.n, other=0),)
    return bits


@triton.jit
def unseen_hidden(logits, starts, pos, key, walk, form: tl.constexpr):
    """−inf where a query at `pos` `[ROWS]` does not see a key; `key` is 0 … KEYS − 1 inside the tile."""
    PER: tl.constexpr = form.PER
    start = starts[0]
    for part in tl.static_range(1, PER):
        start = tl.where(key < part * form.BLOCK_N, start, starts[part] - part * form.BLOCK_N)
    # The keys that a thread holds differ by constants: what is left of them is compared, the rest is taken off pos.
    rest = key % 8 // 2 * 2
    seen = visible(pos[:, None] - (start + rest)[None, :], (key - rest)[None, :], NOWHERE, walk.window, form.WINDOWED)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def unchosen_hidden(logits, bits, bit, key, form: tl.constexpr):
    """−inf where a query, by its `bit` `[ROWS]`, did not choose a key's block."""
    PER: tl.constexpr = form.PER
    for part in tl.static_range(PER):
        chosen = ((bits[part] >> bit) & 1) != 0
        logits = tl.where(chosen[:, None] | (key // form.BLOCK_N != part)[None, :], logits, float("-inf"))
    return logits
