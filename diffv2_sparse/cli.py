"""The command line: `diffv2-sparse niah | train | generate | bench`.

Each command reads its options, calls the library and prints. What can go wrong outside the program (a missing file, an
unreadable checkpoint, an impossible length, a full disk, Ctrl-C) ends in one line on stderr and a non-zero exit;
results go to stdout, progress to stderr. Checkpoints are read as safetensors only, and never run code of their own.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated

try:
    import typer
except ModuleNotFoundError:  # only the core was installed
    sys.exit("diffv2-sparse: the commands need more packages: pip install 'diffv2-sparse[models]'")

# torch and transformers are imported inside the commands: `--help` answers at once

CHECKOUT = Path(__file__).resolve().parents[1]  # if this is one: an installed wheel stands in site-packages
BUNDLED = Path(__file__).parent / "assets" / "checkpoint"
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

app = typer.Typer(
    name="diffv2-sparse",
    help="Block-sparse differential attention (DIFF V2) over a YOCO cache: measure it, train it, use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

Model = Annotated[
    str | None,
    typer.Option(help="Checkpoint: a folder or a hub id (safetensors).", show_default="the bundled model"),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, …", show_default="cuda if there is one")]
Seed = Annotated[int, typer.Option(help="Same seed, same prompts, same draws.")]


# Errors


@contextmanager
def one_line_errors(hint: str = ""):
    """Turn what a user or a machine did wrong into one line on stderr and a non-zero exit; bugs keep their traceback.

    Args:
        hint: added where work was cut short: what is kept, and how to continue.
    """
    try:
        yield
    except KeyboardInterrupt:
        _fail(f"interrupted. {hint}", INTERRUPTED)
    except Exception as error:
        if reason := _cut_short(error):
            _fail(f"{reason}. {hint}")
        if isinstance(error, ValueError):
            _fail(str(error))
        if isinstance(error, OSError):
            _fail(": ".join(filter(None, (error.strerror or str(error), error.filename))))
        raise


def _cut_short(error: Exception) -> str | None:
    """What the machine lacked in the middle of the work; None for any other error."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left on device" in text:
        return ": ".join(filter(None, ("the disk is full", getattr(error, "filename", None))))
    if isinstance(error, RuntimeError):
        import torch

        if isinstance(error, torch.OutOfMemoryError):
            return "the device's memory is full; fewer prompts run together need less (niah: --batch 1)"
        if "inline_container" in text:  # torch.save, which does not tell the system's reason
            return "a checkpoint could not be written; is the disk full?"
    return None


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"diffv2-sparse: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


# What the commands share


def _numbers(option: str, text: str, kind: type) -> list:
    """Numbers between commas, `kind` int or float: 1024,8K is [1024, 8192]."""
    try:
        return [_number(part.strip(), kind) for part in text.split(",")]
    except (ValueError, OverflowError):  # OverflowError: "infK"
        example = "1024,8192 or 1K,8K" if kind is int else "0,0.5,1"
        raise ValueError(f"{option}: expected numbers such as {example}, got {text!r}") from None


def _number(text: str, kind: type):
    if kind is int and text[-1:] in ("k", "K"):
        tokens = float(text[:-1]) * 1024
        if tokens != int(tokens):
            raise ValueError(f"{text} is no whole number of tokens")
        return int(tokens)
    return kind(text)


def _read(file: Path) -> str:
    try:
        return file.expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--file: expected UTF-8 text in {file}, found byte {error.start} to be none") from error


def _device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch built without that device
        raise ValueError(f"--device: cannot use {name!r}: {_first_line(error)}") from error


def _find(checkpoint: str) -> str:
    """The folder, or else the hub id, that is meant; ValueError if there is neither."""
    folder = Path(checkpoint).expanduser()
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"--model: expected a checkpoint (a folder with config.json), found none at {folder}")
        return str(folder)
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", checkpoint):  # cannot be a hub id
        raise ValueError(f"--model: found nothing at {folder}")
    from huggingface_hub import HfApi, try_to_load_from_cache

    if try_to_load_from_cache(checkpoint, "config.json") is None:
        try:
            HfApi().model_info(checkpoint, timeout=10)  # asks once, where loading would try again and again
        except Exception as error:  # no network, no such model, no access: many types of many packages
            raise ValueError(f"--model: found no {folder} here, nor on the hub: {_first_line(error)}") from error
    return checkpoint


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def _load(checkpoint: str | None, device):
    """A causal language model in eval mode, float32 on a CPU and as stored elsewhere, and its tokenizer.

    Raises:
        ValueError: nothing is there, it cannot be read, or it lacks weights.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    import diffv2_sparse.yoco  # noqa: F401  its model joins Transformers' Auto classes

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = _find(str(BUNDLED) if checkpoint is None else checkpoint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(
            source,
            use_safetensors=True,
            trust_remote_code=False,
            dtype="float32" if device.type == "cpu" else "auto",
            output_loading_info=True,
        )
    except Exception as error:  # whatever a damaged or foreign checkpoint makes the readers raise
        raise ValueError(f"--model: cannot read the checkpoint {source}: {_first_line(error)}") from error
    if lacking := sorted(report["missing_keys"]):
        raise ValueError(f"--model: the checkpoint {source} lacks weights, {len(lacking)} in all: {lacking[0]}, …")
    return model.to(device).eval(), tokenizer


@contextmanager
def _progress_bar() -> Iterator:
    """A bar with the time left on stderr; yields report(done, total, label)."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        BarColumn(32),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("[dim]{task.description}"),
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet, speed_estimate_period=120) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, label="": bar.update(task, completed=done, total=total, description=label)


