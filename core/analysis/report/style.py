"""How variants are told apart: by colour, by dash and by marker at once, so that no one of them is needed."""

import html
import re
from dataclasses import dataclass

COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#AA4499", "#B58900", "#56B4E9", "#7A4B00", "#666666")
"""After Okabe and Ito, without the yellow that white swallows; the first is the baseline's."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "2px,2px,8px,2px")
MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "triangle-down", "star", "hexagon", "pentagon")


@dataclass(frozen=True)
class Style:
    """One variant's look."""

    colour: str
    dash: str
    marker: str

    def faint(self, opacity: float) -> str:
        """The colour, seen through."""
        red, green, blue = (int(self.colour[at : at + 2], 16) for at in (1, 3, 5))
        return f"rgba({red},{green},{blue},{opacity})"


def styles(names: list[str], baseline: str | None) -> dict[str, Style]:
    """A look for each name; the baseline has the first. Lengths without common divisor: no two of 63 look alike."""
    ordered = sorted(names, key=lambda name: name != baseline)
    return {
        name: Style(COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)], MARKERS[i % len(MARKERS)])
        for i, name in enumerate(ordered)
    }


def plain(text: str) -> str:
    """A text that plotly, which reads a little HTML everywhere, draws as it is."""
    return html.escape(text, quote=False)


def brief(text: str, most: int = 36) -> str:
    """A name for a legend: its middle is left out where it is long."""
    half = (most - 1) // 2
    return plain(text if len(text) <= most else f"{text[:half]}…{text[-half:]}")


def broken(text: str, width: int = 18) -> str:
    """A name for an axis, over several lines where it is long."""
    lines = [""]
    for piece in re.findall(rf"[^+_/= ]{{1,{width}}}[+_/= ]?|[+_/= ]", text):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "<br>".join(plain(line) for line in lines)
