"""A small call of every kernel, in the forms that are compiled apart.

On a GPU: `compute-sanitizer --tool memcheck python -m tests.every_kernel`, and the same with racecheck; `portable` or
`hopper` after it makes the calls of those kernels alone. Without one, `compile_offline` makes the same calls, but for
the Hopper kernels, which have `compile_hopper`.
"""

import math
import sys

import torch

from diffv2_sparse import TopK, ops, select_blocks
from diffv2_sparse.offload import OffloadedPool
from tests.oracle import qkv, random_selection

ATTENTION = {  # T, HQ, H, D, differential, options of the selection; none for a window
    "rows of 128": (256, 16, 2, 128, True, {"block_m": 128, "block_n": 128}),
    "rows of 64, per class": (256, 8, 2, 64, True, {"block_m": 64, "block_n": 64, "mode": "per_class"}),
    "rows of one token": (64, 16, 2, 128, True, {"block_m": 1, "block_n": 16}),
    "ordinary, rows of 16": (64, 3, 1, 96, False, {"block_m": 16, "block_n": 16, "mode": "per_head"}),
    "window": (64, 8, 2, 64, True, None),
}
DECODING = {  # T, HQ, H, D, differential, page size, lists: classes and tokens per row
    "decode, one token": (1, 16, 2, 128, True, 64, (1, 1)),
    "decode, per class, small pages": (4, 16, 2, 64, True, 16, (2, 1)),
    "decode, dense, many rows": (16, 8, 1, 128, True, 128, None),
    "decode, ordinary": (3, 3, 1, 96, False, 48, (1, 2)),
    "decode, a ring as pages of one key": (1, 16, 2, 128, True, 1, None),
}
CHOICES = {  # B, T, NC, HQ, H, D, block_m, block_n, mode, budgets, lengths on the device
    "choice for rows of 64": (1, 4096, 64, 16, 2, 128, 64, 64, "pair_mean", [(32, math.inf)], False),
    "choice for each token, per class": (1, 2048, 300, 8, 2, 64, 1, 16, "per_class", [(9, 0.9), (8, math.inf)], False),
    "choice for long rows of any heads": (1, 9000, 30, 3, 1, 96, 300, 300, "per_head", [(20, 0.5)], False),
    "choice in decoding": (4, 1, 16384, 64, 8, 128, 1, 64, "pair_mean", [(64, math.inf)], True),
    "choice beyond the registers": (1, 8, 20000, 8, 2, 256, 4, 64, "pair_mean", [(600, 0.5)], True),
}
LINEAR = {  # tokens, hidden size, query and KV heads, head dimension, intermediate size
    "linear layers, one token": (1, 1024, 16, 2, 128, 4096),
    "linear layers, two tokens, odd sizes": (2, 200, 6, 2, 24, 300),
}
FETCHING = {  # B, T, C, H, D, NB, block_n, dtype
    "fetch, a step": (1, 1, 1, 8, 128, 64, 64, torch.bfloat16),
    "fetch, tokens of a batch, per class": (4, 3, 2, 3, 96, 16, 48, torch.float32),
    "fetch, pages of an odd number of bytes": (1, 1, 1, 1, 3, 4, 3, torch.float16),
}
PAGES = 16


