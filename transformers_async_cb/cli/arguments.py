"""Arguments that several commands take, and the types of their values."""

from __future__ import annotations

import argparse
import importlib.util

import torch
from rich.console import Console
from transformers import PreTrainedModel

from .. import shapes
from ..timeline import check_file


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`, for `load`."""
    parser.add_argument("--model", default="tiny", help=f"{', '.join(shapes.SHAPES)}, a folder or a hub name")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")


def dtype_for(options: argparse.Namespace) -> str:
    """What `--dtype` says, or the device's usual one."""
    return options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")


def load(options: argparse.Namespace, dtype: str, console: Console) -> PreTrainedModel:
    if options.model == "tiny" and options.device == "cpu":
        torch.set_num_threads(1)  # a model this small loses by more
    with console.status(f"loading {options.model}"):
        return shapes.load(options.model, options.device, getattr(torch, dtype))


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def length_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    shortest, longest = positive(first), positive(last or first)
    if shortest > longest:
        raise argparse.ArgumentTypeError(f"{text!r} goes down: the smaller length comes first")
    return shortest, longest


def picture_file(text: str) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install 'transformers-async-cb[plot]'")
    return text


def timeline_file(name: str) -> str:
    try:
        check_file(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name
