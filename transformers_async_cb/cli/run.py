"""`run`: generate for all rows of a file."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import closing
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import ContinuousBatchingConfig, GenerationConfig

from .. import AsyncBatchingConfig, shapes
from ..bulk import COLUMNS, Answers, Source, answer_all
from .arguments import add_dtype, add_model, dtype_for, load, loading, number, positive, timeline_file


# Seconds from one look at the engine to the next.
_REFRESH = 0.2


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "run",
        help="generate for all rows of a file, and go on after a kill",
        description="Generate for all rows of INPUT and write a line of JSON for each to OUTPUT when it is done: its "
        "index, the output or an error, and the row. The same command again goes on with the rows that are not done. "
        "Ends with 1 if a row failed.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("input", metavar="INPUT", help="a JSONL file, or a folder of the datasets library")
    parser.add_argument("output", metavar="OUTPUT", help="a JSONL file, new or of the same run")
    parser.add_argument(
        "--column", help="texts, chats (lists of messages) or lists of token ids; by default the first that is there "
        f"of {', '.join(COLUMNS)}",
    )  # fmt: skip
    parser.add_argument("--split", default="train", help="of a dataset that has several (default: train)")
    add_model(parser)
    add_dtype(parser)
    sampling = parser.add_argument_group("generation, the model's own settings by default")
    sampling.add_argument("--max-new-tokens", type=positive, metavar="N")
    sampling.add_argument(
        "--temperature", type=number(0), metavar="T", help="0 takes the most likely token, above 0 samples"
    )
    sampling.add_argument("--top-p", type=float, metavar="P")
    sampling.add_argument("--top-k", type=int, metavar="K")
    sampling.add_argument(
        "--seed", type=int, default=0, help="a row's tokens depend on it and on the row (default: 0)"
    )
    sampling.add_argument(
        "--set", type=_setting, action="append", default=[], metavar="NAME=VALUE",
        help="any other of GenerationConfig, as JSON: repetition_penalty=1.1",
    )  # fmt: skip
    parser.add_argument(
        "--window", type=positive, default=4096, metavar="N", help="rows in memory at a time (default: 4096)"
    )
    parser.add_argument("--timeline", type=timeline_file, metavar="FILE", help="what the CPU and the device did")


def run(options: argparse.Namespace) -> None:
    """Generate for the rows that are not done."""
    console = Console(stderr=True)
    generation = _generation(options)
    try:
        source = Source(options.input, options.split)
        column = options.column or source.column()
        answers = Answers(options.output, _settings(options, column, generation))
        total, before = len(source), answers.count
        with closing(answers):
            if before:
                answers.check(source)
                console.print(f"{before:,} of {total:,} rows are done already", highlight=False)
            if before < total:
                _generate(options, console, source, column, answers, total, generation)
    except (OSError, RuntimeError, ValueError) as error:
        sys.exit(f"transformers-async-cb run: {error}")
    console.print(f"{answers.count:,} rows are done, {answers.failed:,} of them failed", highlight=False)
    if answers.failed:
        sys.exit(1)


def _generate(
    options: argparse.Namespace,
    console: Console,
    source: Source,
    column: str,
    answers: Answers,
    total: int,
    generation: dict[str, Any],
) -> None:
    model = load(options, dtype_for(options), console)
    with loading(options.model):
        tokenizer = shapes.load_tokenizer(options.model)
    manager = model.init_continuous_batching(
        GenerationConfig(**generation),
        ContinuousBatchingConfig(seed=options.seed),
        tokenizer=tokenizer,
        async_batching=AsyncBatchingConfig(timeline=options.timeline),
    )
    columns = (
        BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )  # fmt: skip
    try:
        with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
            task, shown = progress.add_task("", total=total, completed=answers.count), [0.0]

            def show() -> None:
                if progress.get_time() - shown[0] > _REFRESH:
                    shown[0] = progress.get_time()
                    progress.update(task, completed=answers.count, description=manager.metrics().brief)

            manager.start()
            answer_all(manager, tokenizer, source, column, answers, options.window, show)
            progress.update(task, completed=answers.count)
        manager.stop()
    except KeyboardInterrupt:
        sys.exit(f"interrupted: {answers.count:,} of {total:,} rows are done, the same command goes on")
    finally:
        manager.stop(hard_stop=True)


def _generation(options: argparse.Namespace) -> dict[str, Any]:
    """What was said of `GenerationConfig`; who says how to sample does sample."""
    settings = {name: getattr(options, name) for name in ("max_new_tokens", "top_p", "top_k")}
    if options.temperature is not None:
        settings["do_sample"] = options.temperature > 0
    elif options.top_p is not None or options.top_k is not None:
        settings["do_sample"] = True
    settings["temperature"] = options.temperature or None
    settings |= dict(options.set)
    return {name: value for name, value in settings.items() if value is not None}


def _settings(options: argparse.Namespace, column: str, generation: dict[str, Any]) -> dict[str, Any]:
    """What the answers depend on."""
    return {
        "input": options.input, "split": options.split, "column": column, "model": options.model,
        "dtype": dtype_for(options), "seed": options.seed, "generation": generation,
    }  # fmt: skip


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or name not in vars(GenerationConfig()):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE with a name of GenerationConfig")
    if name == "num_return_sequences":
        raise argparse.ArgumentTypeError("num_return_sequences: a row gets one answer; for more, repeat the row")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value  # a text, without its quotes
