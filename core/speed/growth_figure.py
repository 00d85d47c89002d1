"""The growth of a step's cost as a figure: one panel for each axis, both scales logarithmic."""

import math
from collections.abc import Mapping
from html import escape
from typing import Any

WIDTH = 300
HEIGHT = 230
MARGIN = 46
"""Size of a panel and of the space around its plot, in pixels."""

LINES = {"seconds": ("#005B96", "time of a step"), "flops": ("#E8641B", "FLOPs of its products")}
"""What is drawn, over its first value: the key of a point, a colour and a name."""


def figure(axes: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """The figure as SVG.

    Args:
        axes: points by value, by the name of the axis; each has the keys of `LINES`.
    """
    parts = []
    for index, (axis, points) in enumerate(axes.items()):
        parts.append(_panel(axis, points, index * WIDTH))
    for index, (colour, name) in enumerate(LINES.values()):
        x = MARGIN + index * 160
        parts.append(f'<rect x="{x}" y="{HEIGHT + 6}" width="12" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 18}" y="{HEIGHT + 12}">{escape(name)}</text>')
    width = WIDTH * max(1, len(axes))
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + 22}" '
        'font-family="sans-serif" font-size="11">'
    )
    return "\n".join([head, '<rect width="100%" height="100%" fill="white"/>', *parts, "</svg>\n"])


def _panel(axis: str, points: Mapping[str, Mapping[str, Any]], left: int) -> str:
    """One panel: each line over the first of its values."""
    values = [float(value) for value in points]
    curves = {}
    for key in LINES:
        first = next(iter(points.values()))[key]
        curves[key] = [point[key] / first for point in points.values()]
    lowest = min(min(curve) for curve in curves.values())
    highest = max(max(curve) for curve in curves.values())
    across = _scale(min(values), max(values), left + MARGIN, left + WIDTH - 14)
    up = _scale(lowest, highest, HEIGHT - MARGIN, 26)
    lines = [f'<text x="{left + MARGIN}" y="16" font-weight="bold">{escape(axis)}</text>']
    bottom = HEIGHT - MARGIN
    lines.append(
        f'<path d="M{left + MARGIN} 26V{bottom}H{left + WIDTH - 14}" fill="none" stroke="#888"/>'
    )
    for value in values:
        lines.append(
            f'<text x="{across(value):.1f}" y="{bottom + 16}" text-anchor="middle">{value:g}</text>'
        )
    for tick in sorted({lowest, 1.0, highest}):
        lines.append(
            f'<text x="{left + MARGIN - 5}" y="{up(tick) + 4:.1f}" text-anchor="end">{tick:.3g}</text>'
        )
    for key, curve in curves.items():
        colour = LINES[key][0]
        places = []
        for value, height in zip(values, curve, strict=True):
            places.append((across(value), up(height)))
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for x, y in places:
            lines.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>')
    return "\n".join(lines)


def _scale(low: float, high: float, begin: float, end: float) -> Any:
    """The position of a value on a logarithmic scale."""
    span = math.log(high / low) or 1.0

    def position(value: float) -> float:
        return begin + (end - begin) * math.log(value / low) / span

    return position
