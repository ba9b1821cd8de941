"""Block lists to measure attention with, without paying for a choice: each row lists the sink, its neighbourhood, and
other blocks drawn at random from its past.

    "random"      every row draws anew
    "model-like"  a drawn block stays for four rows, and each row exchanges a quarter: neighbouring rows share 75 %,
                  as the choices of neighbouring tokens in a trained model do

The drawn blocks of a list have *slots*. Slot s of n draws among the blocks s, s + n, s + 2n, … of the past, so that no
two slots ever hold the same block, whenever each was drawn. Two classes (C = 2) take some slots together and the
others apart.
"""

from dataclasses import dataclass, replace

import torch

from diffv2_sparse import BlockSelection

SINK_BLOCKS, LOCAL_BLOCKS = 1, 2  # forced, as `select_blocks` forces them by default
STAYS_FOR_ROWS = {"random": 1, "model-like": 4}
_NONE = torch.iinfo(torch.int32).max  # sorts behind every block


@dataclass(frozen=True)
class Lists:
    """What the lists of a measurement look like.

    Attributes:
        block_m, block_n: tokens per row, tokens per key block.
        blocks: of a list, forced ones included; fewer where a row has fewer in its past.
        pattern: "random" or "model-like".
        common: None for one list that both classes share (C = 1); else the share of `blocks` that the lists of signal
            and noise have in common (C = 2). The forced blocks always are.
    """

    block_m: int
    block_n: int
    blocks: int
    pattern: str = "random"
    common: float | None = None

    def __post_init__(self):
        if self.pattern not in STAYS_FOR_ROWS:
            raise ValueError(f"pattern: expected one of {', '.join(STAYS_FOR_ROWS)}, got {self.pattern!r}")
        if self.blocks <= self.forced:
            raise ValueError(f"blocks: expected more than the {self.forced} forced ones, got {self.blocks}")

    @property
    def forced(self) -> int:
        """Most forced blocks of a row: sink, the nearest past, and those that the row itself overlaps."""
        whole = self.block_m % self.block_n == 0 or self.block_n % self.block_m == 0  # rows do not straddle
        return SINK_BLOCKS + LOCAL_BLOCKS - 1 + -(-self.block_m // self.block_n) + (not whole)

    def like_a_model(self) -> "Lists":
        return replace(self, pattern="model-like")

    def shape(self) -> dict:
        """For a record."""
        facts = {"block_m": self.block_m, "block_n": self.block_n, "blocks": self.blocks, "lists": self.pattern}
        return facts if self.common is None else facts | {"classes": 2, "common": self.common}

    def draw(self, tokens: int, H: int, *, device: str, seed: int = 0) -> BlockSelection:
        """The lists of one sequence of `tokens` queries and keys, for H KV heads, each with its own draws.

        The same arguments give the same lists on the same kind of device.
        """
        row = torch.arange(-(-tokens // self.block_m), device=device)
        first_own = row * self.block_m // self.block_n
        last_own = ((row + 1) * self.block_m).clamp(max=tokens).sub(1) // self.block_n
        sink = torch.arange(SINK_BLOCKS, device=device).expand(len(row), -1)
        own = first_own[:, None] + torch.arange(self.forced - SINK_BLOCKS, device=device) - (LOCAL_BLOCKS - 1)
        own = own.masked_fill((own > last_own[:, None]) | (own < SINK_BLOCKS), _NONE)  # not twice
        forced = torch.cat([sink.masked_fill(sink > last_own[:, None], _NONE), own], 1)  # [rows, forced]

        each = self.blocks - self.forced  # drawn blocks of a list
        if self.common is None:
            classes, slots = 1, each
        else:
            shared = min(each, max(0, round(self.common * self.blocks) - self.forced))
            classes, slots = 2, 2 * each - shared
        drawn = self._drawn(row, first_own - (LOCAL_BLOCKS - 1), slots, H, seed)
        of_class = [drawn[..., :each]]
        if classes == 2:
            of_class.append(torch.cat([drawn[..., :shared], drawn[..., each:]], -1))
        lists = [torch.cat([forced.expand(H, -1, -1), own_draws], -1).int() for own_draws in of_class]
        indices = torch.stack(lists)[None].sort(-1).values  # [1, C, H, NM, NB]
        listed = indices != _NONE
        return BlockSelection(
            indices.masked_fill_(~listed, 0), listed.sum(-1, dtype=torch.int32), self.block_m, self.block_n
        )

    def _drawn(self, row, end, slots: int, H: int, seed: int) -> torch.Tensor:
        """`[H, rows, slots]`: the block of each slot, among those after the sink and before `end` of the row of its
        draw; _NONE where there is no such block.
        """
        stays = STAYS_FOR_ROWS[self.pattern]
        generator = torch.Generator(row.device).manual_seed(seed)
        slot = torch.arange(slots, device=row.device)
        draw = (row[:, None] + slot % stays) // stays  # [rows, slots], which of the slot's draws
        of_row = (draw * stays - slot % stays).clamp(min=0)  # the row where it was drawn
        most = (end[of_row] - SINK_BLOCKS - slot).clamp(min=0)
        choices = (most + slots - 1) // slots  # blocks that belong to the slot
        chance = torch.rand(H, len(row) // stays + 2, slots, device=row.device, generator=generator)
        chance = chance.gather(1, draw.expand(H, -1, -1))
        block = torch.minimum((chance * choices).long(), choices - 1) * slots + slot + SINK_BLOCKS
        return block.masked_fill_(choices == 0, _NONE)
