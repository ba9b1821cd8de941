"""Finished cells of a needle-in-a-haystack run, one small JSON file each, so that a run can stop and continue.

A cell's file is named after a hash of everything that determines its record: the prompts' tokens, the model's weights
and configuration, this package's sources, versions, hardware. Change one of them and the file is simply not found; a
stale cell never counts. Files are written beside their place and then renamed: a reader, or the next run, never meets
half a file.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cell:
    """One square of the heat map: `trials` prompts of `context_tokens` tokens, the target at `depth` in [0, 1]."""

    mode: str
    context_tokens: int
    depth: float
    needles: int
    trials: int


class CellStore:
    """The finished cells in a folder.

    Args:
        folder: made if missing.
        ground: what all cells of this run share and that determines their records; ready for JSON.

    Raises:
        OSError: the folder cannot be made.
    """

    def __init__(self, folder: Path, ground: dict):
        self.folder, self.ground = Path(folder), ground
        self.folder.mkdir(parents=True, exist_ok=True)

    def find(self, cell: Cell, prompts: str) -> dict | None:
        """The record of a cell over the prompts with this digest; None if no whole file holds it."""
        key = self._key(cell, prompts)
        try:
            kept = json.loads(self._path(cell, key).read_text())
        except (FileNotFoundError, ValueError):  # ValueError: somebody cut or edited the file
            return None
        return kept["record"] if isinstance(kept, dict) and kept.get("key") == key else None

    def keep(self, cell: Cell, prompts: str, record: dict) -> None:
        """Write a cell's record. Raises OSError when that fails; other cells stay as they are."""
        key = self._key(cell, prompts)
        content = json.dumps({"key": key, "record": record}, indent=1)
        write_atomically(self._path(cell, key), content.encode() + b"\n")

    def _key(self, cell: Cell, prompts: str) -> str:
        facts = {"ground": self.ground, "cell": asdict(cell), "prompts": prompts}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def _path(self, cell: Cell, key: str) -> Path:
        return self.folder / f"{cell.mode}-{cell.context_tokens}-{cell.depth:g}-{cell.needles}-{key[:16]}.json"


def weights_digest(model) -> str:
    """Hash of a model's configuration (but for the mode, which is a cell's own) and of every weight's bytes."""
    told = hashlib.sha256()
    config = model.config.to_dict()
    settings = {name: value for name, value in config.items() if name not in ("sparse_mode", "_name_or_path")}
    told.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, weight in model.state_dict().items():
        told.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        told.update(tensor_bytes(weight))
    return told.hexdigest()


def sources_digest() -> str:
    """Hash of this package's sources: another selector or kernel is another measurement."""
    root = Path(__file__).parent
    files = [*root.glob("*.py"), *(root / "yoco").rglob("*.py"), *(root / "kernels").rglob("*.py")]
    told = hashlib.sha256()
    for file in sorted(files):
        told.update(f"{file.relative_to(root)} ".encode())
        told.update(file.read_bytes())
    return told.hexdigest()


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's elements in order, as raw bytes; any dtype and device."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: as from `open` and `write`; the old file, if any, stands, and no partial one is left.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