# Commands


@app.command(
    epilog="""[bold]Examples[/bold]

diffv2-sparse niah
  the bundled model over 1K to 8K tokens; this is the demo

diffv2-sparse niah --needles 1,2,4,8 --lengths 8K --output runs/multi
  several needles at once, one of them asked for

diffv2-sparse niah --haystack ~/books --seed 1 --trials 20
  your own text

diffv2-sparse niah --model some/llama --modes dense --lengths 4K,16K
  another model, for comparison
"""
)
def niah(
    model: Model = None,
    lengths: Annotated[str, typer.Option(help="Context lengths in tokens; K is 1024.")] = "1K,2K,4K,8K",
    depths: Annotated[str, typer.Option(help="Where the needle stands, 0 (start) to 1 (end).")] = "0,0.25,0.5,0.75,1",
    needles: Annotated[str, typer.Option(help="Needles per prompt; one of them is asked for.")] = "1",
    trials: Annotated[int, typer.Option(help="Prompts per cell.")] = 5,
    modes: Annotated[str, typer.Option(help="Attention modes to compare.")] = "dense,pair_mean,per_class",
    haystack: Annotated[
        str | None,
        typer.Option(help="A text file or a folder of them.", show_default="CPython documentation, held-out topics"),
    ] = None,
    budget: Annotated[
        int | None,
        typer.Option(help="Key blocks each query reads in sparse modes.", show_default="the checkpoint's own"),
    ] = None,
    share_layers: Annotated[
        int | None,
        typer.Option(
            help="The first of every so many cross-decoder layers chooses blocks for all.",
            show_default="the checkpoint's own",
        ),
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Prompts run together; less saves memory.", show_default="all trials of a cell")
    ] = None,
    seed: Seed = 0,
    device: Device = None,
    output: Annotated[Path, typer.Option(help="Folder for cells, results.json and heatmap.png.")] = Path("runs/niah"),
) -> None:
    """Find needles in a haystack: accuracy by mode, context length and depth, and what each mode costs.

    Real text hides "The special magic Oslo number is: 52817." and the model is asked for that number.

    All modes read the same prompts. An interrupted run continues where it stopped: give the same command again.
    """
    kept = f"Finished cells are kept in {output / 'cells'}; the same command continues from them."
    with one_line_errors(kept):
        lengths, depths = _numbers("--lengths", lengths, int), _numbers("--depths", depths, float)
        needles, modes = _numbers("--needles", needles, int), [mode.strip() for mode in modes.split(",")]
        output.mkdir(parents=True, exist_ok=True)

        from rich.console import Console

        from . import niah, niah_answers, niah_report
        from .environment import environment
        from .haystack import documentation, text_from_path

        background = documentation("test") if haystack is None else text_from_path(haystack)
        lm, tokenizer = _load(model, _device(device))
        for name, value in {"budget": budget, "share_layers": share_layers}.items():
            if value is not None and not niah_answers.has_modes(lm):
                raise ValueError(f"{name}: only a model with sparse modes has one; leave it out for this model")
        if budget is not None:
            lm.config.sparse_budget, lm.config.sparse_noise_budget = budget, None
        if share_layers is not None:
            lm.config.sparse_share_layers = share_layers
        with _progress_bar() as report:
            records = niah.evaluate(
                lm,
                tokenizer,
                background,
                output=output,
                lengths=lengths,
                depths=depths,
                needles=needles,
                trials=trials,
                modes=modes,
                seed=seed,
                batch=batch,
                progress=report,
            )
        stamp = environment(
            lm.device,
            checkpoint=model or "bundled",
            dtype=str(lm.dtype).removeprefix("torch."),
            sparse_budget=getattr(lm.config, "sparse_budget", None),
            sparse_share_layers=getattr(lm.config, "sparse_share_layers", None),
            haystack=haystack or "CPython documentation, held-out topics",
            seed=seed,
            batch=batch or trials,
        )
        results, heatmap = niah_report.write_results(output, records, stamp)
        Console().print(niah_report.table(records))
        typer.echo(f"results   {results}\nheat map  {heatmap}")


