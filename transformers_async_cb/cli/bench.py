"""`bench`: measure engines side by side."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from transformers import PreTrainedModel

from .. import bench
from ..bench import picture
from .arguments import (
    add_dtype,
    add_model,
    dtype_for,
    length_range,
    load,
    natural,
    output_file,
    picture_file,
    positive,
)


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("bench", help="measure engines side by side")
    parser.set_defaults(run=run)
    parser.add_argument(
        "workload", nargs="?", choices=[*bench.WORKLOADS, "host"], default="small",
        help="requests to generate for, or host: the host's own work for a step, without a device (default: small)",
    )  # fmt: skip
    parser.add_argument("--requests", type=positive, metavar="N", help="in place of the workload's number")
    for option in ("--prompt-tokens", "--new-tokens"):
        parser.add_argument(
            option, type=length_range, metavar="A[-B]", help="lengths from A to B in place of the workload's"
        )
    parser.add_argument(
        "--engines",
        nargs="+",
        type=_engine,
        choices=bench.ENGINES,
        default=["ours", "ours-no-overlap", "transformers"],
    )
    parser.add_argument(
        "--batch-size", type=positive, default=64, metavar="N", help="of generate: prompts at a time (default: 64)"
    )
    parser.add_argument("--repeats", type=natural, default=3, help="measured runs of each (default: 3)")
    parser.add_argument(
        "--patience", type=float, default=60, metavar="S",
        help="an engine whose first run takes longer than so many seconds is not run again (default: 60)",
    )  # fmt: skip
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the results there as well")
    parser.add_argument(
        "--kernels", type=positive, default=0, metavar="N",
        help="profile one more run, and show the N kernels that take longest (CUDA only)",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=picture_file, metavar="FILE", help="and a picture of them there (png, svg, pdf)"
    )
    add_model(parser)
    add_dtype(parser)


def _engine(text: str) -> str:
    if (reason := bench.missing(text)) is not None:
        raise argparse.ArgumentTypeError(reason)
    return text


# Columns of the table: heading, and what stands there for a result. What is not known stays empty.
_COLUMNS: dict[str, Callable[[dict], str]] = {
    "engine": lambda result: result["engine"],
    "tokens/s": lambda result: f"{result['tokens_per_second']:,.0f}",
    "seconds": lambda result: f"{result['tokens'] / result['tokens_per_second']:.2f}",
    "ms a\nstep": lambda result: f"{result['step_ms']:.2f}",
    "host ms\na step": lambda result: f"{result['host_ms']:.3f}",
    "GPU\nactive": lambda result: f"{result['gpu_active']:.1%}",
    "warm-up\ns": lambda result: f"{result['warmup_seconds']:.1f}",
    "peak\nGiB": lambda result: f"{result['peak_gib']:.1f}",
    "of\nlimit": lambda result: f"{result['of_limit']:.0%}",
}


def _cell(column: str, result: dict) -> str:
    try:
        return _COLUMNS[column](result)
    except (KeyError, TypeError):  # not there, or None
        return ""


def run(options: argparse.Namespace) -> None:
    """Measure the engines one after another; the table and the files grow with each. One that fails does not stop the
    others."""
    console = Console()
    if options.workload == "host":
        return _run_host(options, console)
    if options.kernels and not options.device.startswith("cuda"):
        sys.exit(f"--kernels shows what a CUDA device does, the benchmark runs on {options.device}")
    dtype = dtype_for(options)
    model = load(options, dtype, console)
    own = {name: getattr(options, name) for name in bench.Workload._fields if getattr(options, name) is not None}
    workload = bench.WORKLOADS[options.workload]._replace(**own)
    record = {
        "workload": "own lengths" if own else options.workload,
        "lengths": str(workload),
        **workload._asdict(),
        "model": options.model,
        "dtype": dtype,
        "environment": bench.environment(options.device),
        "limit_seconds": None,
        "results": [],
    }
    if model.device.type == "cuda":
        with console.status("measuring the device"):
            rates = bench.measure_rates(model.device, model.dtype)
            record |= {"bytes_per_second": rates.bytes, "flops_per_second": rates.flops}
            record["limit_seconds"] = bench.limit_seconds(model, workload, rates)
    for engine in options.engines:
        with console.status(f"{engine}: 1 + {options.repeats} runs of {record['workload']}"):
            record["results"].append(_measure(engine, model, workload, record["limit_seconds"], options))
        if options.json:  # now, in case the next engine does not come to an end
            with open(options.json, "w") as file:
                json.dump(record, file, indent=1)
        if options.plot:
            picture.draw(options.plot, record)
    console.print(result_table(record, model.device.type))
    for result in record["results"]:
        if result.get("kernels"):
            console.print(_kernel_table(result, options.kernels))
    failed = [result for result in record["results"] if "error" in result]
    for result in failed:
        console.print(f"{result['engine']} failed: {result['error']}", markup=False)
    if failed:
        sys.exit(1)


def _measure(
    engine: str, model: PreTrainedModel, workload: bench.Workload, limit: float | None, options: argparse.Namespace
) -> dict:
    try:
        result = bench.measure(
            model, engine, workload, options.repeats, options.patience, options.batch_size, bool(options.kernels)
        )
    except (RuntimeError, ValueError) as error:
        return {"engine": engine, "error": f"{type(error).__name__}: {error}"}
    speed = result.tokens_per_second
    of_limit = None if limit is None else limit * speed / result.tokens
    record = result._asdict() | {"tokens_per_second": speed, "of_limit": of_limit}
    if (times := result.kernels) is not None:
        record["kernels"] = [kernel._asdict() for kernel in times.kernels]
        record |= {"kernels_busy": times.busy, "kernels_ms": times.ms}
    return record


def _kernel_table(result: dict, most: int) -> Table:
    """The kernels that take longest, of a step where the number of steps is known."""
    steps = result["steps"] or 1
    each = "a step" if result["steps"] else "a run"
    table = Table(
        title=f"{result['engine']}: kernels of one more run, profiled",
        caption=f"{result['kernels_ms'] / steps:.3f} ms {each} from the first to the last, "
        f"in {result['kernels_busy']:.1%} of which one ran",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for heading in (f"ms\n{each}", "share", f"calls\n{each}"):
        table.add_column(heading, justify="right", no_wrap=True, min_width=8)
    table.add_column("kernel", no_wrap=True)
    for kernel in result["kernels"][:most]:
        table.add_row(
            f"{kernel['ms'] / steps:.3f}", f"{kernel['share']:.1%}", f"{kernel['calls'] / steps:.1f}",
            escape(kernel["name"]),
        )  # fmt: skip
    return table


def result_table(record: dict, device: str) -> Table:
    recompiled = sum(result.get("recompiled", 0) for result in record["results"])
    table = Table(
        title=f"{record['workload']} ({record['lengths']}) with {record['model']} in {record['dtype']}",
        caption="medians of the runs after the first, or the first itself if it is the only one; graphs recompiled "
        f"after the first: {recompiled}; {record['environment']}",
        box=box.SIMPLE_HEAD,
        padding=0,
    )
    for column in _COLUMNS:
        heading = column if device == "cuda" else column.replace("GPU", "device")
        table.add_column(heading, justify="left" if column == "engine" else "right", no_wrap=True)
    for result in record["results"]:
        table.add_row(*(_cell(column, result) for column in _COLUMNS))
    return table


def _run_host(options: argparse.Namespace, console: Console) -> None:
    table = Table(title="host work of a decoding step", min_width=60)
    for heading in ("requests", "ms a step", "beside a busy thread"):
        table.add_column(heading, justify="right")
    host_ms, busy_ms = {}, {}
    for requests in bench.HOST_SIZES:
        with console.status(f"{requests} requests"):
            name, repeats = str(requests), max(1, options.repeats)
            host_ms[name] = bench.measure_host(requests, repeats=repeats)
            busy_ms[name] = bench.measure_host(requests, steps=50, repeats=repeats, busy=True)
        table.add_row(f"{requests:,}", f"{host_ms[name]:.3f}", f"{busy_ms[name]:.3f}")
    with console.status("admission"):
        admission_ms = bench.measure_admission(repeats=max(1, options.repeats))
    where = bench.environment("cpu")
    table.caption = f"longest step while 1,024 requests join 32: {admission_ms:.1f} ms; {where}"
    console.print(table)
    if options.json:
        record = {"host_ms": host_ms, "host_ms_busy": busy_ms, "admission_ms": admission_ms, "environment": where}
        with open(options.json, "w") as file:
            json.dump(record, file, indent=1)
