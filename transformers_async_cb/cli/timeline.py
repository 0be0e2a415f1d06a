"""`timeline`: what the CPU and the device do in each step, with overlap on and off."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from .. import bench
from ..timeline import Summary, Timeline, write
from .arguments import add_dtype, add_model, dtype_for, length_range, load, positive, timeline_file


def add_parser(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser("timeline", help="a picture of what the CPU and the device do, overlap on and off")
    parser.set_defaults(run=run)
    plots = importlib.util.find_spec("matplotlib") is not None
    parser.add_argument(
        "files", nargs="*", type=timeline_file, default=["timeline.json", *(["timeline.png"] if plots else [])],
        metavar="FILE", help="a trace for https://ui.perfetto.dev (.json), or a picture (.png, .svg, .pdf; needs "
        "matplotlib); default: timeline.json, and timeline.png",
    )  # fmt: skip
    parser.add_argument("--requests", type=positive, default=32, metavar="N", help="how many (default: 32)")
    for option, default in (("--prompt-tokens", (32, 32)), ("--new-tokens", (128, 128))):
        parser.add_argument(
            option, type=length_range, default=default, metavar="A[-B]", help=f"lengths (default: {default[0]})"
        )
    add_model(parser)
    add_dtype(parser)


def run(options: argparse.Namespace) -> None:
    """Run the requests with overlap on and off, and write what happened to all the files."""
    console = Console()
    model = load(options, dtype_for(options), console)
    workload = bench.Workload(options.requests, options.prompt_tokens, options.new_tokens)
    with console.status("starting") as status:
        timelines = [bench.observe(model, workload, overlap, status.update).timeline for overlap in (True, False)]
    for file in options.files:
        write(file, timelines)
    console.print(_table(options, model, workload, timelines))
    for file in options.files:
        trace = file.endswith(".json")
        console.print(f"written to {file}" + (", which https://ui.perfetto.dev opens" if trace else ""))
    if importlib.util.find_spec("matplotlib") is None:
        console.print("a picture needs matplotlib: pip install 'transformers-async-cb[plot]'", markup=False)


def _table(
    options: argparse.Namespace, model: PreTrainedModel, workload: bench.Workload, timelines: list[Timeline]
) -> Table:
    table = Table(
        title=f"{options.model}: {workload}",
        caption="times a step are medians, but the idle time's mean; " + bench.environment(options.device),
    )
    if model.device.type == "cpu":
        table.caption += "; on a CPU the lanes are threads: what overlap is worth shows on CUDA"
    table.add_column("")
    summaries = [timeline.summary() for timeline in timelines]
    for timeline in timelines:
        table.add_column(timeline.title, justify="right")
    new_tokens = sum(workload.limits())
    rows = {
        "tokens/s": lambda s: f"{new_tokens / s.seconds:,.0f}",
        "steps": lambda s: f"{s.steps:,}",
        f"{timelines[0].device} active": lambda s: f"{s.active:.1%}",
        "step, ms": lambda s: f"{s.step_ms:.3f}",
        "idle before the next, ms": lambda s: f"{s.gap_ms:.3f}",
        "copy-in, ms": lambda s: f"{s.copies_ms['copy_in']:.3f}",
        "copy-out, ms": lambda s: f"{s.copies_ms['copy_out']:.3f}",
        "host's work, ms": lambda s: f"{s.host_ms:.3f}",
        **{f"  {phase}": _phase(phase) for phase in ("read", "plan", "stage", "launch", "retire", "deliver")},
        "host waits, ms": _phase("wait"),
    }
    for name, cell in rows.items():
        table.add_row(name, *map(cell, summaries))
    return table


def _phase(phase: str) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        return f"{summary.phases_ms[phase]:.3f}"

    return cell
