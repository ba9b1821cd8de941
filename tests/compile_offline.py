"""Compiles the kernels for a GPU that is not there: `python -m tests.compile_offline 90`, one line per case.

The real launchers run on CPU tensors with a driver that names a target but launches nothing, so every kernel is built
with just the arguments and constants of that call, down to machine code. The interpreter cannot tell that a kernel
compiles: it knows no types of loop-carried variables, no shared memory, no layouts.
"""

import math
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from diffv2_sparse import TopK, ops, select_blocks
from diffv2_sparse.kernels import tiles
from tests.oracle import qkv, random_selection

CASES = {  # T, HQ, H, D, differential, options
    "rows of 128": (256, 16, 2, 128, True, {"block_m": 128, "block_n": 128}),
    "rows of 64, per class": (256, 8, 2, 64, True, {"block_m": 64, "block_n": 64, "mode": "per_class"}),
    "rows of one token": (64, 16, 2, 128, True, {"block_m": 1, "block_n": 16}),
    "ordinary, rows of 16": (64, 3, 1, 96, False, {"block_m": 16, "block_n": 16, "mode": "per_head"}),
    "window": (64, 8, 2, 64, True, None),
}
PAGED_CASES = {  # T, HQ, H, D, differential, page size, lists: classes and tokens per row
    "decode, one token": (1, 16, 2, 128, True, 64, (1, 1)),
    "decode, per class, small pages": (4, 16, 2, 64, True, 16, (2, 1)),
    "decode, dense, many rows": (16, 8, 1, 128, True, 128, None),
    "decode, ordinary": (3, 3, 1, 96, False, 48, (1, 2)),
}
CHOICES = {  # B, T, NC, HQ, H, D, block_m, block_n, mode, budgets, lengths on the device
    "choice for rows of 64": (1, 4096, 64, 16, 2, 128, 64, 64, "pair_mean", [(32, math.inf)], False),
    "choice for each token, per class": (1, 2048, 300, 8, 2, 64, 1, 16, "per_class", [(9, 0.9), (8, math.inf)], False),
    "choice for long rows of any heads": (1, 9000, 30, 3, 1, 96, 300, 300, "per_head", [(20, 0.5)], False),
    "choice in decoding": (4, 1, 16384, 64, 8, 128, 1, 64, "pair_mean", [(64, math.inf)], True),
    "choice beyond the registers": (1, 8, 20000, 8, 2, 256, 4, 64, "pair_mean", [(64, 0.5)], True),
}


class NamedTarget:
    """As much of a driver as compilation asks for."""

    def __init__(self, arch: int):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_decode(T, HQ, H, D, differential, block_n, lists) -> None:
    q, _, _, lam = qkv(2, T, T, HQ, H, D, dtype=torch.bfloat16, differential=differential)
    pages = torch.zeros(32 * H, block_n, D, dtype=torch.bfloat16)
    table, lengths = torch.zeros(2, H, 16, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    selection = None
    if lists is not None:
        C, block_m = lists
        selection = random_selection(2, T, 16 * block_n, H, C=C, NB=8, block_m=block_m, block_n=block_n)
    ops.triton_paged(q, pages, pages, table, lengths, lam, selection, scale=D**-0.5)


def compile_all(arch: int) -> None:
    triton.runtime.driver.set_active(NamedTarget(arch))
    tiles_of = tiles.arch_of
    for module in [m for name, m in sys.modules.items() if name.startswith("diffv2_sparse.kernels")]:
        if getattr(module, "arch_of", None) is tiles_of:
            module.arch_of = lambda device: arch
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: kernel.warmup(*args, grid=grid, **kwargs)
    for name, (T, HQ, H, D, differential, options) in CASES.items():
        q, k, v = (torch.randn(1, T, h, D, dtype=torch.bfloat16, requires_grad=True) for h in (HQ, H, H))
        lam = torch.randn(1, T, HQ // 2, dtype=torch.bfloat16, requires_grad=True) if differential else None
        selection = None if options is None else select_blocks(q, k, budget=TopK(4), local_blocks=1, **options)
        window = 16 if options is None else None
        call = {"scale": D**-0.5, "window": window, "cu_seqlens_q": None, "cu_seqlens_k": None}
        o, _ = ops.triton_attention(q, k, v, lam, selection, **call)
        o.backward(torch.zeros_like(o))
        print(name, flush=True)
    for name, case in PAGED_CASES.items():
        compile_decode(*case)
        print(name, flush=True)
    for name, (B, T, NC, HQ, H, D, block_m, block_n, mode, budgets, ragged) in CHOICES.items():
        q, k = torch.zeros(B, T, HQ, D, dtype=torch.bfloat16), torch.zeros(1, 2 * block_n, H, D, dtype=torch.bfloat16)
        ops.triton_summaries(k, block_n, None if ragged else torch.tensor([0, 2 * block_n], dtype=torch.int32))
        summaries = torch.zeros(B, NC, H, D, dtype=torch.bfloat16)
        bounds = None if ragged or mode == "pair_mean" else torch.tensor([0, T], dtype=torch.int32)
        ops.triton_select(
            q,
            summaries,
            torch.full((B,), NC * block_n) if ragged else NC * block_n,
            mode=mode,
            budgets=budgets,
            block_m=block_m,
            block_n=block_n,
            sink_blocks=1,
            local_blocks=2,
            row_queries="all",
            scale=0.1,
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
        )
        print(name, flush=True)


if __name__ == "__main__":
    # imported for its launchers, so that `arch_of` can be set everywhere
    from diffv2_sparse.kernels import backward, choose, forward, summaries  # noqa: F401

    compile_all(int(sys.argv[1]))
    print("all of them")
