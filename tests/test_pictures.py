"""The charts of the committed runs at their real sizes: no text overlaps, is cut off or is too small. CPU only.

The smallest width at which a README shows a picture is 500 pixels.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from matplotlib.lines import Line2D
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from tests.test_headline import drawn
from tests.test_plots import write
from tritonconv.errors import ResultsError
from tritonconv.lab.bench import results
from tritonconv.plots import charts, roofline

EXAMPLES = Path(__file__).parents[1] / "plots" / "examples"
FOLDERS = sorted({path.parent.name for path in EXAMPLES.glob("*/*.jsonl")})
NARROW, SMALLEST = 500, 6.0  # pixels: the picture's width, the size of its smallest text there


def corners(text: Text) -> np.ndarray:
    """The corners (4, 2) of a text in pixels, turned as it is."""
    turned, text_box = text.get_rotation(), text.get_window_extent()
    if not turned % 90:
        return text_box.corners()[[0, 1, 3, 2]]
    angle = np.radians(turned)
    text.set_rotation(0)
    level = text.get_window_extent()
    text.set_rotation(turned)
    half = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]]) * (level.width / 2, level.height / 2)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return half @ turn + np.mean([text_box.min, text_box.max], axis=0)


def apart(one: np.ndarray, other: np.ndarray, slack: float = 1.0) -> bool:
    """Whether a line separates two convex shapes, but for ``slack`` pixels."""
    for shape in (one, other):
        for edge in np.roll(shape, 1, axis=0) - shape:
            across = np.array([-edge[1], edge[0]]) / (np.hypot(*edge) or 1.0)
            mine, theirs = one @ across, other @ across
            if mine.max() <= theirs.min() + slack or theirs.max() <= mine.min() + slack:
                return True
    return False


def shown_texts(figure) -> list[Text]:
    """The texts that are seen: no ticks outside their axis."""
    unseen = {
        tick.label1
        for axes in figure.axes
        for axis in (axes.xaxis, axes.yaxis)
        for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks())
        if not min(axis.get_view_interval()) <= tick.get_loc() <= max(axis.get_view_interval())
    }
    found = set(figure.findobj(Text)) - unseen
    return [text for text in found if text.get_text().strip() and text.get_visible()]


def overlapping(figure) -> list[tuple[str, str]]:
    """Pairs of texts that overlap."""
    texts = shown_texts(figure)
    boxes, shapes = [text.get_window_extent() for text in texts], [corners(text) for text in texts]
    return [
        (texts[i].get_text(), texts[j].get_text())
        for i in range(len(texts))
        for j in range(i)
        if Bbox.intersection(boxes[i], boxes[j]) and not apart(shapes[i], shapes[j])
    ]


def covered(figure) -> list[tuple[str, float, float]]:
    """Texts inside of axes that cover the middle of a mark."""
    found = []
    for axes in figure.axes:
        marks = [
            line for line in axes.lines if isinstance(line, Line2D) and line.get_marker() not in ("", "None", None)
        ]
        points = [tuple(axes.transData.transform(point)) for line in marks if line.get_transform() is not axes.transAxes
                  for point in zip(*line.get_data(), strict=True)]  # fmt: skip
        for text in axes.texts:
            shape = corners(text)
            dot = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]])
            found += [(text.get_text(), *point) for point in points if not apart(shape, np.array(point) + dot, 0.0)]
    return found


def smallest(figure) -> float:
    """Pixels of the smallest text where the picture is shown at its narrowest."""
    return min(text.get_fontsize() for text in shown_texts(figure)) / 72 * NARROW / figure.get_size_inches()[0]


@pytest.mark.parametrize("folder", FOLDERS)
def test_no_text_of_a_committed_run_overlaps_or_is_too_small(folder):
    run, found = results.load(EXAMPLES / folder), []
    for name in charts.names():
        try:
            figure, _ = drawn(charts.chart(name), run)  # which holds that each text lies inside
        except ResultsError:
            continue
        found.append(name)
        assert overlapping(figure) == [], name
        assert smallest(figure) >= SMALLEST, name
        if name == "roofline":
            assert covered(figure) == []
            named = [len(axes.texts) for axes in figure.axes]
            assert min(named) >= 2 + 5, named  # its roofs, and layers
    assert {"headline", "best", "roofline", "speedup", "percent"} <= set(found)


@pytest.mark.parametrize("layers", [1, 8, 77])
def test_no_label_of_a_roofline_overlaps(tmp_path, layers):
    figure, _ = drawn(roofline, write(tmp_path, layers, fast=40.0))
    assert overlapping(figure) == covered(figure) == []


def test_the_check_finds_an_overlap(tmp_path):
    figure, _ = drawn(roofline, write(tmp_path, 3))
    axes, label = figure.axes[0], figure.axes[0].texts[-1]
    axes.text(*label.get_position(), "over it", fontsize=6)
    assert [pair for pair in overlapping(figure) if "over it" in pair]
    row = next(line for line in axes.lines if line.get_marker() == "o")
    axes.text(row.get_xdata()[0], row.get_ydata()[0], "a mark", va="center", ha="center")
    assert "a mark" in {text for text, *_ in covered(figure)}
