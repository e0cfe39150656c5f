"""Frames that charts share: a title, panels side by side or in rows, the footer. Lengths are in inches."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

from tritonconv.lab.bench import noise
from tritonconv.lab.bench.noise import Band
from tritonconv.lab.bench.results import BASELINE, Run
from tritonconv.plots import style

TITLE = 0.42
BELOW = 0.5  # ticks and label of the x axis


class Frame:
    """A figure of panels of one ``size`` in at most ``columns``.

    ``left`` inches come before each panel and ``above`` over it, ``names`` before the first, ``right`` after the last.
    ``heights`` are those of the rows, where they differ.
    """

    def __init__(
        self,
        run: Run,
        title: str,
        notes: Sequence[str],
        size: tuple[float, float],
        panels: int = 1,
        columns: int = 1,
        left: float = 0.6,
        above: float = 0.25,
        names: float = 0.0,
        right: float = 0.2,
        heights: Sequence[float] = (),
    ) -> None:
        self.size, self.left, self.above, self.names = size, left, above, names
        self.columns = min(columns, panels)
        self.heights = list(heights) or [size[1]] * -(-panels // self.columns)
        self.width = max(names + self.columns * (left + size[0]) + right, 3.35)
        self.footer = style.footer_lines(run, notes, self.width)
        self.foot = 0.1 + len(self.footer) * style.FOOTER_LINE
        self.height = TITLE + sum(above + height + BELOW for height in self.heights) + self.foot
        self.figure, self.canvas = style.new_figure(self.width, self.height)
        self.titles: list[Text] = []  # of the panels
        text = self.figure.text(
            0.12 / self.width, 1 - 0.1 / self.height, title, fontsize=10.5, fontweight="bold", va="top"
        )
        room = self.width - 0.24
        wide = text.get_window_extent(self.canvas.get_renderer()).width / self.figure.dpi
        if wide > room:
            text.set_fontsize(10.5 * room / wide)

    def panel(self, index: int, title: str = "", pad: float = 6.0) -> Axes:
        """The axes of a panel, counted from the top left; ``pad`` points under its title."""
        row, column = divmod(index, self.columns)
        low = self.foot + sum(self.above + height + BELOW for height in self.heights[row + 1 :]) + BELOW
        start = self.names + column * (self.left + self.size[0]) + self.left
        box = (start / self.width, low / self.height, self.size[0] / self.width, self.heights[row] / self.height)
        axes = self.figure.add_axes(box)
        self.titles.append(axes.set_title(title, loc="left", fontweight="bold", pad=pad))
        axes.set_axisbelow(True)
        return axes

    def legend(self, handles: Sequence[Line2D | Patch], below: bool = False) -> None:
        """One line at the right of the title, or ``below`` it at the left."""
        place = (0.1, 0.26) if below else (self.width - 0.1, 0.04)
        self.figure.legend(
            handles=handles, loc="upper left" if below else "upper right", ncols=len(handles), borderaxespad=0,
            bbox_to_anchor=(place[0] / self.width, 1 - place[1] / self.height),
            handlelength=1.4, handletextpad=0.3, columnspacing=1.0,
        )  # fmt: skip

    def done(self) -> Figure:
        """The figure with its footer, and the titles of all panels in the size in which the longest fits."""
        longest = max(len(line) for title in self.titles for line in title.get_text().split("\n"))
        # A bold letter is about 0.6 of its size wide, and a title may begin over the names.
        fits = self.size[0] * 72 / (0.66 * longest) if longest else 8.5
        for title in self.titles:
            title.set_fontsize(max(6, min(8.5, fits)))
        style.draw_footer(self.figure, self.footer)
        return self.figure


def log_axes(axes: Axes) -> None:
    """Both axes logarithmic: plain numbers at the decades, none between."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.12g}"))
        axis.set_minor_formatter(NullFormatter())
    axes.grid(which="major", color="#E4E4E4", linewidth=0.5)


def ratio_axis(axes: Axes, low: float, high: float) -> None:
    """A logarithmic x axis of ratios, with a tick at each power of 2."""
    axes.set_xscale("log", base=2)
    low = min(low, 0.48) if low < 0.7 else low  # a loss has a tick to be read by
    axes.set_xlim(low, high)
    ticks = [2.0**power for power in range(-6, 9)]
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.grid(axis="x", color="#DDDDDD", linewidth=0.5)


def names_down(axes: Axes, labels: Sequence[str], fontsize: float = 6.6, heads: Collection[int] = ()) -> None:
    """A label beside each of the lines 0, 1, ... from the top; those of ``heads`` stand over the lines after them."""
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.set_yticks(range(len(labels)), labels, fontsize=fontsize)
    axes.tick_params(axis="y", length=0, pad=3)
    axes.spines["left"].set_visible(False)
    for index, label in enumerate(axes.get_yticklabels()):
        if index in heads:
            label.set_fontweight("bold")
            axes.axhline(index, color=style.LIGHT, linewidth=0.8, zorder=0)
        elif index % 2:
            axes.axhspan(index - 0.5, index + 0.5, color="#F6F6F6", linewidth=0, zorder=0)


def null_band(axes: Axes, run: Run, column: str, colour: str, **kind: str) -> Band | None:
    """Shades what the run's null rows of a kind show around 1: a ratio within differs from 1 by noise alone."""
    rows = [row for row in run.nulls if all(row[key] == value for key, value in kind.items())]
    band = noise.band(rows, column)
    if band is not None:
        axes.axvspan(band.low, band.high, color=colour, alpha=0.35, linewidth=0, zorder=0.5)
    return band


def band_note(run: Run, column: str) -> str:
    """The sentence about the shaded band, or that the run has no null rows to draw one."""
    band = noise.band(run.nulls, column)
    if band is None:
        return "No null rows: torch was not timed against torch in this run."
    return f"Shaded: {BASELINE} against {BASELINE}, {band.rows} null rows, {band}."


def room_for(labels: Sequence[str]) -> float:
    """Inches for labels beside a panel."""
    return 0.3 + 0.057 * max(len(label) for label in labels)
