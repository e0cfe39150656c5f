"""Places small labels beside points so that none covers a point or another label."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.text import Text

# Distances (points) and directions (degrees) that are tried in turn around a point.
RADII = (4.5, 7, 10, 14, 18, 23, 29, 36, 44, 54)
DIRECTIONS = (0, 45, -45, 90, -90, 135, -135, 180, 22, -22, 67, -67, 112, -112, 157, -157)
LEADER_FROM = 8.0  # points; a label farther away gets a thin line to its point
GAP = 0.7  # points between labels
STEPS = np.linspace(0, 1, 40)[:, None]  # along a leader, where it is held against what it must not cross

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


class Placer:
    """Remembers what is taken in one axes whose limits and position are final. Lengths are in points."""

    def __init__(self, axes: Axes, canvas: FigureCanvasAgg) -> None:
        self._axes = axes
        self._pixels = canvas.figure.dpi / 72
        self._renderer = canvas.get_renderer()
        self._taken: list[Box] = []
        self._closed: list[Box] = []  # of them what no leader crosses
        self._halo: list[AbstractPathEffect] = [withStroke(linewidth=1.2, foreground="white")]

    def block_point(self, x: float, y: float, radius: float) -> None:
        """Keeps labels off a mark at data coordinates."""
        px, py = self._axes.transData.transform((x, y))
        reach = radius * self._pixels
        self._take((px - reach, py - reach, px + reach, py + reach), closed=False)

    def block_line(self, start: tuple[float, float], end: tuple[float, float], closed: bool = False) -> None:
        """Keeps labels off a line between two points in data coordinates that is straight on the page, and their
        leaders too where it is ``closed``."""
        (x0, y0), (x1, y1) = self._axes.transData.transform((start, end))
        reach = 1.5 * self._pixels
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / (2 * reach)))
        for box in _between((x0, y0), (x1, y1), steps, reach):
            self._take(box, closed)

    def _take(self, box: Box, closed: bool) -> None:
        self._taken.append(box)
        if closed:
            self._closed.append(box)

    def place(self, text: str, x: float, y: float, fontsize: float) -> bool:
        """Writes ``text`` near data point (x, y) at the first place that is free; False, and nothing, where none is."""
        label = self._axes.text(x, y, text, fontsize=fontsize, ha="center", va="center", zorder=6)
        label.set_path_effects(self._halo)
        size = label.get_window_extent(self._renderer)
        half = (size.width / 2 + GAP * self._pixels, size.height / 2)
        point = self._axes.transData.transform((x, y))
        centres, radii = self._around(point, half)
        boxes = np.hstack((centres - half, centres + half))
        frame = self._axes.bbox
        low, high = (frame.x0, frame.y0), (frame.x1, frame.y1)
        inside = (boxes[:, :2] >= low).all(axis=1) & (boxes[:, 2:] <= high).all(axis=1)
        free = inside & self._free(boxes) & ~self._crossed(point, centres)
        if not free.any():
            label.remove()
            return False
        best = int(np.argmax(free))  # the first: near before far
        label.set_position(tuple(self._axes.transData.inverted().transform(centres[best])))
        self._take(tuple(boxes[best]), closed=True)
        if radii[best] >= LEADER_FROM:
            self._leader(point, centres[best], half)
        return True

    def _around(self, point, half: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Centres (pixels) of the places that are tried, and their distances (points) from point to label."""
        radii = np.repeat(RADII, len(DIRECTIONS))
        angles = np.radians(np.tile(DIRECTIONS, len(RADII)))
        reach = radii * self._pixels
        # Beside, above, or with a corner towards the point: the label itself never covers it.
        dx = np.cos(angles) * reach + half[0] * np.clip(1.5 * np.cos(angles), -1, 1)
        dy = np.sin(angles) * reach + half[1] * np.clip(1.5 * np.sin(angles), -1, 1)
        return np.stack((point[0] + dx, point[1] + dy), axis=1), radii

    def _free(self, boxes: np.ndarray) -> np.ndarray:
        """Which of the boxes share nothing with what is taken."""
        if not self._taken:
            return np.ones(len(boxes), bool)
        taken, mine = np.array(self._taken), boxes[:, None]
        apart = (mine[..., :2] >= taken[:, 2:]) | (mine[..., 2:] <= taken[:, :2])
        return np.all(np.any(apart, axis=2), axis=1)

    def _crossed(self, point, centres: np.ndarray) -> np.ndarray:
        """Whether the straight line from ``point`` to each of the centres meets a label or a closed line."""
        if not self._closed:
            return np.zeros(len(centres), bool)
        closed, along = np.array(self._closed), (point + STEPS * (centres[:, None] - point))[:, :, None]
        # The point itself may lie on a line.
        return ((along[:, 1:] >= closed[:, :2]) & (along[:, 1:] <= closed[:, 2:])).all(axis=3).any(axis=(1, 2))

    def _leader(self, point, centre, half: tuple[float, float]) -> None:
        dx, dy = centre[0] - point[0], centre[1] - point[1]
        # It ends where the straight line to the centre meets the label.
        share = min(half[0] / abs(dx) if dx else math.inf, half[1] / abs(dy) if dy else math.inf)
        end = (centre[0] - dx * share, centre[1] - dy * share)
        (x0, y0), (x1, y1) = self._axes.transData.inverted().transform((point, end))
        self._axes.plot([x0, x1], [y0, y1], color="#7A7A7A", linewidth=0.45, zorder=2.5)
        for box in _between(point, end, 8, 0.5 * self._pixels):
            self._take(box, closed=False)

    def along(
        self,
        text: str,
        starts: Sequence[tuple[float, float]],
        towards: tuple[float, float] | None,
        fontsize: float,
        ha: str = "left",
    ) -> None:
        """Writes ``text`` just above a line, turned to the direction of ``towards`` (None: level).

        It begins at the first of ``starts`` where it covers nothing inside the frame, else at the first of all.
        """
        angle = 0.0
        if towards is not None:
            (px, py), (qx, qy) = self._axes.transData.transform((starts[0], towards))
            angle = math.atan2(qy - py, qx - px)
        label = self._axes.text(
            *starts[0], text, rotation=math.degrees(angle), rotation_mode="anchor", ha=ha, va="bottom",
            fontsize=fontsize, zorder=1.5,
        )  # fmt: skip
        label.set_path_effects(self._halo)
        lift = 2.2 * self._pixels * np.array((-math.sin(angle), math.cos(angle)))
        places = self._axes.transData.transform(starts) + lift
        for place in (*places, places[0]):
            covered = self._written(label, place, angle)
            if label.get_window_extent(self._renderer).x0 >= self._axes.bbox.x0 and self._free(np.array(covered)).all():
                break
        for box in covered:
            self._take(box, closed=True)

    def _written(self, label: Text, place: np.ndarray, angle: float) -> list[Box]:
        """The boxes that a label covers which begins at ``place``, in pixels."""
        label.set_position(tuple(self._axes.transData.inverted().transform(place)))
        box = label.get_window_extent(self._renderer)
        if not angle:
            return [(box.x0, box.y0, box.x1, box.y1)]
        # Small boxes along a turned label: the box around all of it would block far too much.
        steps = max(1, int(box.width / (3 * self._pixels)))
        reach = 4 * self._pixels * (1 + label.get_text().count("\n"))
        return _between((box.x0, box.y0), (box.x1, box.y1), steps, reach)


def _between(start: tuple[float, float], end: tuple[float, float], steps: int, reach: float) -> list[Box]:
    """Small boxes from one place to another, in pixels."""
    centres = ([a + (b - a) * step / steps for a, b in zip(start, end, strict=True)] for step in range(steps + 1))
    return [(x - reach, y - reach, x + reach, y + reach) for x, y in centres]
