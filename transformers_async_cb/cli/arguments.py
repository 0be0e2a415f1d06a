"""Arguments that several commands take, and the types of their values."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from transformers import PreTrainedModel

from .. import shapes
from ..timeline import PICTURES, check_file


DTYPES = ("float32", "bfloat16", "float16", "float64")


def add_model(parser: argparse.ArgumentParser) -> None:
    """`--model` and `--device`, for `load`."""
    parser.add_argument("--model", default="tiny", help=f"{', '.join(shapes.SHAPES)}, a folder or a hub name")
    add_device(parser)


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_device, default="cuda" if torch.cuda.is_available() else "cpu")


def add_dtype(parser: argparse.ArgumentParser) -> None:
    """`--dtype`, for `dtype_for`."""
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, float32 elsewhere")


def _device(text: str) -> str:
    try:
        torch.zeros(1, device=text).tolist()
    except Exception as error:  # each kind of device raises its own
        raise argparse.ArgumentTypeError(f"{text!r} is no device here: {_in_a_line(error)}") from error
    return text


def dtype_for(options: argparse.Namespace) -> str:
    """What `--dtype` says, or the device's usual one."""
    return options.dtype or ("bfloat16" if options.device.startswith("cuda") else "float32")


def load(options: argparse.Namespace, dtype: str, console: Console) -> PreTrainedModel:
    if options.model == "tiny" and options.device == "cpu":
        torch.set_num_threads(1)  # a model this small loses by more
    with console.status(f"loading {options.model}"), loading(options.model):
        return shapes.load(options.model, options.device, getattr(torch, dtype))


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Within, what keeps a model or its tokenizer from being loaded ends the command, and is what it says."""
    try:
        yield
    except Exception as error:  # files and configs fail in ways of their own
        sys.exit(f"{name!r} cannot be loaded: {_in_a_line(error)}")


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def number(least: float, most: float = math.inf) -> Callable[[str], float]:
    """The type of numbers from `least` to `most`, which are finite."""

    def convert(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (least <= value <= most and math.isfinite(value)):
            allowed = f"of {least:g} or more" if most == math.inf else f"from {least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {allowed}")
        return value

    return convert


def length_range(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    shortest, longest = positive(first), positive(last or first)
    if shortest > longest:
        raise argparse.ArgumentTypeError(f"{text!r} goes down: the smaller length comes first")
    return shortest, longest


def output_file(name: str) -> str:
    """Found out before anything is computed that is to be written there."""
    file = Path(name)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written: there is no folder {str(file.parent)!r}")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{name!r} cannot be written")
    return name


def picture_file(name: str) -> str:
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("a picture needs matplotlib: pip install 'transformers-async-cb[plot]'")
    if Path(name).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"{name!r} must end with one of {', '.join(PICTURES)}")
    return output_file(name)


def timeline_file(name: str) -> str:
    try:
        check_file(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return output_file(name)
