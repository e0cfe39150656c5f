"""Places small labels beside points so that none covers a point or another label."""

from __future__ import annotations

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patheffects import AbstractPathEffect, withStroke

# Distances (points) and directions (degrees) that are tried in turn around a point.
RADII = (4.5, 7, 10, 14, 18, 23, 29, 36, 44)
DIRECTIONS = (0, 45, -45, 90, -90, 135, -135, 180, 22, -22, 67, -67, 112, -112, 157, -157)
LEADER_FROM = 8.0  # points; a label farther away gets a thin line to its point
GAP = 0.7  # points between labels

Box = tuple[float, float, float, float]  # left, bottom, right, top in pixels


class Placer:
    """Remembers what is taken in one axes whose limits and position are final. Lengths are in points."""

    def __init__(self, axes: Axes, canvas: FigureCanvasAgg) -> None:
        self._axes = axes
        self._pixels = canvas.figure.dpi / 72
        self._renderer = canvas.get_renderer()
        self._taken: list[Box] = []
        self._halo: list[AbstractPathEffect] = [withStroke(linewidth=1.2, foreground="white")]

    def block_point(self, x: float, y: float, radius: float) -> None:
        """Keeps labels off a mark at data coordinates."""
        px, py = self._axes.transData.transform((x, y))
        reach = radius * self._pixels
        self._taken.append((px - reach, py - reach, px + reach, py + reach))

    def block_line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Keeps labels off a line between two points in data coordinates that is straight on the page."""
        (x0, y0), (x1, y1) = self._axes.transData.transform((start, end))
        reach = 1.5 * self._pixels
        steps = max(1, int(max(abs(x1 - x0), abs(y1 - y0)) / (2 * reach)))
        self._block_between((x0, y0), (x1, y1), steps, reach)

    def _block_between(self, start: tuple[float, float], end: tuple[float, float], steps: int, reach: float) -> None:
        """Small boxes from one place to another, in pixels."""
        for step in range(steps + 1):
            x, y = (a + (b - a) * step / steps for a, b in zip(start, end, strict=True))
            self._taken.append((x - reach, y - reach, x + reach, y + reach))

    def place(self, text: str, x: float, y: float, fontsize: float) -> None:
        """Writes ``text`` near data point (x, y), at the first place that is free, else where it overlaps least."""
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
        if not inside.any():  # the point lies outside the frame
            label.remove()
            return
        overlaps = np.where(inside, self._overlaps(boxes), np.inf)
        best = int(np.argmin(overlaps))  # the first of equals: near before far
        cx, cy = self._axes.transData.inverted().transform(centres[best])
        label.set_position((cx, cy))
        self._taken.append(tuple(boxes[best]))
        if radii[best] >= LEADER_FROM:
            self._leader(point, centres[best], half)

    def _around(self, point, half: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
        """Centres (pixels) of the places that are tried, and their distances (points) from point to label."""
        radii = np.repeat(RADII, len(DIRECTIONS))
        angles = np.radians(np.tile(DIRECTIONS, len(RADII)))
        reach = radii * self._pixels
        # Beside, above, or with a corner towards the point: the label itself never covers it.
        dx = np.cos(angles) * reach + half[0] * np.clip(1.5 * np.cos(angles), -1, 1)
        dy = np.sin(angles) * reach + half[1] * np.clip(1.5 * np.sin(angles), -1, 1)
        return np.stack((point[0] + dx, point[1] + dy), axis=1), radii

    def _overlaps(self, boxes: np.ndarray) -> np.ndarray:
        """The area (square pixels) that each box shares with what is taken."""
        if not self._taken:
            return np.zeros(len(boxes))
        taken = np.array(self._taken)[None]
        mine = boxes[:, None]
        width = np.minimum(mine[..., 2], taken[..., 2]) - np.maximum(mine[..., 0], taken[..., 0])
        height = np.minimum(mine[..., 3], taken[..., 3]) - np.maximum(mine[..., 1], taken[..., 1])
        return (np.clip(width, 0, None) * np.clip(height, 0, None)).sum(axis=1)

    def _leader(self, point, centre, half: tuple[float, float]) -> None:
        dx, dy = centre[0] - point[0], centre[1] - point[1]
        # It ends where the straight line to the centre meets the label.
        share = min(half[0] / abs(dx) if dx else math.inf, half[1] / abs(dy) if dy else math.inf)
        end = (centre[0] - dx * share, centre[1] - dy * share)
        (x0, y0), (x1, y1) = self._axes.transData.inverted().transform((point, end))
        self._axes.plot([x0, x1], [y0, y1], color="#9A9A9A", linewidth=0.35, zorder=2.5)

    def along(
        self,
        text: str,
        start: tuple[float, float],
        towards: tuple[float, float] | None,
        fontsize: float,
        ha: str = "left",
        below: bool = False,
    ) -> None:
        """Writes ``text`` just above a line through ``start``, or ``below`` it, turned to the direction of ``towards``
        (None: level)."""
        (px, py), angle = self._axes.transData.transform(start), 0.0
        if towards is not None:
            qx, qy = self._axes.transData.transform(towards)
            angle = math.atan2(qy - py, qx - px)
        lift = (-2.2 if below else 2.2) * self._pixels
        place = (px - lift * math.sin(angle), py + lift * math.cos(angle))
        cx, cy = self._axes.transData.inverted().transform(place)
        label = self._axes.text(
            cx, cy, text, rotation=math.degrees(angle), rotation_mode="anchor", ha=ha,
            va="top" if below else "bottom",
            fontsize=fontsize, zorder=1.5,
        )  # fmt: skip
        label.set_path_effects(self._halo)
        box = label.get_window_extent(self._renderer)
        if not angle:
            self._taken.append((box.x0, box.y0, box.x1, box.y1))
            return
        # Small boxes along a turned label: the box around all of it would block far too much.
        steps = max(1, int(box.width / (3 * self._pixels)))
        self._block_between((box.x0, box.y0), (box.x1, box.y1), steps, 4 * self._pixels)
