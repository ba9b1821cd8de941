"""Which key blocks each row of queries attends to, as a value.

Keys are cut into blocks of `block_n`, queries into rows of `block_m` tokens counted from the call's first query. A
whole GQA group shares its lists: one list for both classes (C = 1), or one for the signal heads and one for the noise
heads (C = 2). Everything here is bookkeeping in plain torch; choosing the blocks is `selectors.py`, attending to them
`blockwise.py` and the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class QueryRows:
    """Where every row of queries stands, over the tokens of all sequences laid end to end. Each field is int64
    `[R]`.
    """

    sequence: Tensor  # which sequence the row belongs to
    token: Tensor  # its first token, counted over all sequences
    tokens: Tensor  # how many tokens it has: block_m, or fewer at a sequence's end
    position: Tensor  # the key position of its first token, within its own sequence

    def __getitem__(self, rows: slice) -> QueryRows:
        return QueryRows(self.sequence[rows], self.token[rows], self.tokens[rows], self.position[rows])

    def __len__(self) -> int:
        return self.token.shape[0]


def query_rows(
    B: int,
    T: int,
    key_tokens: int | Tensor,
    block_m: int,
    *,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    device: torch.device | str | None = None,
) -> QueryRows:
    """Cuts the queries of each sequence into rows.

    Args:
        B, T: batch and query tokens; with `cu_seqlens_*` (int32 `[N + 1]`) they are 1 and the sum over the sequences.
        key_tokens: S for all, or an integer tensor `[B]`. Query t stands at key position S − T + t.
        block_m: tokens per row.
    """
    if cu_seqlens_q is not None:
        starts = cu_seqlens_q.long()
        query_tokens = starts.diff()
        key_tokens = cu_seqlens_k.long().diff()
        rows = -(-query_tokens // block_m)
        R = int(rows.sum())
        sequence = torch.repeat_interleave(torch.arange(len(rows), device=starts.device), rows, output_size=R)
        row = torch.arange(R, device=starts.device) - (rows.cumsum(0) - rows)[sequence]
        starts, query_tokens, key_tokens = starts[sequence], query_tokens[sequence], key_tokens[sequence]
    else:
        NM = -(-T // block_m)
        sequence = torch.arange(B, device=device).repeat_interleave(NM)
        row = torch.arange(NM, device=device).repeat(B)
        starts, query_tokens = sequence * T, T
        if isinstance(key_tokens, Tensor):
            key_tokens = key_tokens.long()[sequence]
    first = row * block_m
    tokens = (query_tokens - first).clamp(max=block_m)
    return QueryRows(sequence, starts + first, tokens, key_tokens - query_tokens + first)


def check_cu_seqlens(
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    B: int,
    T: int,
    S: int | None,
    device: torch.device,
) -> bool:
    """Whether the call is packed. On a CPU the bounds are read and checked too; S None leaves the last key bound open.

    Raises:
        ValueError: only one of the two is given, they are no int32 `[N + 1]`, B is not 1, or the bounds do not fit T,
            S and causality.
    """
    if cu_seqlens_q is None and cu_seqlens_k is None:
        return False
    if cu_seqlens_q is None or cu_seqlens_k is None:
        raise ValueError("cu_seqlens_q, cu_seqlens_k: expected both or neither")
    for name, bounds in (("cu_seqlens_q", cu_seqlens_q), ("cu_seqlens_k", cu_seqlens_k)):
        if bounds.ndim != 1 or bounds.dtype != torch.int32 or bounds.shape[0] < 2:
            raise ValueError(f"{name}: expected int32 [sequences + 1], got {bounds.dtype} {tuple(bounds.shape)}")
        if bounds.device != device:
            raise ValueError(f"{name}: expected on {device} like q, got {bounds.device}")
    if cu_seqlens_q.shape != cu_seqlens_k.shape:
        raise ValueError(
            f"cu_seqlens_k: expected {cu_seqlens_q.shape[0]} bounds like cu_seqlens_q, got {len(cu_seqlens_k)}"
        )
    if B != 1:
        raise ValueError(f"q: expected batch 1 for packed sequences, got {B}")
    if cu_seqlens_q.device.type == "cpu":
        for name, bounds, last in (("cu_seqlens_q", cu_seqlens_q, T), ("cu_seqlens_k", cu_seqlens_k, S)):
            if bounds[0] != 0 or bool((bounds.diff() < 0).any()) or last not in (None, int(bounds[-1])):
                raise ValueError(f"{name}: expected bounds that rise from 0 to {last}, got {bounds.tolist()}")
        if bool((cu_seqlens_q.diff() > cu_seqlens_k.diff()).any()):
            raise ValueError("cu_seqlens_q: a sequence has more queries than keys, which causality does not allow")
    return True


@dataclass(frozen=True)
class BlockSelection:
    """Selected key blocks per (batch, class, GQA group, row).

    Attributes:
        indices: int32 `[B, C, H, NM, NB]`, ascending, packed left, no repeats; entries past `counts` are ignored.
        counts: int32 `[B, C, H, NM]`, how many entries are valid.
        block_m: tokens per row of queries.
        block_n: tokens per key block.

    C = 1: signal and noise heads share the list. C = 2: class 0 is signal, class 1 is noise. For packed sequences B =
    1, the rows of all sequences are concatenated (NM = Σ⌈T_b / block_m⌉; or more, with empty lists behind, where that
    number is not known on the host), and indices count from the start of their own sequence.

    Raises:
        ValueError: the shapes, dtypes or devices of the two tensors do not fit each other.
    """

    indices: Tensor
    counts: Tensor
    block_m: int
    block_n: int

    def __post_init__(self):
        if self.indices.ndim != 5:
            raise ValueError(f"indices: expected [B, C, H, NM, NB], got shape {tuple(self.indices.shape)}")
        if self.counts.shape != self.indices.shape[:-1]:
            raise ValueError(f"counts: expected shape {tuple(self.indices.shape[:-1])}, got {tuple(self.counts.shape)}")
        if 0 in self.indices.shape:
            raise ValueError(f"indices: expected no empty dimension, got shape {tuple(self.indices.shape)}")
        if self.indices.shape[1] not in (1, 2):
            raise ValueError(f"indices: expected one or two classes in dimension 1, got {self.indices.shape[1]}")
        for name in ("indices", "counts"):
            if getattr(self, name).dtype != torch.int32:
                raise ValueError(f"{name}: expected int32, got {getattr(self, name).dtype}")
        if self.indices.device != self.counts.device:
            raise ValueError(f"counts: expected on {self.indices.device} like indices, got {self.counts.device}")
        for name in ("block_m", "block_n"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(f"{name}: expected a positive int, got {getattr(self, name)!r}")

    @property
    def num_classes(self) -> int:
        return self.indices.shape[1]

    def by_row(self) -> tuple[Tensor, Tensor]:
        """The lists with the rows of all sequences in one dimension: indices `[C, H, R, NB]`, counts `[C, H, R]`."""
        return self.indices.permute(1, 2, 0, 3, 4).flatten(2, 3), self.counts.permute(1, 2, 0, 3).flatten(2, 3)

    def check_rows(self, B: int, T: int, H: int, cu_seqlens_q: Tensor | None = None) -> None:
        """Raises ValueError unless the lists cover B sequences of T queries over H KV heads. Reads shapes only."""
        if cu_seqlens_q is None:
            rows, said = -(-T // self.block_m), f"⌈{T} / block_m {self.block_m}⌉"
        elif self.block_m == 1:
            rows, said = T, f"one row for each of {T} packed tokens"
        else:  # the exact number is in device memory; the bounds are not
            sequences = cu_seqlens_q.shape[0] - 1
            least, most = -(-T // self.block_m), T // self.block_m + sequences
            got = self.indices.shape[3]
            rows, said = (got if least <= got <= most else least), f"between {least} and {most}"
        expected, got = (B, H, rows), tuple(self.indices.shape[i] for i in (0, 2, 3))
        if got != expected:
            raise ValueError(f"selection: expected (B, H, NM) = {expected} (NM: {said}), got {got}")

    def _check_lengths(self, T: int, S: int | Tensor, cu_seqlens_q: Tensor | None = None) -> None:
        self.check_rows(self.indices.shape[0], T, self.indices.shape[2], cu_seqlens_q)
        if not isinstance(S, Tensor) and T > S:
            raise ValueError(f"T: expected at most S = {S}, got {T}")

    def validate(
        self, T: int, S: int, *, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
    ) -> None:
        """Checks the contents; for hand-built lists. Reads the tensors, so it waits for the device.

        Raises:
            ValueError: a wrong number of rows, counts outside 0 … NB, or listed blocks that do not ascend or do not
                exist.
        """
        B, _, H, NM, NB = self.indices.shape
        if T > S:
            raise ValueError(f"T: expected at most S = {S}, got {T}")
        layout = query_rows(
            B, T, S, self.block_m, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, device=self.indices.device
        )
        behind = B * NM - len(layout)
        if behind < 0 or (behind and cu_seqlens_q is None) or bool(self.counts[:, :, :, NM - behind :].any()):
            raise ValueError(f"selection: expected {len(layout)} rows of block_m {self.block_m} in all, got {B * NM}")
        if bool(((self.counts < 0) | (self.counts > NB)).any()):
            raise ValueError(f"counts: expected 0 … NB = {NB}, got {int(self.counts.min())} … {int(self.counts.max())}")
        if cu_seqlens_k is None:
            blocks = torch.full((1, 1, 1, 1, 1), -(-S // self.block_n), device=self.indices.device)
        else:
            key_tokens = torch.nn.functional.pad(cu_seqlens_k.long().diff()[layout.sequence], (0, behind))
            blocks = (-(-key_tokens // self.block_n)).view(1, 1, 1, NM, 1)
        listed = torch.arange(NB, device=self.indices.device) < self.counts[..., None]
        if bool((listed & ((self.indices < 0) | (self.indices >= blocks))).any()):
            raise ValueError(f"indices: a listed block lies outside the keys (block_n {self.block_n}, S {S})")
        if bool((listed[..., 1:] & (self.indices[..., 1:] <= self.indices[..., :-1])).any()):
            raise ValueError("indices: listed blocks must ascend without repeats")

    def density(
        self, T: int, S: int | Tensor, *, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
    ) -> Tensor:
        """Selected visible keys over causally visible keys, the mean over query tokens, groups and classes.

        Args:
            T, S: query and key tokens; S may be an integer tensor `[B]`, keys of each sequence. Tokens that stand
                before their sequence's first key do not count.
            cu_seqlens_q, cu_seqlens_k: bounds of packed sequences.

        Returns:
            A float32 scalar tensor.
        """
        self._check_lengths(T, S, cu_seqlens_q)
        bounds = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k}
        rows = query_rows(self.indices.shape[0], T, S, self.block_m, **bounds, device=self.indices.device)
        indices, counts = (x[:, :, : len(rows)] for x in self.by_row())
        listed = torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]  # [C, H, R, NB]
        starts = torch.where(listed, indices.long() * self.block_n, torch.iinfo(torch.int64).max // 2)
        total, tokens = torch.zeros((), device=indices.device), torch.zeros((), device=indices.device)
        for t in range(self.block_m):
            visible = rows.position + t + 1  # [R]
            real = (t < rows.tokens) & (visible > 0)
            selected = (visible[:, None] - starts).clamp(0, self.block_n).sum(-1)  # [C, H, R]
            total += torch.where(real, selected / visible.clamp(min=1), 0.0).float().sum()
            tokens += real.sum()
        return total / (tokens * counts.shape[0] * counts.shape[1])

    def to_mask(self, T: int, S: int) -> Tensor:
        """Which keys each token sees, causality included: bool `[B, C, H, T, S]`. For tests and pictures."""
        self._check_lengths(T, S)
        B, C, H, NM, NB = self.indices.shape
        NN = -(-S // self.block_n)
        listed = torch.arange(NB, device=self.indices.device) < self.counts[..., None]
        listed &= (self.indices >= 0) & (self.indices < NN)
        blocks = torch.zeros(B, C, H, NM, NN + 1, dtype=torch.bool, device=self.indices.device)
        blocks.scatter_(-1, torch.where(listed, self.indices, NN).long(), True)
        blocks = blocks[..., :NN].repeat_interleave(self.block_m, 3)[..., :T, :]
        causal = torch.ones(T, S, dtype=torch.bool, device=self.indices.device).tril(S - T)
        return blocks.repeat_interleave(self.block_n, 4)[..., :S] & causal

    def to_block_mask(self, T: int, S: int, HQ: int):
        """The same selection for FlexAttention: heads expanded, lists padded to all key blocks, fully visible blocks
        passed as full.

        Returns:
            torch.nn.attention.flex_attention.BlockMask for B sequences, HQ query heads.

        Raises:
            ValueError: block_m < 16, which FlexAttention's kernels do not take, or HQ that does not fit the lists.
        """
        from torch.nn.attention.flex_attention import BlockMask

        B, C, H, NM, NB = self.indices.shape
        if self.block_m < 16:
            raise ValueError(f"block_m: FlexAttention needs at least 16 tokens per row, got {self.block_m}")
        self._check_lengths(T, S)
        if HQ % (C * H):
            raise ValueError(f"HQ: expected a multiple of {C * H} (classes × KV heads), got {HQ}")
        rows = query_rows(1, T, S, self.block_m, device=self.indices.device)
        starts = self.indices.long() * self.block_n
        listed = torch.arange(NB, device=self.indices.device) < self.counts[..., None]
        listed &= (starts >= 0) & (starts <= (rows.position + rows.tokens - 1)[:, None])
        full = listed & (starts + self.block_n - 1 <= rows.position[:, None])

        def packed(keep: Tensor) -> tuple[Tensor, Tensor]:
            order = torch.argsort((~keep).int(), dim=-1, stable=True)
            lists = torch.nn.functional.pad(self.indices.gather(-1, order), (0, max(0, -(-S // self.block_n) - NB)))
            counts = keep.sum(-1, dtype=torch.int32)
            by_head = [x.movedim(1, 2).repeat_interleave(HQ // (C * H), 1) for x in (counts, lists)]
            # [B, H·G/C, C, …]: heads 2p and 2p + 1 are class 0 and 1
            return tuple(x.flatten(1, 2).contiguous() for x in by_head)

        def causal(b, h, q, k):
            return k <= q + (S - T)

        return BlockMask.from_kv_blocks(
            *packed(listed & ~full),
            *packed(full),
            BLOCK_SIZE=(self.block_m, self.block_n),
            mask_mod=causal,
            seq_lengths=(T, S),
        )

    def transpose(self, S: int) -> tuple[Tensor, Tensor]:
        """Key block → the rows that selected it, in CSR form; for the backward. Nothing is read on the host.

        Returns:
            offsets: int32 `[B, C, H, NN + 1]`, where each key block's rows begin; NN = ⌈S / block_n⌉.
            rows: int32 `[B, C, H, NM · NB]`, row numbers, ascending within a block; entries past `offsets[..., -1]`
                are padding.
        """
        _, _, _, NM, NB = self.indices.shape
        NN = -(-S // self.block_n)
        listed = torch.arange(NB, device=self.indices.device) < self.counts[..., None]
        listed &= (self.indices >= 0) & (self.indices < NN)
        block = torch.where(listed, self.indices, NN).flatten(-2)  # [B, C, H, NM·NB]
        order = torch.argsort(block, dim=-1, stable=True)
        counts = torch.zeros(*block.shape[:-1], NN + 1, dtype=torch.int32, device=block.device)
        counts.scatter_add_(-1, block.long(), torch.ones_like(block))
        offsets = torch.nn.functional.pad(counts[..., :NN].cumsum(-1, dtype=torch.int32), (1, 0))
        return offsets, (order // NB).int()
