"""Where and when numbers were measured: the stamp that every results file carries."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def versions() -> dict:
    """What runs: Python's version and those of the packages that decide results; None for one that is not installed."""
    found = {"python": platform.python_version()}
    for name in ("diffv2-sparse", "torch", "triton", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from the checkout
            found[name] = None
    return found


def hardware(device: torch.device) -> dict:
    """Where it runs: {cpu, threads, gpu}; gpu is None when the device is the CPU."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {"cpu": _cpu_name(), "threads": torch.get_num_threads(), "gpu": gpu}


def environment(device: torch.device, **facts) -> dict:
    """The moment, the machine and the versions of a run, and `facts` of the caller's, ready for JSON."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": date, "commit": _commit(), "versions": versions(), **hardware(device), **facts}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of this package's own checkout ("-dirty" when files differ from it); None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():  # never the commit of a repository that merely holds our virtual environment
        return None
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        run = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:  # no git on this machine
        return None
    return run.stdout.strip() or None
