"""What a results file says, as tables: for the terminal, and as a page of Markdown beside the file.

python benchmarks/tables.py benchmarks/results/attention_h200.json     # writes attention_h200.md beside it
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import NamedTuple

from cases import CUBLAS
from records import OURS, tokens_name
from rich import box
from rich.table import Table as Drawn
from rich.text import Text

from diffv2_sparse.niah_cells import write_atomically


class Table(NamedTuple):
    """Columns hold numbers, but for the `texts`; `strong` are the rows to look at first."""

    title: str
    columns: tuple[str, ...]
    texts: set[int]
    rows: list[tuple[str, ...]]
    strong: set[int] = frozenset()

    def drawn(self) -> Drawn:
        """For a terminal."""
        view = Drawn(title=self.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1))
        for i, column in enumerate(self.columns):
            view.add_column(column, justify="left" if i in self.texts else "right")
        for i, row in enumerate(self.rows):
            view.add_row(*(Text(cell) for cell in row), style="bold" if i in self.strong else None)
        return view

    def markdown(self) -> str:
        lines = [self.columns, ["---" if i in self.texts else "--:" for i in range(len(self.columns))]]
        for i, row in enumerate(self.rows):
            cells = [cell.replace("|", "\\|") for cell in row]
            lines.append([f"**{cells[0]}**", *cells[1:]] if i in self.strong else cells)
        return "\n".join([f"## {self.title}", "", *(f"| {' | '.join(line)} |" for line in lines), ""])


def table_of(group: str, records: list[dict], seconds: float) -> Table:
    """The records of a group."""
    return _swept(records) if group == "sweep" else _listed(f"{group} ({seconds:.0f} s)", records)


def _listed(title: str, records: list[dict]) -> Table:
    columns = ("case", "phase", "kind", "backend", "ms", "p20", "p80", "TFLOP/s", "GiB", "peer's time over own")
    rows = []
    for r in records:
        who = (r["case"], r["phase"], r["kind"], r["backend"] or "")
        if "error" in r:
            rows.append((*who, *[""] * 5, r["error"]))
            continue
        times = [number(r.get(key)) for key in ("median_ms", "p20_ms", "p80_ms", "tflops", "peak_gib")]
        ratios = ", ".join(f"{peer} {ratio:.2f}" for peer, ratio in r.get("ratios", {}).items())
        rows.append((*who, *times, ratios))
    return Table(title, columns, {0, 1, 2, 3, 9}, rows, {i for i, r in enumerate(records) if r["kind"] == OURS})


def _swept(records: list[dict]) -> Table:
    """One line per shape, backend and budget, one column per length: milliseconds and TFLOP/s."""
    records = [record for record in records if record["kind"] != CUBLAS]
    lengths = sorted({record["shape"]["T"] for record in records})
    lines: dict[tuple, dict[int, str]] = {}
    for r in records:
        shape = r["shape"]
        line = (str(shape["D"]), f"{shape['HQ']}/{shape['H']}", r["case"], r["backend"] or r["kind"])
        error = r.get("error", "").partition(":")[0]  # its kind, or that it was skipped
        text = error or f"{number(r['median_ms'])} ({r['tflops']:.0f})"
        lines.setdefault(line, {})[shape["T"]] = text
    columns = ("D", "HQ/H", "case", "kind", *map(tokens_name, lengths))
    rows = [(*line, *(cells.get(tokens, "–") for tokens in lengths)) for line, cells in lines.items()]
    return Table("sweep: ms (TFLOP/s)", columns, {0, 1, 2, 3}, rows)


def table_of_bars(bars: list[dict], title: str) -> Table:
    """What was reached of the numbers that were to be reached."""
    rows = []
    for bar in bars:
        sign = "≤" if bar["at_most"] else "≥"
        limits = ["" if bar[key] is None else f"{sign} {bar[key]:g}" for key in ("bar", "reach")]
        value = "–" if bar["value"] is None else f"{bar['value']:.3g}"
        said = {None: bar.get("why", ""), True: "met", False: "missed"}[bar["met"]]
        rows.append((bar["row"], bar["backend"], value, *limits, said))
    missed = {i for i, bar in enumerate(bars) if bar["met"] is False}
    return Table(title, ("row", "backend", "value", "bar", "reach for", ""), {0, 1, 5}, rows, missed)


def table_of_rows(title: str, rows: list[dict]) -> Table:
    """One column per key of the rows."""
    columns = tuple(dict.fromkeys(key for row in rows for key in row))
    cells = [[row.get(column) for column in columns] for row in rows]
    words = [tuple(number(cell) if isinstance(cell, int | float) else str(cell or "") for cell in row) for row in cells]
    return Table(title, columns, {0}, words)


def number(x: float | None) -> str:
    """Three digits or more."""
    return "" if x is None else f"{x:.3g}" if abs(x) < 100 else f"{x:.0f}"


def write_page(results: Path) -> Path:
    """Writes all of a results file as Markdown beside it, with its figure if there is one; returns its path."""
    content = json.loads(results.read_text())
    environment, records = content["environment"], content["records"]
    name = records[0]["benchmark"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items() if version)
    facts = [f"{environment['gpu'] or environment['cpu']}; {versions}; commit {environment['commit']}."]
    if "cublas_tflops" in environment:
        facts.append(f"A matrix product of cuBLAS ran at {environment['cublas_tflops']:.0f} TFLOP/s.")
    parts = [f"# {name}\n", " ".join([*facts, f"Drawn from [{results.name}]({results.name}); medians."]) + "\n"]
    if results.with_suffix(".png").exists():
        parts.append(f"![time against length]({results.with_suffix('.png').name})\n")
    parts.append(table_of_bars(content["bars"], "Numbers to reach").markdown())
    parts += [table_of_rows(title, rows).markdown() for title, rows in content.get("tables", {}).items()]
    for group, known in environment["groups"].items():
        own = [record for record in records if record["group"] == group]
        parts.append(table_of(group, own, known["seconds"]).markdown())
    page = results.with_suffix(".md")
    write_atomically(page, "\n".join(parts).encode())
    return page


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(write_page(Path(name)))
