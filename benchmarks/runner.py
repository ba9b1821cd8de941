"""What the benchmark scripts share: options, the order of the work, progress on stderr, tables on stdout."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from cases import CUBLAS, SKIPPED, Benchmark, compile_ahead, measure
from figures import draw
from records import RESULTS, Results, machine
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from tables import table_of, table_of_bars, table_of_rows, write_page
from timing import DeviceLostError


def main(benchmark: Benchmark, described: str, arguments: list[str] | None = None) -> int:
    """Runs a benchmark from its command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(benchmark.groups)
    parser.add_argument(
        "--only",
        metavar="GROUP",
        action="append",
        choices=[*benchmark.groups],
        help=f"measure it, again or not: {names}",
    )
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, to see that it runs; also without a GPU")
    parser.add_argument(
        "--output", type=Path, help="folder for the results; benchmarks/results, or runs/bench for --smoke"
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        default=float("inf"),
        help="begin nothing after so long; what is left is recorded as skipped, and done by the same command again",
    )
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.smoke):
        print(f"{benchmark.name}: needs a CUDA device; --smoke runs tiny shapes without one", file=sys.stderr)
        return 1

    folder = options.output or (Path("runs/bench") if options.smoke else RESULTS)
    path = folder / f"{benchmark.name}_{'smoke' if options.smoke else machine()}.json"
    results = Results(path, benchmark.bars, benchmark.tables)
    console = Console(width=None if sys.stdout.isatty() else 160)
    if results.replaces:
        console.print(f"{results.path} is of another commit, machine or version: it starts anew")
    deadline = time.monotonic() + options.time_limit
    groups = options.only or [name for name in benchmark.groups if not results.has(name)]
    try:
        with _progress() as report:
            complete = run(benchmark, groups, results, report, console, smoke=options.smoke, deadline=deadline)
    except KeyboardInterrupt:
        print(f"{benchmark.name}: interrupted; the same command continues from {results.path}", file=sys.stderr)
        return 130
    except (DeviceLostError, OSError) as error:
        print(f"{benchmark.name}: {error}", file=sys.stderr)
        return 1
    for title, rows in results.tables.items():
        console.print(table_of_rows(title, rows).drawn())
    named = "numbers to reach" + ", named after the full run" * options.smoke
    console.print(table_of_bars(results.bars, named).drawn())
    if results.records:
        figure = draw(results.path)
        console.print(f"results {results.path}" + (f"\nfigure  {figure}" if figure else ""))
        console.print(f"page    {write_page(results.path)}")
    return 0 if complete else 1


def run(
    benchmark: Benchmark,
    groups: list[str],
    results: Results,
    report,
    console: Console,
    *,
    smoke: bool,
    deadline: float = float("inf"),
) -> bool:
    """Measures groups, one after another; each is in the results file before the next begins. Returns whether all of
    them are: one that cannot be set up is left for the next run, as is one of which the deadline left cases out.
    """
    sizes, complete = benchmark.smoke if smoke else benchmark.full, True
    if not smoke:
        began = time.perf_counter()
        errors = compile_ahead(benchmark, groups, sizes, lambda done, total: report("compiling", None, done, total))
        console.print(f"compiled ahead in {time.perf_counter() - began:.0f} s")
        for title, error in errors.items():
            console.print(f"  {title}: {error}", markup=False)
    for i, name in enumerate(groups):

        def told(doing: str, title: str | None, done: int = i, name: str = name) -> None:
            report(f"{name}: {doing}", title, done, len(groups))

        began = time.perf_counter()
        try:
            records = measure(benchmark, name, sizes, told, deadline)
        except (DeviceLostError, OSError):
            raise
        except Exception:  # not of one kind, those have records, but of the group's own inputs
            console.print(f"{name} could not be measured:\n{traceback.format_exc()}", markup=False)
            complete = False
            continue
        facts = {"seconds": round(time.perf_counter() - began, 1), "smoke": smoke}
        if skipped := sum(record.get("error") == SKIPPED for record in records):
            facts["skipped"] = skipped
            console.print(f"{name}: {skipped} cases were skipped, as the time limit was reached", style="red")
            complete = False
        if rates := [r["tflops"] for r in records if r["kind"] == CUBLAS and "tflops" in r]:
            facts["cublas_tflops"] = statistics.median(rates)
        results.add(name, records, **facts)
        console.print(table_of(name, records, facts["seconds"]).drawn())
    return complete


@contextmanager
def _progress() -> Iterator:
    """A bar on stderr, where that is a terminal; yields report(doing, title, done, total)."""
    console = Console(stderr=True)
    columns = (BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def report(doing: str, title: str | None, done: int, total: int) -> None:
            bar.update(task, description=" ".join(filter(None, (doing, title))), completed=done, total=total)

        yield report
