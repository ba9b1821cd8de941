"""What a model needs of its cache: sizes, and the state that its self-decoder carries from token to token.

Slots are filled round and round, so that going back by up to `max_rollback` tokens needs no copying: what was there
before them is still there.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class WindowState(NamedTuple):
    """The last keys and values of a self-decoder layer, `[B, H, window + max_rollback, D]`; position s is in slot `s %
    (window + max_rollback)`.
    """

    k: Tensor
    v: Tensor


class RetentionState(NamedTuple):
    """What a layer of gated retention remembers, float32 `[B, 1 + max_rollback, heads, D, D]`: after n tokens it is in
    slot `n % (1 + max_rollback)`.
    """

    memory: Tensor


class RowLists(NamedTuple):
    """Lists of key blocks, one per row: indices int32 `[rows, C, H, NB]`, counts int32 `[rows, C, H]`."""

    indices: Tensor
    counts: Tensor


SelfState = WindowState | RetentionState


@dataclass(frozen=True)
class CacheSpec:
    """What a model needs of its cache, and which model that is.

    Attributes:
        self_decoder: "sliding_window" or "gated_retention".
        window: tokens a query of the self-decoder sees.
        self_layers, cross_layers: layers of each half.
        heads: retention heads.
        kv_heads, head_dim: of the shared K/V and of the rings.
        position: how the keys carry their position, such as "rope 10000.0".
        block_n: tokens per page.
        dtype, device: of keys and values.
        owner: the model that made the cache, by identity: moved it is the same, a copy of it is another. None after
            pickling: then only the sizes can be compared.
    """

    self_decoder: str
    window: int
    self_layers: int
    cross_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    position: str
    block_n: int
    dtype: torch.dtype
    device: torch.device
    owner: weakref.ref | None = None

    def __deepcopy__(self, memo: dict) -> CacheSpec:
        return self  # nothing in it changes, and the copy of a cache belongs to the same model

    def __getstate__(self) -> dict:
        return {**vars(self), "owner": None}  # no identity outlives the process

    def empty_state(self, batch_size: int, max_rollback: int) -> SelfState:
        """A layer's state before the first token."""
        B, D = batch_size, self.head_dim
        if self.self_decoder == "gated_retention":
            wide = torch.promote_types(self.dtype, torch.float32)
            return RetentionState(torch.zeros(B, 1 + max_rollback, self.heads, D, D, dtype=wide, device=self.device))
        shape = (B, self.kv_heads, self.window + max_rollback, D)
        return WindowState(*(torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(2)))
