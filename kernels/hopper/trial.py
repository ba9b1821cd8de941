"""A small kernel that asks Gluon for what the real ones need: the copy engine, barriers, warps with jobs, products."""

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from .ring import describe_keys, fill, filled_tile, leave, new_ring
from .walk import Steps


@dataclass(frozen=True)
class _Form(Steps):
    D: int = 64
    BLOCK_N: int = 64
    PACKED: bool = True


@gluon.jit
def _produce(source, ring, form: gl.constexpr):
    KEYS: gl.constexpr = form.KEYS
    fill(ring, 0, source, (0, KEYS // 2), 0, 0, 0, KEYS, form)


@gluon.jit
def _consume(ring, gram, form: gl.constexpr):
    KEYS: gl.constexpr = form.KEYS
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    tile = filled_tile(ring, 0)
    acc = gl.zeros([KEYS, KEYS], gl.float32, LAYOUT)
    acc = warpgroup_mma(tile, tile.permute((1, 0)), acc, use_acc=False, is_async=True)
    acc = warpgroup_mma_wait(0, deps=(acc,))
    leave(ring, 0)
    rows = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
    gl.store(gram + rows[:, None] * KEYS + columns[None, :], acc)


@gluon.jit
def _trial_kernel(source, gram, form: gl.constexpr):
    ring = new_ring(1, 2, source.dtype, form)
    fence_async_shared()
    gl.warp_specialize([(_consume, (ring, gram, form)), (_produce, (source, ring, form))], [1], [24])


def compile_trial(device: torch.device) -> None:
    """Compiles x xᵀ of a block of keys for a device; raises whatever goes wrong."""
    form = _Form()
    x = torch.empty(1, form.KEYS, 1, form.D, dtype=torch.bfloat16, device=device)
    gram = torch.empty(form.KEYS, form.KEYS, device=device)
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        _trial_kernel.warmup(describe_keys(x, form.BLOCK_N, form.PACKED), gram, form, grid=(1,), num_warps=4)
