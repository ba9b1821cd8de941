"""One schema for every benchmark: where it ran, and one record per kind and shape, with quantiles of the times.

{"environment": {gpu, cpu, threads, versions, commit, date},
 "records": [{benchmark, shape: {…}, kind, median_ms, p20_ms, p80_ms, ratios: {peer: x}, …}]}
"""

import json
import statistics
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from diffv2_sparse.environment import environment

RESULTS = Path(__file__).parent / "results"
PEERS = ("flash-attn", "flash-attn-4", "xformers")


def stamp() -> dict:
    """The environment of this run, the versions of the peers that are installed included."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device)
    for package in PEERS:
        with suppress(PackageNotFoundError):
            found["versions"][package] = version(package)
    return found


def time_interleaved(kinds: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Times each kind `rounds` times on the host, in turns, so that a drifting machine drifts for all. Milliseconds."""
    seconds = {kind: [] for kind in kinds}
    for run in kinds.values():
        run()
    for _ in range(rounds):
        for kind, run in kinds.items():
            start = time.perf_counter()
            run()
            seconds[kind].append(time.perf_counter() - start)
    return {kind: quantiles_ms(values) for kind, values in seconds.items()}


def quantiles_ms(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=10, method="inclusive") if len(seconds) > 1 else seconds * 9
    return {f"{name}_ms": round(1e3 * cuts[i], 4) for name, i in (("median", 4), ("p20", 1), ("p80", 7))}


def save(name: str, records: list[dict]) -> Path:
    """Writes `benchmarks/results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"environment": stamp(), "records": records}, indent=1) + "\n")
    return path
