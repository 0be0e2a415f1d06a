"""`doctor`: what the engine finds on this machine and does with a model."""

from __future__ import annotations

import argparse
import sys
import textwrap
from collections.abc import Iterable

import torch
from rich.console import Console

from .. import doctor
from ..doctor import Finding
from .arguments import add_dtype, add_model, dtype_for, load, positive


_INDENT = 22


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "doctor",
        help="what the engine finds on this machine, does with a model, and gains; fit for a bug report",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--requests", type=positive, default=32, metavar="N", help="to measure with (default: 32)")
    parser.add_argument(
        "--length", type=positive, default=256, metavar="N", help="tokens of each, prompt and answer (default: 256)"
    )
    add_model(parser)
    add_dtype(parser)


def run(options: argparse.Namespace) -> None:
    """Print what was found, what was chosen and why, what was measured, and what to change."""
    console = Console(highlight=False)
    if options.length < 2:
        sys.exit("--length must be 2 or more: a prompt and an answer")
    _print(console, [*doctor.versions(), *doctor.device(options.device), *doctor.backends(options.device)])
    model = load(options, dtype_for(options), console)
    _print(console, doctor.about(model, options.model))
    try:
        room = doctor.capacity(model, options.length)
    except ValueError as error:
        sys.exit(f"the engine does not run this model: {error}")
    if options.length > room.tokens:
        sys.exit(f"--length {options.length}: the cache has room for {room.tokens} tokens of this model, all together")
    holds = f"{room.tokens // options.length:,} requests of {options.length:,} tokens, {room.rows:,} at once"
    console.print("\n[bold]What the engine chooses for this model, and why[/bold]")
    _print(console, [Finding(name, f"{value} ({reason})") for name, value, reason in room.choices])
    _print(console, [Finding("so it holds", holds)])

    if model.device.type == "cuda":
        torch.cuda.empty_cache()
    with console.status("starting") as status:
        try:
            measured = doctor.measure(model, options.requests, options.length, status.update)
        except (RuntimeError, ValueError) as error:
            sys.exit(f"the measurement failed: {error}")
    console.print(
        f"\n[bold]What a step of {options.requests:,} requests takes, at a context near {measured.context:,}[/bold]"
    )
    _print(console, doctor.times(measured))
    console.print("\n[bold]What to change[/bold]")
    for line in doctor.advice(model, room, options.length, measured) or ["nothing: all is as it should be"]:
        console.print(
            textwrap.fill(line, console.width, initial_indent="  * ", subsequent_indent="    "), markup=False
        )


def _print(console: Console, findings: Iterable[Finding]) -> None:
    """Topics on the left, without spaces at the ends of lines, which a bug report would keep."""
    for topic, text in findings:
        lines = textwrap.fill(text, console.width, initial_indent=" " * _INDENT, subsequent_indent=" " * _INDENT)
        console.print(f"  {topic:<{_INDENT - 2}}{lines[_INDENT:]}", markup=False, soft_wrap=True)
