"""How variants are told apart: by colour, by dash and by marker at once, so that no one of them is needed."""

import html
import re
from dataclasses import dataclass
from itertools import cycle, islice

BASELINE = "#000000"
COLOURS = ("#005B96", "#8B1A4F", "#E8641B", "#1FA187", "#6B4300", "#00553A", "#3A97DB", "#B58900", "#8A8A8A")
"""Of all but the baseline. After Okabe and Ito, ordered dark, dark, light, light: where the seven dashes begin again, a
dark line meets a light one, so that two of one dash differ on grey paper too."""
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
    """A look for each name; the baseline's is its own. Counts without common divisor: no two of 63 look alike."""
    ordered = sorted(names, key=lambda name: name != baseline)
    colours = [BASELINE, *islice(cycle(COLOURS), len(ordered))]
    looks = zip(ordered, colours, cycle(DASHES), cycle(MARKERS), strict=False)
    return {name: Style(*look) for name, *look in looks}


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