@app.command(
    "train",
    epilog="""[bold]Examples[/bold]

diffv2-sparse train --output runs/mine
  the recipe that made the bundled model

diffv2-sparse train --recipe my.yaml --output runs/mine --max-minutes 9
  in slices: give the command again to continue
""",
)
def train_command(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints and the trained model.")] = Path("runs/train"),
    recipe: Annotated[
        Path | None, typer.Option(help="A recipe (YAML).", show_default="the bundled recipe.yaml")
    ] = None,
    max_minutes: Annotated[float | None, typer.Option(help="Stop, ready to resume, after this long.")] = None,
) -> None:
    """Train a model by a recipe; a run that stopped continues from its last checkpoint."""
    with one_line_errors(f"What was saved is in {output}; the same command continues from it."):
        from . import train

        plan = train.TrainRecipe.from_yaml(recipe or train.BUNDLED_RECIPE)
        saved = train.train(plan, output, max_minutes=max_minutes)
        done = saved.name == "final"
        typer.echo(f"trained: {saved}" if done else f"stopped at {saved}; the same command continues")


@app.command(
    epilog="""[bold]Examples[/bold]

diffv2-sparse generate --prompt "The standard library"

diffv2-sparse generate --file notes.txt --mode per_class --max-new-tokens 64
"""
)
def generate(
    prompt: Annotated[str | None, typer.Option(help="Text to continue.", show_default=False)] = None,
    file: Annotated[Path | None, typer.Option(help="A text file to continue.", show_default=False)] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Stop after this many tokens.")] = 128,
    mode: Annotated[
        str | None,
        typer.Option(help="dense, pair_mean or per_class.", show_default="the checkpoint's own"),
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token.")] = 0.0,
    model: Model = None,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Continue a prompt or a file; the continuation streams to stdout."""
    with one_line_errors():
        if (prompt is None) == (file is None):
            raise ValueError("expected one of --prompt TEXT and --file FILE")
        text = prompt if file is None else _read(file)

        from .continuation import stream

        lm, tokenizer = _load(model, _device(device))
        with _progress_bar() as report:
            pieces = stream(
                lm,
                tokenizer,
                text,
                mode=mode,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed,
                progress=report,
            )
            first = next(pieces, "")
        typer.echo(first, nl=False)
        for piece in pieces:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


class Benchmark(str, Enum):
    attention = "attention"
    decode = "decode"
    prefill = "prefill"
    generation = "generation"


@app.command(
    epilog="""[bold]Examples[/bold]

diffv2-sparse bench
  attention, everything; one GPU, about five minutes

diffv2-sparse bench attention --only forward --only training
  some groups of it, again

diffv2-sparse bench prefill --time-limit 200
  whole models of 3B: time to the first token and memory, 8K to 1M tokens

diffv2-sparse bench generation
  whole models of 3B: one more token, with and without a CUDA graph

diffv2-sparse bench decode --smoke
  tiny shapes, without a GPU
"""
)
def bench(
    benchmark: Annotated[Benchmark, typer.Argument(help="What is measured.")] = Benchmark.attention,
    only: Annotated[
        list[str] | None,
        typer.Option(help="A group, again; may be given often.", show_default="those not yet measured"),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny shapes, to see that it runs.")] = False,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the results.", show_default="benchmarks/results; runs/bench for --smoke"),
    ] = None,
    time_limit: Annotated[
        float | None, typer.Option(help="Begin nothing after so many seconds; what is left is recorded as skipped.")
    ] = None,
) -> None:
    """Time kernels (attention, decode) and whole models (prefill, generation) on this machine's GPU against what a user
    would run instead.

    Runs the script of that name in benchmarks/ of the source checkout that this package belongs to.

    An interrupted run continues with the groups it lacks: give the same command again.
    """
    with one_line_errors():
        script = CHECKOUT / "benchmarks" / f"{benchmark.value}.py"
        if not ((CHECKOUT / "pyproject.toml").is_file() and script.is_file()):
            raise ValueError(
                "bench: the benchmarks belong to the source checkout and are not installed with the package; clone the "
                "repository and run the command there, after pip install -e '.[models]'"
            )
        options = [f"--only={group}" for group in only or []] + ["--smoke"] * smoke
        options += [] if output is None else [f"--output={output}"]
        options += [] if time_limit is None else [f"--time-limit={time_limit}"]
        path = os.pathsep.join(filter(None, (str(CHECKOUT), os.environ.get("PYTHONPATH"))))
        try:
            done = subprocess.run([sys.executable, str(script), *options], env=os.environ | {"PYTHONPATH": path})
        except KeyboardInterrupt:  # the script has it, too, and says what is kept
            raise typer.Exit(INTERRUPTED) from None
        if done.returncode:
            raise typer.Exit(done.returncode)


if __name__ == "__main__":
    app()