def attend(device, kernels, T, HQ, H, D, differential, options) -> None:
    inputs = qkv(1, T, T, HQ, H, D, dtype=torch.bfloat16, device=device, differential=differential, requires_grad=True)
    with torch.no_grad():
        inputs[1][:, T // 2 :] *= 50  # beyond what the Hopper forward takes in its first walk
    selection, window = None, 16
    if options is not None:
        selection, window = select_blocks(*inputs[:2], budget=TopK(4), local_blocks=1, **options), None
    bounds = {"cu_seqlens_q": None, "cu_seqlens_k": None}
    for name, attention, obstacle in (
        ("portable", ops.triton_attention, None),
        ("hopper", ops.hopper_attention, ops.hopper_obstacle(inputs[0], selection)),
    ):
        if name in kernels and obstacle is None:
            o, _ = attention(*inputs, selection, scale=D**-0.5, window=window, **bounds)
            o.backward(torch.ones_like(o))


def decode(device, T, HQ, H, D, differential, block_n, lists) -> None:
    B, S = 2, PAGES * block_n
    q, _, _, lam = qkv(B, T, T, HQ, H, D, dtype=torch.bfloat16, device=device, differential=differential)
    pages = torch.randn(B * H * PAGES, block_n, D, device=device).bfloat16()
    table = torch.randperm(B * H * PAGES, device=device).int().view(B, H, PAGES)
    lengths = torch.tensor([S, S - block_n - 3], dtype=torch.int32, device=device)
    selection = None
    if lists is not None:
        C, block_m = lists
        sizes = {"C": C, "NB": 8, "block_m": block_m, "block_n": block_n}
        selection = random_selection(B, T, S, H, device=device, **sizes)
    ops.triton_paged(q, pages, pages, table, lengths, lam, selection, scale=D**-0.5)


def choose(device, B, T, NC, HQ, H, D, block_m, block_n, mode, budgets, ragged) -> None:
    k = torch.randn(1, 2 * block_n, H, D, device=device).bfloat16()
    bounds = torch.tensor([0, 2 * block_n], dtype=torch.int32, device=device)
    ops.triton_summaries(k, block_n, None if ragged else bounds)
    q, summaries = (torch.randn(B, n, h, D, device=device).bfloat16() for n, h in ((T, HQ), (NC, H)))
    bounds = None if ragged or mode == "pair_mean" else torch.tensor([0, T], dtype=torch.int32, device=device)
    ops.triton_select(
        q,
        summaries,
        torch.full((B,), NC * block_n, device=device) if ragged else NC * block_n,
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


def fetch(device, B, T, C, H, D, NB, block_n, dtype) -> None:
    pool = OffloadedPool(2 * NB * B, H, block_n, D, dtype, torch.device(device), B * C * T * NB)
    k, block = torch.randn(5, H, D, device=device, dtype=dtype), torch.arange(5, device=device)
    pages = pool.k_pages, pool.v_pages
    ops.triton_write_pages(k, k, block, block % block_n, pool.slot_of, *pages, pool.k_slots, pool.v_slots)
    ops.triton_copy_pages(*pages, *pages, block, block + 1)
    ops.triton_copy_pages(pool.k_pages, None, pool.k_slots, None, block, block)
    table = torch.randperm(len(pool.slot_of), device=device).int().view(B, H, 2 * NB)
    for _ in range(2):
        lists = random_selection(B, T, 2 * NB * block_n, H, device=device, C=C, NB=NB, block_m=1, block_n=block_n)
        books = pool.slot_of, pool.page_in, pool.order, pool.last_read, pool.claims, pool.clock, pool._fetched
        ops.triton_fetch(lists.indices, lists.counts, table, *pages, pool.k_slots, pool.v_slots, *books)


def project(device, T, hidden, HQ, H, D, intermediate) -> None:
    def make(*shape):
        return torch.randn(*shape, device=device).bfloat16()

    x, norm, ring = make(1, T, hidden), make(hidden), make(1, H, 8, D)
    angles, places = torch.randn(2, 1, T, D // 2, device=device).unbind(0), torch.arange(T, device=device) * D
    weights = make(HQ * D, hidden), make(HQ // 2, hidden), make(H * D, hidden)
    rings = None, None, ring
    ops.project_few(x, norm, 1e-5, weights, (True, False, True), rings, D, angles, places)
    gated = ops.gate_few(x, norm, 1e-5, *make(2, intermediate, hidden))
    ops.add_few(x, gated, make(hidden, intermediate))


def call_all(device: str, kernels: tuple[str, ...] = ("portable", "hopper")) -> None:
    for name, case in ATTENTION.items():
        attend(device, kernels, *case)
        print(name, flush=True)
    for call, cases in ((decode, DECODING), (choose, CHOICES), (project, LINEAR), (fetch, FETCHING)):
        for name, case in cases.items() if "portable" in kernels else ():
            call(device, *case)
            print(name, flush=True)


if __name__ == "__main__":
    call_all("cuda", tuple(sys.argv[1:]) or ("portable", "hopper"))
    torch.cuda.synchronize()
    print("all of them")
