"""`demo`: generate for a few dozen prompts, and compare with `model.generate`."""

from __future__ import annotations

import argparse
import random
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel

from .. import AsyncBatchingConfig, bench, shapes
from .arguments import DTYPES, add_model, load, loading, positive


_TEXTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "In the year 1969, the first",
    "A recipe for bread: take",
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("demo", help="generate for a few dozen prompts and compare with model.generate")
    parser.set_defaults(run=run)
    parser.add_argument("--requests", type=positive, default=40, help="how many prompts (default: 40)")
    parser.add_argument("--new-tokens", type=positive, default=32, help="new tokens each, at most (default: 32)")
    add_model(parser)
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="default: float32, which is exact")


def run(options: argparse.Namespace) -> None:
    """Generate with overlap on and off, and count the requests that match `model.generate` token for token."""
    console = Console()
    model = load(options, options.dtype, console)
    prompts = _prompts(options, model)
    config = GenerationConfig(max_new_tokens=options.new_tokens, do_sample=False)
    runs = {"overlap on": AsyncBatchingConfig(), "overlap off": AsyncBatchingConfig(overlap=False)}

    speeds, answers = {}, {}
    for flag in runs.values():  # what is compiled or captured once is not what the demo measures
        model.generate_batch(prompts[:4], generation_config=config, async_batching=flag)
    for name, flag in runs.items():
        begin = time.perf_counter()
        outputs = model.generate_batch(prompts, generation_config=config, async_batching=flag, progress_bar=True)
        seconds = time.perf_counter() - begin
        answers[name] = [output.generated_tokens for output in outputs.values()]
        speeds[name] = sum(map(len, answers[name])) / seconds

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    matches = dict.fromkeys(runs, 0)
    begin = time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("comparing with model.generate", total=len(prompts))
        for i, prompt in enumerate(prompts):
            ids = torch.tensor([prompt], device=model.device)
            expected = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
            for name in runs:
                matches[name] += answers[name][i] == expected[0, len(prompt) :].tolist()
            progress.update(task, advance=1)
    reference = sum(map(len, answers["overlap on"])) / (time.perf_counter() - begin)

    table = Table(title=f"{options.model} in {options.dtype} on {bench.environment(options.device)}")
    if options.device == "cpu":
        table.caption = "on a CPU the lanes are threads of one interpreter: what overlap is worth shows on CUDA"
    table.add_column("")
    for heading in ("requests", "tokens", "tokens/s", "as model.generate"):
        table.add_column(heading, justify="right")
    for name in runs:
        tokens = sum(map(len, answers[name]))
        table.add_row(
            name, str(len(prompts)), f"{tokens:,}", f"{speeds[name]:,.0f}",
            f"{matches[name]} of {len(prompts)}",
        )  # fmt: skip
    table.add_row("model.generate", str(len(prompts)), "", f"{reference:,.0f}", "")
    console.print(table)
    if options.dtype == "float32" and any(count < len(prompts) for count in matches.values()):
        sys.exit("some requests do not match model.generate")


def _prompts(options: argparse.Namespace, model: PreTrainedModel) -> list[list[int]]:
    """Prompts of mixed lengths: text where there is a tokenizer, random ids for a shape with random weights."""
    if options.model not in shapes.SHAPES:
        with loading(options.model):
            tokenizer = AutoTokenizer.from_pretrained(options.model)
        return [tokenizer(_TEXTS[i % len(_TEXTS)]).input_ids for i in range(options.requests)]
    draw = random.Random(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return [[draw.randrange(vocabulary) for _ in range(draw.randint(4, 120))] for _ in range(options.requests)]
