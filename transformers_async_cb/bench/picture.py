"""The results of a benchmark as a picture. Needs matplotlib, which the extra `plot` installs."""

from __future__ import annotations

from typing import Any


OURS, THEIRS, LIMIT = "#2a78b5", "#9aa5b1", "#c0392b"


def draw(file: str, record: dict[str, Any]) -> None:
    """Write a picture of what `bench --json` writes: tokens a second of each engine, and the limit as a line.

    Args:
        file (`str`): its ending says what kind of picture: png, svg, pdf.
    """
    from matplotlib.figure import Figure

    results = [result for result in record["results"] if "error" not in result]
    names = [result["engine"] for result in results]
    speeds = [result["tokens_per_second"] for result in results]
    figure = Figure(figsize=(8, 1.9 + 0.5 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    colours = [OURS if name.startswith("ours") else THEIRS for name in names]
    bars = axes.barh(names, speeds, color=colours, height=0.6)
    labels = [f"{speed:,.0f}" for speed in speeds]
    if results and record["limit_seconds"] is not None:
        limit = results[0]["tokens"] / record["limit_seconds"]
        axes.axvline(limit, color=LIMIT, linestyle="--", linewidth=1.2)
        axes.text(limit, 1.02, f"limit {limit:,.0f}", color=LIMIT, ha="right", transform=axes.get_xaxis_transform())
        labels = [f"{label} ({speed / limit:.0%})" for label, speed in zip(labels, speeds, strict=True)]
    axes.bar_label(bars, labels, padding=4, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    axes.margins(x=0.25)
    axes.set_ylim(len(names) - 0.4, -0.6)  # the first on top
    axes.set_xlabel("tokens/s, median of the runs (more is better)")
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{record['workload']} with {record['model']} in {record['dtype']}\n{record['lengths']}")
    figure.supxlabel(record["environment"], fontsize="small", color="gray")
    figure.savefig(file, dpi=150)
