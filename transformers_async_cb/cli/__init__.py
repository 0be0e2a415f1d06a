"""The console command: one file for each of its commands."""

from __future__ import annotations

import argparse
import sys

from transformers.utils import logging

from .. import __version__
from . import bench, demo, doctor, models, run, serve, timeline


COMMANDS = (demo, run, serve, timeline, doctor, bench, models)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments`, by default the process's own."""
    parser = argparse.ArgumentParser(
        prog="transformers-async-cb", description="Asynchronous continuous batching for Hugging Face transformers."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()  # of transformers, whose remarks are on what is as it should be here
    logging.get_logger(f"transformers.{__package__.partition('.')[0]}").setLevel(logging.WARNING)
    try:
        options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)  # as shells have it
