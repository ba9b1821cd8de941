"""`BlockSelection` as a value: what it refuses, and its views against its own dense mask."""

import pytest
import torch

from diffv2_sparse import BlockSelection, TopK, select_blocks
from tests.oracle import random_selection

SHAPES = [(2, 40, 40, 2, 16, 16), (1, 33, 75, 3, 1, 8), (2, 70, 131, 1, 16, 20), (1, 5, 200, 2, 128, 32)]


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize(("B", "T", "S", "H", "block_m", "block_n"), SHAPES)
def test_density_and_transpose_agree_with_the_mask(B, T, S, H, block_m, block_n, C, device):
    selection = random_selection(B, T, S, H, C=C, block_m=block_m, block_n=block_n, device=device)
    selection.validate(T, S)
    mask = selection.to_mask(T, S)
    visible = torch.arange(S - T + 1, S + 1, device=device)
    expected = (mask.sum(-1) / visible).mean()
    torch.testing.assert_close(selection.density(T, S), expected.float())

    offsets, rows = selection.transpose(S)
    for b, c, h in ((b, c, h) for b in range(B) for c in range(C) for h in range(H)):
        for block in range(-(-S // block_n)):
            a, z = offsets[b, c, h, block : block + 2].tolist()
            lists = zip(selection.indices[b, c, h].tolist(), selection.counts[b, c, h].tolist())
            expected = [row for row, (blocks, count) in enumerate(lists) if block in blocks[:count]]
            assert rows[b, c, h, a:z].tolist() == expected


def test_density_of_sequences_of_different_lengths():
    """A token before its sequence's first key does not count."""
    lengths = [20, 7, 2]
    selection = random_selection(3, 4, 20, 2, block_m=1, block_n=4)
    shares = []
    for b, h, t in ((b, h, t) for b in range(3) for h in range(2) for t in range(4)):
        blocks = selection.indices[b, 0, h, t][: selection.counts[b, 0, h, t]].tolist()
        visible = range(lengths[b] - 4 + t + 1)
        if visible:
            shares.append(sum(s // 4 in blocks for s in visible) / len(visible))
    expected = torch.tensor(sum(shares) / len(shares))
    torch.testing.assert_close(selection.density(4, torch.tensor(lengths)), expected)


def test_density_of_packed_sequences():
    q, k = torch.randn(1, 50, 4, 8), torch.randn(1, 90, 2, 8)
    cu_q, cu_k = torch.tensor([0, 20, 50]).int(), torch.tensor([0, 60, 90]).int()
    packed = {"cu_seqlens_q": cu_q, "cu_seqlens_k": cu_k}
    options = {"budget": TopK(5), "block_m": 8, "block_n": 4}
    whole = select_blocks(q, k, **options, **packed).density(50, 90, **packed)
    a = select_blocks(q[:, :20], k[:, :60], **options).density(20, 60)
    b = select_blocks(q[:, 20:], k[:, 60:], **options).density(30, 30)
    torch.testing.assert_close(whole, (20 * a + 30 * b) / 50)


@pytest.mark.parametrize("C", [1, 2])
@pytest.mark.parametrize(("T", "S", "block_m", "block_n"), [(64, 64, 16, 16), (50, 131, 16, 32), (40, 90, 128, 16)])
def test_block_mask_is_the_same_selection(T, S, block_m, block_n, C):
    B, H, G = 2, 2, 4
    selection = random_selection(B, T, S, H, C=C, block_m=block_m, block_n=block_n)
    block_mask = selection.to_block_mask(T, S, H * G)
    mask = selection.to_mask(T, S)
    q, key = torch.arange(T)[:, None], torch.arange(S)
    causal = block_mask.mask_mod(0, 0, q, key)
    NM, NN = -(-T // block_m), -(-S // block_n)
    for b in range(B):
        for head in range(H * G):
            seen = torch.zeros(NM * block_m, NN * block_n, dtype=torch.bool)
            lists = (
                (block_mask.kv_num_blocks, block_mask.kv_indices, False),
                (block_mask.full_kv_num_blocks, block_mask.full_kv_indices, True),
            )
            for counts, indices, full in lists:
                for row in range(NM):
                    for block in indices[b, head, row, : counts[b, head, row]].tolist():
                        tile = slice(row * block_m, (row + 1) * block_m), slice(block * block_n, (block + 1) * block_n)
                        assert not seen[tile].any(), "a block is listed twice"
                        seen[tile] = True
                        if full:
                            assert causal[tile].all(), "a block that causality cuts was called full"
            assert torch.equal(seen[:T, :S] & causal, mask[b, head % C, head // G])


def test_block_mask_refuses():
    selection = random_selection(1, 32, 32, 2, block_m=8)
    with pytest.raises(ValueError, match="block_m: FlexAttention needs at least 16"):
        selection.to_block_mask(32, 32, 4)
    with pytest.raises(ValueError, match="HQ: expected a multiple"):
        random_selection(1, 32, 32, 2, C=2).to_block_mask(32, 32, 6)


def test_views_refuse_other_lengths():
    selection = random_selection(1, 32, 32, 2)
    for view in (selection.density, selection.to_mask, lambda T, S: selection.to_block_mask(T, S, 4)):
        with pytest.raises(ValueError, match="selection: expected"):
            view(48, 48)
        with pytest.raises(ValueError, match="T: expected at most S = 31"):
            view(32, 31)


INDICES, COUNTS = torch.zeros(1, 1, 2, 4, 3, dtype=torch.int32), torch.zeros(1, 1, 2, 4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((INDICES[0], COUNTS, 16, 16), "indices: expected"),
        ((INDICES.expand(1, 3, 2, 4, 3), COUNTS.expand(1, 3, 2, 4), 16, 16), "one or two classes"),
        ((INDICES, COUNTS[..., :3], 16, 16), "counts: expected shape"),
        ((INDICES.long(), COUNTS, 16, 16), "indices: expected int32"),
        ((INDICES, COUNTS.float(), 16, 16), "counts: expected int32"),
        ((INDICES[..., :0], COUNTS, 16, 16), "no empty dimension"),
        ((INDICES, COUNTS, 0, 16), "block_m: expected a positive int"),
        ((INDICES, COUNTS, 16, 1.5), "block_n: expected a positive int"),
    ],
)
def test_refused_when_built(arguments, message):
    with pytest.raises(ValueError, match=message):
        BlockSelection(*arguments)


@pytest.mark.parametrize(
    ("indices", "count", "message"),
    [
        ([0, 1, 2], 4, "counts: expected 0 … NB"),
        ([0, 1, 2], -1, "counts: expected 0 … NB"),
        ([0, 2, 1], 3, "must ascend"),
        ([0, 1, 1], 3, "must ascend"),
        ([0, 1, 4], 3, "outside the keys"),
        ([-1, 1, 2], 3, "outside the keys"),
    ],
)
def test_validate_refuses(indices, count, message):
    indices = torch.tensor(indices, dtype=torch.int32).expand(1, 1, 2, 4, 3).contiguous()
    selection = BlockSelection(indices, torch.full((1, 1, 2, 4), count, dtype=torch.int32), 16, 16)
    with pytest.raises(ValueError, match=message):
        selection.validate(64, 64)
    with pytest.raises(ValueError, match="expected 3 rows"):
        selection.validate(48, 64)
