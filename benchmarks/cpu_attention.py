"""Block-sparse against dense attention on a CPU: time with selection included, and memory beyond the inputs.

    python benchmarks/cpu_attention.py            # T = S = 32,768
    python benchmarks/cpu_attention.py --tokens 8192 --rounds 3

Dense is torch's scaled_dot_product_attention over the same heads, and the subtraction. Memory is the growth of the
process's peak resident size during one call, each in a process of its own.
"""

import argparse
import multiprocessing
from pathlib import Path

import torch
import torch.nn.functional as F
from records import save
from rich.console import Console
from rich.table import Table
from timing import quantiles_ms, time_interleaved

from diffv2_sparse import TopK, diff_attention, select_blocks

HQ, H, D, BLOCK = 8, 2, 64, 64
DENSE, SPARSE = "SDPA, dense", "block-sparse, selection included"


def inputs(tokens: int):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, tokens, heads, D) for heads in (HQ, H, H))
    return q, k, v, torch.randn(1, tokens, HQ // 2)


def dense(q, k, v, lam_logit):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    heads = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)
    return heads[:, :, 0::2] - torch.sigmoid(lam_logit)[..., None] * heads[:, :, 1::2]


def select(q, k, blocks: int):
    return select_blocks(q, k, budget=TopK(blocks), block_m=BLOCK, block_n=BLOCK)


def sparse(q, k, v, lam_logit, blocks: int):
    return diff_attention(q, k, v, lam_logit, select(q, k, blocks), backend="torch")


def measure_peak_mib(kind: str, tokens: int, blocks: int) -> float:
    """Growth of the peak resident size by one call, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(_peak_mib, (kind, tokens, blocks))


def _peak_mib(kind: str, tokens: int, blocks: int) -> float:
    q, k, v, lam_logit = inputs(tokens)
    sparse(*(x[:, :256] for x in (q, k, v, lam_logit)), blocks)  # libraries loaded, threads started
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here (Linux)
    before = _status_kib("VmRSS")
    if kind == DENSE:
        dense(q, k, v, lam_logit)
    elif kind == SPARSE:
        sparse(q, k, v, lam_logit, blocks)
    else:
        select(q, k, blocks)
    return (_status_kib("VmHWM") - before) / 1024


def _status_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--blocks", type=int, default=16, help="budget in blocks of 64 keys")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-tokens", type=int, default=131072, help="length of the selection's memory test")
    args = parser.parse_args()

    q, k, v, lam_logit = inputs(args.tokens)
    selection = select(q, k, args.blocks)
    kinds = {
        DENSE: lambda: dense(q, k, v, lam_logit),
        "selection": lambda: select(q, k, args.blocks),
        "attention over the selection": lambda: diff_attention(q, k, v, lam_logit, selection, backend="torch"),
        SPARSE: lambda: sparse(q, k, v, lam_logit, args.blocks),
    }
    for run in kinds.values():  # warm-up
        run()
    times = {kind: quantiles_ms(taken) for kind, taken in time_interleaved(kinds, args.rounds).items()}
    peaks = {kind: measure_peak_mib(kind, args.tokens, args.blocks) for kind in (DENSE, SPARSE)}

    shape = {"B": 1, "T": args.tokens, "S": args.tokens, "HQ": HQ, "H": H, "D": D, "dtype": "float32"}
    shape |= {"block_m": BLOCK, "block_n": BLOCK, "blocks": args.blocks}
    density = round(float(selection.density(args.tokens, args.tokens)), 4)
    title = f"T = S = {args.tokens:,}, HQ {HQ}, H {H}, D {D}, {args.blocks} blocks of {BLOCK}, density {density:.3f}"
    records, table = [], Table(title=title)
    for column in ("kind", "median ms", "p20", "p80", "× dense", "peak MiB beyond inputs"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind, own in times.items():
        ratio = times[DENSE]["median_ms"] / own["median_ms"]
        record = {"benchmark": "cpu_attention", "shape": shape | {"density": density}, "kind": kind, **own}
        record["ratios"] = {DENSE: round(ratio, 3)}
        if kind in peaks:
            record["peak_mib"] = round(peaks[kind], 1)
        records.append(record)
        quantiles = [f"{own[f'{name}_ms']:.0f}" for name in ("median", "p20", "p80")]
        table.add_row(kind, *quantiles, f"{ratio:.2f}", f"{peaks[kind]:.0f}" if kind in peaks else "")

    long = measure_peak_mib("selection", args.memory_tokens, args.blocks)
    shape |= {"T": args.memory_tokens, "S": args.memory_tokens}
    records.append({"benchmark": "cpu_attention", "shape": shape, "kind": "selection", "peak_mib": round(long, 1)})

    own_mib = sum(x.numel() * x.element_size() for x in (q, k, v, q[:, :, ::2])) / 2**20
    console = Console()
    console.print(table)
    console.print(f"q, k, v and o together: {own_mib:.0f} MiB.")
    console.print(f"Selection at {args.memory_tokens:,} tokens: {long:.0f} MiB beyond q and k.")
    console.print(f"Written to {save('cpu_attention', records)}")


if __name__ == "__main__":
    main()
