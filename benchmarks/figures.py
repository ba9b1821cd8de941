"""Figures of results files: time and memory against length, both axes logarithmic. They read the JSON and nothing else.

python benchmarks/figures.py benchmarks/results/attention_h200.json     # draws attention_h200.png beside it
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from bars import YOCO
from records import OURS, tokens_name

from diffv2_sparse.niah_cells import write_atomically

COLOURS = ("#16302B", "#0CA37F", "#EBB839", "#F0496E", "#5B7DB1", "#8E6C8A", "#B5651D", "#7A8B5C")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


def draw(results: Path) -> Path | None:
    """Draws a results file into a PNG beside it; returns its path, or None where the file holds nothing to draw."""
    content = json.loads(results.read_text())
    records = [record for record in content["records"] if "median_ms" in record]
    panels = swept_panels(records) or decoded_panels(records) or prompt_panels(records) or step_panels(records)
    if not panels:
        return None
    gpu = content["environment"]["gpu"] or content["environment"]["cpu"]
    path = results.with_suffix(".png")
    write_atomically(path, _picture(panels, gpu))
    return path


Lines = dict[str, dict[int, float]]  # a line's name -> length -> milliseconds, or what UNITS says of its row
TIME, MEMORY = "time to the first token", "weights, cache and activations"
UNITS = {MEMORY: "GiB"}
EXTRAPOLATED = ", extrapolated"


def swept_panels(records: list[dict]) -> dict[tuple[str, str], Lines]:
    """Of the sweep in an attention file: a row of panels per head size, a column per number of heads."""
    panels: dict[tuple[str, str], Lines] = {}
    for r in records:
        if r["group"] != "sweep" or "HQ" not in r["shape"]:
            continue
        shape = r["shape"]
        where = (f"head size {shape['D']}", f"{shape['HQ']} query heads, {shape['H']} KV heads")
        line = f"{r['case']} keys, {r['backend']}" if r["kind"] == OURS else f"dense, {r['kind']}"
        panels.setdefault(where, {}).setdefault(line, {})[shape["T"]] = r["median_ms"]
    return panels


def decoded_panels(records: list[dict]) -> dict[tuple[str, str], Lines]:
    """Of a decode file: a panel per batch size."""
    panels: dict[tuple[str, str], Lines] = {}
    for r in records:
        if r["group"] != "decode" or "S" not in r["shape"]:
            continue
        what = r["phase"] if "blocks" in r["shape"] else "dense"
        line = f"{what}, {'ours (' + r['backend'] + ')' if r['kind'] == OURS else r['kind']}"
        where = ("one decode step", f"batch {r['shape']['B']}")
        panels.setdefault(where, {}).setdefault(line, {})[r["shape"]["S"]] = r["median_ms"]
    return panels


def prompt_panels(records: list[dict]) -> dict[tuple[str, str], Lines]:
    """Of a prefill file: times of all kinds over their memory. Extrapolated times go on from the last measured one."""
    panels: dict[tuple[str, str], Lines] = {}
    if not records or records[0]["benchmark"] != "prefill":
        return panels
    for r in (r for r in records if r["phase"] == "prefill"):
        line = {"yoco": YOCO, "scoring": f"{YOCO}, all logits"}.get(r["group"], r["kind"])
        T, lines = r["shape"]["T"], panels.setdefault((TIME, "batch 1"), {})
        if "extrapolated" not in r:
            lines.setdefault(line, {})[T] = r["median_ms"]
        else:
            measured = lines.get(line, {})
            onward = lines.setdefault(line + EXTRAPOLATED, dict([max(measured.items())] if measured else []))
            onward[T] = r["median_ms"]
        if "total_gib" in r:
            panels.setdefault((MEMORY, "batch 1"), {}).setdefault(line, {})[T] = r["total_gib"]
    return panels


def step_panels(records: list[dict]) -> dict[tuple[str, str], Lines]:
    """Of a generation file: a panel per batch size, steps in a graph over those launched by the host."""
    panels: dict[tuple[str, str], Lines] = {}
    for r in records:
        if r["benchmark"] != "generation" or not r["group"].startswith("batch ") or "tokens_per_s" not in r:
            continue
        attention, how = r["phase"].split(", ")
        line = f"{attention}, ours ({r['backend']})" if r["kind"] == OURS else r["kind"]
        row = "one token" + (", in a CUDA graph" if how == "graph" else ", eager")
        panels.setdefault((row, r["group"]), {}).setdefault(line, {})[r["shape"]["S"]] = r["median_ms"]
    return panels


def _picture(panels: dict[tuple[str, str], Lines], gpu: str) -> bytes:
    from matplotlib.figure import Figure

    rows, columns = (list(dict.fromkeys(where[i] for where in panels)) for i in (0, 1))
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    lengths = sorted({length for lines in panels.values() for line in lines.values() for length in line})
    size = (max(1.2 + 3.2 * len(columns), 5.6), 1.3 + 2.7 * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    sharey = "row" if set(rows) & set(UNITS) else True
    grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex=True, sharey=sharey)
    for (row, column), lines in panels.items():
        panel = grid[rows.index(row)][columns.index(column)]
        for name, line in lines.items():
            i = names.index(name)
            if name.endswith(EXTRAPOLATED):  # goes on from another line, in its colour
                i = names.index(name.removesuffix(EXTRAPOLATED)) if name.removesuffix(EXTRAPOLATED) in names else i
            dashes = "--" if name.startswith("dense") or name.endswith(EXTRAPOLATED) else "-"
            style = {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)], "linestyle": dashes}
            panel.plot(sorted(line), [line[x] for x in sorted(line)], label=name, markersize=3, linewidth=1.2, **style)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(lengths, [tokens_name(length) for length in lengths], minor=False)
        panel.tick_params(labelsize=7, length=2)
        panel.grid(True, which="major", linewidth=0.3, color="#B9C4C0")
        panel.spines[["top", "right"]].set_visible(False)
        panel.set_title(f"{row}, {column}", fontsize=8, loc="left")
        if row == rows[-1]:
            panel.set_xlabel("tokens", fontsize=8)
        if column == columns[0]:
            panel.set_ylabel(UNITS.get(row, "milliseconds"), fontsize=8)
    known = {name: handle for panel in figure.axes for handle, name in zip(*panel.get_legend_handles_labels())}
    figure.legend(
        known.values(), known, loc="outside lower center", ncols=min(3, len(known)), fontsize=7, frameon=False
    )
    figure.suptitle(f"{gpu}, medians", fontsize=8, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(draw(Path(name)) or f"{name}: nothing to draw")
