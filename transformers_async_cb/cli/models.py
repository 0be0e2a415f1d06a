"""`models`: every architecture of the installed transformers against `model.generate`, as a table."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter

import torch
import transformers
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from .. import __version__
from ..matrix import FAILING, MODES, TASKS, Verdict, judge_all, model_types
from .arguments import output_file, positive


# Verdicts in the order of the table, and their colours.
_COLOURS = {"wrong": "bold red", "failed": "red", "refused": "yellow", "skipped": "dim", "exact": "green"}


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "models", help="try every model of the installed transformers that generates text, small, against generate"
    )
    parser.set_defaults(run=run)
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="processes side by side (default: 1)")
    parser.add_argument(
        "--task", choices=TASKS, default="text",
        help="models that transformers lists for causal text (the default), for images and text, which are given text "
        "alone, or for text from text",
    )  # fmt: skip
    parser.add_argument("--only", nargs="+", metavar="NAME", help="model types, as in AutoModelForCausalLM")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the table there as well")


def run(options: argparse.Namespace) -> None:
    """Judge, show and save; exits with 1 if a model was wrong or failed."""
    names, console = model_types(options.task), Console()
    if options.only:
        wanted = [name if options.task == "text" else f"{name} ({options.task})" for name in options.only]
        if unknown := sorted(set(wanted) - set(names)):
            sys.exit(f"transformers {transformers.__version__} lists no {', '.join(unknown)}")
        names = wanted
    verdicts = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("models", total=len(names))
        for verdict in judge_all(names, options.jobs):
            verdicts.append(verdict)
            progress.update(task, advance=1, description=verdict.model_type)
    verdicts.sort(key=lambda verdict: names.index(verdict.model_type))
    counts = Counter(verdict.verdict for verdict in verdicts)
    console.print(_table(verdicts, counts))
    if options.json:
        record = {
            "transformers": transformers.__version__,
            "torch": torch.__version__,
            "transformers_async_cb": __version__,
            "counts": dict(counts),
            "models": [verdict._asdict() for verdict in verdicts],
        }
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
            file.write("\n")
    if any(counts[verdict] for verdict in FAILING):
        sys.exit(1)


def _table(verdicts: list[Verdict], counts: Counter[str]) -> Table:
    hows = [*MODES.values(), ""]
    table = Table(
        title=f"{len(verdicts)} model types of transformers {transformers.__version__}, small, against model.generate",
        caption=", ".join(f"{counts[verdict]} {verdict}" for verdict in _COLOURS)
        + "; of the exact ones "
        + ", ".join(
            f"{sum(one.verdict == 'exact' and one.how == how for one in verdicts)} {how}" for how in MODES.values()
        ),
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    table.add_column("model type", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("how", no_wrap=True)
    table.add_column("s", justify="right", no_wrap=True)
    table.add_column("why")
    order = list(_COLOURS)
    for one in sorted(verdicts, key=lambda one: (order.index(one.verdict), -hows.index(one.how))):
        verdict = f"[{_COLOURS[one.verdict]}]{one.verdict}[/]"
        table.add_row(one.model_type, verdict, one.how, f"{one.seconds:.1f}", escape(one.why))
    return table
