"""What a needle-in-a-haystack run leaves behind: a JSON file, a heat map, a table.

`results.json` is `{"environment": {...}, "records": [...]}`, one record per mode, context length, depth and number of
needles. The heat map has one panel per mode (one row of panels per number of needles): x is the context length, y the
depth of the needle, the colour the accuracy, on one scale from 0 to 1 for all panels. Layout and colours follow
gkamradt's needle-in-a-haystack test.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch

from .niah_cells import write_atomically

COLOURS = ("#F0496E", "#EBB839", "#0CD79F")  # accuracy 0, 0.5, 1


def context_name(tokens: int) -> str:
    """1024 -> "1K", 1536 -> "1.5K", 1000 -> "1000"."""
    if tokens >= 1024 and tokens % 512 == 0:
        return f"{tokens / 1024:g}K"
    return str(tokens)


def _distinct(records: list[dict], field: str) -> list:
    """The values of a field, in the order of their first record."""
    return list(dict.fromkeys(record[field] for record in records))


def _mean(records: list[dict], field: str) -> float | None:
    values = [record[field] for record in records if record[field] is not None]
    return sum(values) / len(values) if values else None


def _shown(number: float | None, form: str) -> str:
    return "–" if number is None else format(number, form)


def table(records: list[dict]):
    """A `rich.table.Table`: accuracy by mode and context length, and what each mode costs at the longest length."""
    from rich import box
    from rich.table import Table

    lengths = sorted(_distinct(records, "context_tokens"))
    many_needles = len(_distinct(records, "needles")) > 1
    longest = context_name(lengths[-1])
    view = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True)
    view.add_column("mode", no_wrap=True)
    if many_needles:
        view.add_column("needles", justify="right")
    for tokens in lengths:
        view.add_column(context_name(tokens), justify="right")
    view.add_column("mean", justify="right", style="bold")
    for price in ("density\nat", "prefill\ns, at", "decode\nms, at"):
        view.add_column(f"{price} {longest}", justify="right")

    for count in _distinct(records, "needles"):
        for mode in _distinct(records, "mode"):
            rows = [r for r in records if r["mode"] == mode and r["needles"] == count]
            last = [r for r in rows if r["context_tokens"] == lengths[-1]]
            scores = [_mean([r for r in rows if r["context_tokens"] == tokens], "accuracy") for tokens in lengths]
            shares = [*scores, _mean(rows, "accuracy"), _mean(last, "density")]
            times = [_mean(last, field) for field in ("prefill_s", "decode_ms_per_token")]
            label = [mode, str(count)] if many_needles else [mode]
            view.add_row(*label, *(_shown(share, ".2f") for share in shares), *(_shown(time, ".3g") for time in times))
        view.add_section()
    return view


def write_heatmap(path: Path, records: list[dict]) -> None:
    """Draw the accuracies as a PNG: a column of panels per mode, a row of panels per number of needles."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    modes, counts = _distinct(records, "mode"), _distinct(records, "needles")
    lengths = sorted(_distinct(records, "context_tokens"))
    depths = sorted(_distinct(records, "depth"))
    colours = LinearSegmentedColormap.from_list("needle", COLOURS).with_extremes(bad="#E6E6E6")  # bad: no record

    width = max(2.6, 0.62 * len(lengths) + 0.6)
    height = max(1.9, 0.42 * len(depths) + 0.7)
    figure = Figure(figsize=(width * len(modes) + 1.6, height * len(counts) + 0.75), dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(counts), len(modes), squeeze=False, sharex=True, sharey=True)
    for row, count in enumerate(counts):
        for column, mode in enumerate(modes):
            chosen = [r for r in records if r["mode"] == mode and r["needles"] == count]
            grid = torch.full((len(depths), len(lengths)), float("nan"))
            for record in chosen:
                grid[depths.index(record["depth"]), lengths.index(record["context_tokens"])] = record["accuracy"]
            panel = panels[row][column]
            image = _draw_panel(panel, grid, colours, lengths, depths)
            panel.set_title(mode, fontsize=9, fontweight="bold", loc="left", pad=18)
            panel.annotate(_caption(chosen, lengths[-1]), (0, 1), (0, 6), "axes fraction", "offset points", fontsize=8)
            if row == len(counts) - 1:
                panel.set_xlabel("context, tokens", fontsize=8)
            if column == 0:
                needles = f"{count} needle{'s' if count > 1 else ''}"
                panel.set_ylabel(f"{needles}: depth in the text", fontsize=8)
    bar = figure.colorbar(image, ax=panels, fraction=0.035, pad=0.015, ticks=(0, 0.5, 1))
    bar.set_label("needles found", fontsize=8)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.outline.set_visible(False)

    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    write_atomically(path, picture.getvalue())


def _caption(records: list[dict], longest: int) -> str:
    caption = f"mean {_mean(records, 'accuracy'):.2f}"
    density = _mean([r for r in records if r["context_tokens"] == longest], "density")
    return caption if density is None else f"{caption}, density {density:.2f} at {context_name(longest)}"


def _draw_panel(panel, grid: torch.Tensor, colours, lengths: list[int], depths: list[float]):
    """One mode: grid [len(depths), len(lengths)] of accuracies, NaN where nothing was measured."""
    image = panel.pcolormesh(grid.numpy(), cmap=colours, vmin=0, vmax=1, edgecolors="white", linewidth=1.5)
    for i_depth, i_length in (~grid.isnan()).nonzero().tolist():
        number = f"{grid[i_depth, i_length]:.2f}"
        panel.text(i_length + 0.5, i_depth + 0.5, number, ha="center", va="center", fontsize=8, color="#16302B")
    panel.set_xticks([i + 0.5 for i in range(len(lengths))], [context_name(tokens) for tokens in lengths])
    panel.set_yticks([i + 0.5 for i in range(len(depths))], [f"{depth:.0%}" for depth in depths])
    panel.set_ylim(len(depths), 0)  # the start of the text on top
    panel.tick_params(labelsize=8, length=0)
    for spine in panel.spines.values():
        spine.set_visible(False)
    return image


def write_results(output: Path, records: list[dict], environment: dict) -> tuple[Path, Path]:
    """Write `results.json` and `heatmap.png` into an existing folder.

    Args:
        records: from `niah.evaluate`.
        environment: from `environment`.

    Returns:
        The two paths.

    Raises:
        OSError: a file cannot be written.
    """
    results, heatmap = output / "results.json", output / "heatmap.png"
    content = json.dumps({"environment": environment, "records": records}, indent=1)
    write_atomically(results, content.encode() + b"\n")
    write_heatmap(heatmap, records)
    return results, heatmap
