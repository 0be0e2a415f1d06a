"""The console command."""

from __future__ import annotations

import argparse
import json
import random
import sys
import time

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from . import AsyncBatchingConfig, __version__, bench, shapes


_TEXTS = (
    "The capital of France is",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The three laws of motion say that",
    "In the year 1969, the first",
    "A recipe for bread: take",
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line `arguments`, by default the process's own."""
    parser = argparse.ArgumentParser(
        prog="transformers-async-cb", description="Asynchronous continuous batching for Hugging Face transformers."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    demo_parser = commands.add_parser("demo", help="generate for a few dozen prompts and compare with model.generate")
    demo_parser.set_defaults(run=demo)
    demo_parser.add_argument("--requests", type=int, default=40, help="how many prompts (default: 40)")
    demo_parser.add_argument("--new-tokens", type=int, default=32, help="new tokens each, at most (default: 32)")

    bench_parser = commands.add_parser("bench", help="measure engines side by side")
    bench_parser.set_defaults(run=run_bench)
    bench_parser.add_argument(
        "workload", nargs="?", choices=[*bench.WORKLOADS, "host"], default="small",
        help="requests to generate for, or host: the host's own work for a step, without a device (default: small)",
    )  # fmt: skip
    bench_parser.add_argument(
        "--engines", nargs="+", choices=bench.ENGINES, default=["ours", "ours-no-overlap", "transformers"]
    )
    bench_parser.add_argument("--repeats", type=int, default=3, help="measured runs of each (default: 3)")
    bench_parser.add_argument(
        "--patience", type=float, default=60, metavar="S",
        help="an engine whose first run takes longer than so many seconds is not run again (default: 60)",
    )  # fmt: skip
    bench_parser.add_argument("--json", metavar="FILE", help="write the results there as well")

    for command in (demo_parser, bench_parser):
        command.add_argument("--model", default="tiny", help=f"{', '.join(shapes.SHAPES)}, a folder or a hub name")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    demo_parser.add_argument("--dtype", default="float32", help="float32 (exact, default), bfloat16 or float16")
    bench_parser.add_argument("--dtype", default=None, help="default: bfloat16 on cuda, float32 elsewhere")

    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    options.run(options)


def demo(options: argparse.Namespace) -> None:
    """Generate with overlap on and off, and count the requests that match `model.generate` token for token."""
    console = Console()
    if options.model == "tiny" and options.device == "cpu":
        torch.set_num_threads(1)  # a model this small loses by more
    with console.status(f"loading {options.model}"):
        model = shapes.load(options.model, options.device, getattr(torch, options.dtype))
        prompts = _demo_prompts(options, model)
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
    with Progress(*columns, console=console, transient=True) as progress:
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


def _demo_prompts(options: argparse.Namespace, model: PreTrainedModel) -> list[list[int]]:
    """Prompts of mixed lengths: text where there is a tokenizer, random ids for a shape with random weights."""
    if options.model not in shapes.SHAPES:
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        return [tokenizer(_TEXTS[i % len(_TEXTS)]).input_ids for i in range(options.requests)]
    draw = random.Random(0)
    vocabulary = model.get_input_embeddings().num_embeddings
    return [[draw.randrange(vocabulary) for _ in range(draw.randint(4, 120))] for _ in range(options.requests)]


def run_bench(options: argparse.Namespace) -> None:
    """Measure the engines one after another; the table and the file grow with each."""
    console = Console()
    if options.workload == "host":
        return _bench_host(options, console)
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    with console.status(f"loading {options.model}"):
        model = shapes.load(options.model, options.device, getattr(torch, dtype))
    workload, where = bench.WORKLOADS[options.workload], bench.environment(options.device)
    record = {"workload": options.workload, "model": options.model, "dtype": dtype, "environment": where}
    results: list[dict] = []
    table = Table(
        title=f"{options.workload} ({workload.requests} requests) with {options.model} in {dtype}",
        caption=f"median of the runs after the first, or the first itself if it is the only one; {where}",
    )
    table.add_column("engine")
    for heading in ("tokens/s", "seconds", "runs", "warm-up s", "peak GiB"):
        table.add_column(heading, justify="right")
    for engine in options.engines:
        with console.status(f"{engine}: 1 + {options.repeats} runs of {options.workload}"):
            result = bench.measure(model, engine, workload, options.repeats, options.patience)
        table.add_row(
            result.engine,
            f"{result.tokens_per_second:,.0f}",
            f"{result.tokens / result.tokens_per_second:.2f}",
            str(len(result.seconds)),
            f"{result.warmup_seconds:.1f}",
            "" if result.peak_gib is None else f"{result.peak_gib:.1f}",
        )
        results.append(result._asdict())
        if options.json:  # now, in case the next engine does not come to an end
            with open(options.json, "w") as file:
                json.dump(record | {"results": results}, file, indent=1)
    console.print(table)


def _bench_host(options: argparse.Namespace, console: Console) -> None:
    table = Table(title="host work of a decoding step", caption=bench.environment("cpu"), min_width=60)
    table.add_column("requests", justify="right")
    table.add_column("ms a step", justify="right")
    host_ms = {}
    for requests in bench.HOST_SIZES:
        with console.status(f"{requests} requests"):
            host_ms[str(requests)] = milliseconds = bench.measure_host(requests, repeats=options.repeats)
        table.add_row(f"{requests:,}", f"{milliseconds:.3f}")
    console.print(table)
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"host_ms": host_ms, "environment": bench.environment("cpu")}, file, indent=1)
