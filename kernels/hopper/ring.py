"""Rings of key tiles in shared memory, filled by the copy engine (TMA).

A ring has STAGES tiles `[KEYS, D]`, each behind two barriers: `filled`, which the copies complete, and `free`, at which
every reader arrives when it is done with the tile. Use i of a ring takes stage i % STAGES, and in the barriers' phase
of i // STAGES.

The engine returns zeros outside the tensor. Packed sequences end inside it, and what follows may hold anything, also
NaN, which no weight of 0 takes back. So their rows are counted towards a BOUND of 2³⁰, at which every sequence ends:
its row r of L is row BOUND − L + r. Two more dimensions set the address right. One steps a row at a time, to the
sequence's end; the other, taken BOUND times, adds 2⁶⁴ elements, which is nothing, less BOUND rows. The trick is that of
triton's tools/ragged_tma.py.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..primitives import describable

BOUND = gl.constexpr(1 << 30)


class Ring(NamedTuple):
    tiles: gl.shared_memory_descriptor
    filled: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor


def describe_keys(x: Tensor, keys: int, packed: bool) -> TensorDescriptor:
    """Runs of so many keys of one head of x `[B, S, H, D]`, as `fill` takes them."""
    if not describable(90, x) or 0 in x.stride():
        x = x.clone(memory_format=torch.contiguous_format)
    shape, strides, box = list(x.shape), list(x.stride()), [1, keys, 1, x.shape[3]]
    if packed:
        _, row, head, _ = strides
        shape = [2**31 - 1, 2**31 - 1, BOUND.value, *shape[2:]]
        strides = [2**34 - row, row, row, head, 1]
        box = [1, *box]
    return TensorDescriptor(x, shape, strides, box, gl.NVMMASharedLayout(128, 16, len(box)))


@gluon.jit
def new_ring(readers: gl.constexpr, STAGES: gl.constexpr, dtype: gl.constexpr, form: gl.constexpr):
    tiles = gl.allocate_shared_memory(dtype, [STAGES, form.KEYS, form.D], gl.NVMMASharedLayout(128, 16, 2))
    filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(filled.index(stage), count=1)
        mbarrier.init(free.index(stage), count=readers)
    return Ring(tiles, filled, free)


@gluon.jit
def fill(ring, i, source, starts, i_b, i_h, k0, Sk, form: gl.constexpr):
    """Use i: once the readers of the last use have left, starts to copy the parts that begin at `starts`."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    PER: gl.constexpr = form.PER
    PART: gl.constexpr = form.KEYS // PER
    stage = i % STAGES
    mbarrier.wait(ring.free.index(stage), (i // STAGES & 1) ^ 1)
    filled = ring.filled.index(stage)
    mbarrier.expect(filled, form.KEYS * form.D * 2)
    for part in gl.static_range(PER):
        if form.PACKED:
            at = [BOUND, k0 + Sk, BOUND - Sk + starts[part], i_h, 0]
            tile = ring.tiles.index(stage).reshape([1, 1, form.KEYS, 1, form.D])
            copied = tile.slice(part * PART, PART, dim=2)
        else:
            at = [i_b, starts[part], i_h, 0]
            tile = ring.tiles.index(stage).reshape([1, form.KEYS, 1, form.D])
            copied = tile.slice(part * PART, PART, dim=1)
        tma.async_copy_global_to_shared(source, at, filled, copied)


@gluon.jit
def filled_tile(ring, i):
    """The tile of use i, once it is there."""
    STAGES: gl.constexpr = ring.tiles.shape[0]
    mbarrier.wait(ring.filled.index(i % STAGES), i // STAGES & 1)
    return ring.tiles.index(i % STAGES)


@gluon.jit
def leave(ring, i):
    """This reader is done with use i."""
    mbarrier.arrive(ring.free.index(i % ring.tiles.shape[0]), count=1)
