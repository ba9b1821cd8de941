"""One schema for every benchmark: where it ran, and one record per kind and shape, with quantiles of the times.

{"environment": {gpu, cpu, threads, versions, commit, date},
 "records": [{benchmark, shape: {…}, kind, median_ms, p20_ms, p80_ms, ratios: {peer: x}, …}]}
"""

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def environment() -> dict:
    """Hardware, versions, commit and date of this run."""
    versions = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "flash-attn", "flash-attn-4", "xformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent)
    return {
        "gpu": gpu,
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "versions": versions,
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


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
    path.write_text(json.dumps({"environment": environment(), "records": records}, indent=1) + "\n")
    return path


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
