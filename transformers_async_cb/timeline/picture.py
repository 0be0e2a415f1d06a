"""A timeline as a picture: the CPU and the device's three lanes, over a few steps. Needs matplotlib."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

from ..recorder import HOST_PHASES, LANES, Span
from . import Timeline


if TYPE_CHECKING:
    from matplotlib.axes import Axes


# One colour for even steps and one for odd ones, on all lanes, so that the eye can follow a step. They and the red
# differ in lightness, too: after Okabe and Ito, "Color Universal Design" (2008), https://jfly.uni-koeln.de/color/.
STEPS, ON_STEPS = ("#0072b2", "#86c5ec"), ("white", "#0b2f49")
WAITING, ON_WAITING = "#eceef1", "#6b7682"
IDLE = "#d55e00"

# Steps that a picture shows: enough to see that they are alike, few enough to tell them apart.
SHOWN = 5

# Lanes from the top, and how high they are.
_ROWS = {"CPU": 1.0, "copy_in": 0.5, "compute": 1.0, "copy_out": 0.5}
_SPACING = 0.3
_HEIGHT = sum(_ROWS.values()) + _SPACING * (len(_ROWS) + 1)

# Characters that fit into a picture's width, about, at the size of the labels; and the least share of it that work
# gets, so that it shows.
_CHARACTERS, _LEAST = 110, 0.0025


class Window(NamedTuple):
    """From the begin of one step to that of another, `SHOWN` later where there are so many."""

    begin: float
    end: float

    @classmethod
    def of(cls, timeline: Timeline) -> Window:
        """The typical one: as long as the median of all that are steps of decoding, with as many requests as most."""
        steps = timeline.lanes["compute"]
        if len(steps) <= SHOWN:
            return cls(steps[0].begin, steps[-1].end)
        sizes = [timeline.sizes[span.step] for span in steps]
        usual = Counter(size.decodes for size in sizes if size.decodes == size.tokens).most_common(1)
        alike = [bool(usual) and size.decodes == size.tokens == usual[0][0] for size in sizes]
        windows = [cls(steps[i].begin, steps[i + SHOWN].begin) for i in range(len(steps) - SHOWN)]
        typical = [window for i, window in enumerate(windows) if all(alike[i : i + SHOWN + 1])] or windows
        return sorted(typical, key=lambda window: window.end - window.begin)[len(typical) // 2]


def draw(file: str, timelines: list[Timeline]) -> None:
    """Draw timelines one above the other, each over some typical steps, all at the same scale."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    windows = [Window.of(timeline) for timeline in timelines]
    width = max(window.end - window.begin for window in windows)
    with rc_context({"font.size": 9, "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 0.55 + 2.3 * len(timelines)), layout="constrained")
        panels = figure.subplots(len(timelines), sharex=True, squeeze=False)[:, 0]
        for axes, timeline, window in zip(panels, timelines, windows, strict=True):
            _draw_panel(axes, timeline, window, width)
        panels[-1].set_xlabel("ms")
        legend = [
            Patch(color=STEPS[0], label="even steps"),
            Patch(color=STEPS[1], label="odd steps"),
            Patch(facecolor=WAITING, edgecolor=ON_WAITING, linewidth=0.4, label="CPU waits"),
            Patch(color=IDLE, label=f"{timelines[0].device} idle"),
        ]
        figure.legend(handles=legend, loc="outside lower center", ncols=4, frameon=False, handlelength=1.2)
        figure.savefig(file, dpi=200)


def _draw_panel(axes: Axes, timeline: Timeline, window: Window, width: float) -> None:
    tops, top = {}, _HEIGHT - _SPACING
    for lane, height in _ROWS.items():
        tops[lane] = top
        top -= height + _SPACING

    def box(lane: str, span: Span, colour: str, label: str = "", on_colour: str = "white") -> None:
        begin, end = max(span.begin, window.begin), min(span.end, window.begin + width)
        if end <= begin:
            return
        least = 0 if colour == IDLE else _LEAST * width
        left, length, height = (begin - window.begin) * 1e3, max(end - begin, least) * 1e3, _ROWS[lane]
        axes.broken_barh([(left, length)], (tops[lane] - height, height), facecolor=colour, linewidth=0)
        if label and len(label) + 1 < _CHARACTERS * (end - begin) / width:
            axes.text(
                left + length / 2, tops[lane] - height / 2, label, color=on_colour, ha="center", va="center",
                fontsize=8, clip_on=True,
            )  # fmt: skip

    for span in timeline.host:
        if span.phase in HOST_PHASES:
            box("CPU", span, STEPS[span.step % 2], span.phase, ON_STEPS[span.step % 2])
        else:
            label = f"wait for step {span.step}" if span.phase == "wait" else span.phase
            box("CPU", span, WAITING, label, ON_WAITING)
    for lane in LANES:
        for span in timeline.lanes[lane]:
            box(lane, span, STEPS[span.step % 2], f"step {span.step}", ON_STEPS[span.step % 2])
    for gap in timeline.gaps:
        box("compute", gap, IDLE)

    summary = timeline.summary()
    phases = ", ".join(f"{phase} {summary.phases_ms[phase]:.2f}" for phase in ("plan", "stage", "launch", "retire"))
    axes.set_title(timeline.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_title(
        f"{timeline.device} active {summary.active:.1%}  ·  a step: {summary.step_ms:.2f} ms, "
        f"then idle {summary.gap_ms:.2f} ms\nhost {summary.host_ms:.2f} ms a step: {phases}",
        loc="right",
        fontsize=8.5,
    )
    axes.set_xlim(0, width * 1e3)
    axes.set_ylim(0, _HEIGHT)
    axes.set_yticks(
        [tops[lane] - height / 2 for lane, height in _ROWS.items()],
        ["CPU", *(f"{timeline.device} {lane.replace('_', '-')}" for lane in LANES)],
    )
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
