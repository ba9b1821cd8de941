"""One schema for every benchmark: where it ran, one record per kind and shape, and the numbers that were to be reached.

{"environment": {gpu, cpu, threads, versions, commit, date, cublas_tflops, groups: {name: {date, seconds, …}}},
 "records": [{benchmark, group, case, phase, kind, backend, shape: {…}, median_ms, p20_ms, p80_ms, rounds, tflops,
              ratios: {peer: x}, peak_gib}],     a kind that failed: {…, error} instead of times
 "bars": [{row, backend, value, bar, reach, met}],
 "tables": {title: [row, …]}}                       where a benchmark has more to say

`case` names the lists ("large blocks"), `phase` what was run ("fwd", "fwd+bwd", "select", "select+fwd", …), `kind` who:
"ours", by `backend`, or a peer. Ratios are peer's time over own time. TFLOP/s count selected tiles.
"""

import json
import os
import statistics
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from diffv2_sparse.environment import environment
from diffv2_sparse.niah_cells import write_atomically

RESULTS = Path(__file__).parent / "results"
PEERS = ("flash-attn", "flash-attn-4", "xformers")
OURS = "ours"


def stamp() -> dict:
    """The environment of this run, the versions of the peers that are installed included."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = environment(device)
    found["commit"] = os.environ.get("GIT_COMMIT") or found["commit"]  # a copy may lack its history
    for package in PEERS:
        with suppress(PackageNotFoundError):
            found["versions"][package] = version(package)
    return found


def machine() -> str:
    """A short name for this machine in file names: "h200", "cpu"."""
    if not torch.cuda.is_available():
        return "cpu"
    words = torch.cuda.get_device_name().lower().replace("-", " ").split()
    return "_".join(word for word in words if word not in {"nvidia", "geforce"})


def tokens_name(tokens: int) -> str:
    """8192 -> "8K", 1048576 -> "1M", 1000 -> "1000"."""
    for unit, size in (("M", 1 << 20), ("K", 1 << 10)):
        if tokens >= size and tokens % size == 0:
            return f"{tokens // size}{unit}"
    return str(tokens)


def save(name: str, records: list[dict]) -> Path:
    """Writes `benchmarks/results/NAME.json`; returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"environment": stamp(), "records": records})
    return path


def write_json(path: Path, content: dict) -> None:
    write_atomically(path, json.dumps(content, indent=1).encode() + b"\n")


class Results:
    """A results file that is written after every group of records, so that a run that was cut short continues.

    Groups that the same commit measured on the same machine under the same versions are kept; the file of another
    starts anew.
    """

    def __init__(
        self,
        path: Path,
        bars: Callable[[list[dict]], list[dict]],
        tables: Callable[[list[dict]], dict[str, list[dict]]] = lambda records: {},
    ):
        self.path, self.environment, self.records, self._bars, self._tables = path, stamp(), [], bars, tables
        self.environment["groups"] = {}
        self.replaces = False  # another run's file stands there, which the first group overwrites
        with suppress(FileNotFoundError):
            old = json.loads(path.read_text())
            if all(
                old["environment"].get(key) == self.environment[key] for key in ("gpu", "cpu", "versions", "commit")
            ):
                self.environment["groups"] = old["environment"]["groups"]
                self.records = old["records"]
            else:
                self.replaces = True

    def has(self, group: str) -> bool:
        """Whether it was measured, and nothing of it skipped."""
        return not self.environment["groups"].get(group, {"skipped": True}).get("skipped", 0)

    def of(self, group: str) -> list[dict]:
        return [record for record in self.records if record["group"] == group]

    @property
    def bars(self) -> list[dict]:
        return self._bars(self.records)

    @property
    def tables(self) -> dict[str, list[dict]]:
        return self._tables(self.records)

    def add(self, group: str, records: list[dict], **facts) -> None:
        """Writes a group's records in place of its earlier ones; `facts` go into the environment."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        groups = self.environment["groups"]
        groups[group] = {"date": now, **facts}
        if rates := [known["cublas_tflops"] for known in groups.values() if "cublas_tflops" in known]:
            self.environment["cublas_tflops"] = statistics.median(rates)
        self.records = [record for record in self.records if record["group"] != group] + records
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"environment": self.environment, "records": self.records, "bars": self.bars}
        if tables := self.tables:
            content["tables"] = tables
        write_json(self.path, content)
        self.replaces = False
