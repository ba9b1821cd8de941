"""Tile sizes: a plain function of head size, dtype, architecture and phase, no autotuner.

A query tile has ROWS = tokens × heads of one GQA group, so that the tensor cores' rows are full even where few tokens
share a list of key blocks; a key tile is at most one key block.
"""

from typing import NamedTuple

import torch

RESIDENT = 3  # decode programs that a multiprocessor runs at once
MOST_SPLITS = 128  # of the keys, in decoding
MOST_ROWS = 16  # of a selection in one list: their bits, for two classes, fit an int32


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


class Tile(NamedTuple):
    rows: int  # query vectors
    keys: int
    warps: int
    stages: int


def tile_sizes(head_dim: int, dtype: torch.dtype, arch: int, phase: str) -> Tile:
    """Largest tile of a kernel.

    Args:
        arch: compute capability, 90 for Hopper; 0 for the interpreter.
        phase: "forward", "dq" (K and V through Hopper's copy engine), the same with "_pointers", "dkv", "decode";
            "…_union" for lists of several rows; "score" and "logits" for the choice of blocks, whose keys are
            summaries. In the backward, rows count pairs of heads.
    """
    if arch == 0:
        return Tile(64, 64, 4, 1)
    if dtype.itemsize > 2:  # no tensor cores: float32 is for tests
        return Tile(16 if phase.startswith("d") else 32, 32 if head_dim <= 64 else 16, 4, 1)
    size = 0 if head_dim <= 64 else 1 if head_dim <= 128 else 2
    return (_HOPPER if arch >= 90 else _AMPERE)[phase][size]


# For head sizes up to 64, 128, 256; chosen so that the compiled kernels barely spill. On Hopper two programs share a
# multiprocessor where registers allow: one's softmax hides behind the other's products.
_HOPPER = {
    "forward": (Tile(128, 64, 4, 3), Tile(128, 64, 4, 2), Tile(128, 64, 8, 2)),
    "forward_union": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    "forward_pointers": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(128, 64, 8, 2)),
    "forward_pointers_union": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 3), Tile(64, 64, 4, 2)),
    "dq": (Tile(64, 64, 4, 3), Tile(64, 64, 4, 2), Tile(128, 32, 8, 1)),
    "dq_union": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 3), Tile(64, 32, 4, 1)),
    "dq_pointers": (Tile(64, 64, 4, 2), Tile(128, 64, 8, 2), Tile(128, 32, 8, 1)),
    "dq_pointers_union": (Tile(64, 64, 4, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 1)),
    "dkv": (Tile(32, 64, 4, 2), Tile(32, 64, 4, 2), Tile(32, 64, 4, 2)),
    "score": (Tile(128, 64, 4, 3), Tile(128, 64, 4, 3), Tile(128, 64, 8, 2)),
    "logits": (Tile(128, 64, 4, 4), Tile(128, 64, 4, 4), Tile(128, 64, 8, 2)),
    "decode": (Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 3)),
}
_AMPERE = {
    "forward_pointers": (Tile(128, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    "forward_pointers_union": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 1)),
    "dq_pointers": (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1)),
    "dq_pointers_union": (Tile(64, 32, 4, 2), Tile(32, 32, 4, 2), Tile(32, 32, 4, 1)),
    "dkv": (Tile(32, 64, 4, 2), Tile(32, 32, 4, 2), Tile(16, 32, 4, 1)),
    "decode": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(32, 32, 4, 2)),
    "score": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
    "logits": (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2), Tile(64, 32, 4, 2)),
}


class LinearTile(NamedTuple):
    columns: int  # of the output
    depth: int  # of the sums, at a time
    warps: int


def linear_tile(arch: int, gated: bool = False) -> LinearTile:
    """The tile of a linear layer for few tokens; `gated` ones read two weights."""
    if arch == 0:
        return LinearTile(16, 32, 4)
    return LinearTile(16, 256, 4) if gated else LinearTile(4, 1024, 4)


class Packing(NamedTuple):
    """Tokens and heads of a query tile; all but the last are powers of two."""

    heads: int  # of one group; padding where the group is no power of two
    tokens: int
    chunks: int  # tiles that share the heads of a group
    rows: int  # of the selection, in one list


def query_tile(
    phase: str, group: int, block_m: int, head_dim: int, dtype: torch.dtype, arch: int
) -> tuple[Tile, Packing]:
    """The tile of a kernel that goes by query rows, and how `group` heads (or pairs of heads) fill it.

    Several short rows of a selection share a tile where one alone would leave it too empty; then each walks the union
    of their lists.
    """
    tile, union = (tile_sizes(head_dim, dtype, arch, p) for p in (phase, phase + "_union"))
    heads = min(next_power_of_2(group), tile.rows)
    tokens = min(tile.rows // heads, next_power_of_2(block_m))
    rows = 1
    if tokens * heads < union.rows:
        tile = union
        heads = min(heads, tile.rows)
        rows = max(1, min(tile.rows // heads // block_m, MOST_ROWS))
        tokens = next_power_of_2(rows * block_m)
    return tile, Packing(heads, max(tokens, 16 // heads), cdiv(group, heads), rows)


def fixed_packing(rows: int, group: int, block_m: int) -> Packing:
    """How `group` heads fill a tile that always has `rows` query vectors."""
    heads = min(next_power_of_2(group), rows)
    tokens = rows // heads
    return Packing(heads, tokens, cdiv(group, heads), max(1, min(tokens // block_m, MOST_ROWS)))


def fills_a_tile(phase: str, group: int, block_m: int, head_dim: int, dtype: torch.dtype, arch: int) -> bool:
    """Whether one row of a selection has enough tokens × heads to walk its list alone."""
    return block_m * next_power_of_2(group) >= tile_sizes(head_dim, dtype, arch, phase + "_union").rows


def decode_tile(row_tokens: int, heads: int, head_dim: int, dtype: torch.dtype, arch: int) -> tuple[Tile, int, int]:
    """The tile of a decode program, and the heads and tokens that fill its rows; both are powers of two.

    Args:
        row_tokens: query tokens that share a list.
        heads: of one group and class.
    """
    most = tile_sizes(head_dim, dtype, arch, "decode")
    heads = min(next_power_of_2(heads), most.rows)
    tokens = max(min(next_power_of_2(row_tokens), most.rows // heads), 16 // heads)
    rows = tokens * heads
    return Tile(rows, most.keys, most.warps if rows == most.rows else 4, most.stages), heads, tokens


def splits_of(programs: int, steps: int, processors: int) -> int:
    """How many programs share a walk of at most `steps` key tiles, where `programs` walks are to fill the GPU."""
    splits = max(1, min(RESIDENT * processors // programs, steps, MOST_SPLITS))
    return cdiv(steps, cdiv(steps, splits))


def merge_tile(splits: int, head_dim: int) -> tuple[int, int, int]:
    """Of a program that merges splits: their number as a power of two, dimensions, warps."""
    splits = next_power_of_2(splits)
    return splits, max(16, min(next_power_of_2(head_dim), 32, 4096 // splits)), 4


def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU; without one, enough that the interpreter splits, too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def arch_of(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def key_tile(most: int, block_n: int) -> tuple[int, int, int]:
    """Keys of a tile, how many tiles walk one key block, and how many key blocks share one tile."""
    if block_n < most and most % block_n == 0:
        return most, 1, most // block_n
    keys = max(16, min(most, next_power_of_2(block_n)))
    return keys, cdiv(block_n, keys), 1
