"""The looks of variants: they differ in colour, dash and marker at once, so that none of the three is needed."""

import html
import re
from dataclasses import dataclass
from itertools import cycle, islice

BASELINE = "#000000"
COLOURS = (
    "#005B96",
    "#8B1A4F",
    "#E8641B",
    "#1FA187",
    "#6B4300",
    "#00553A",
    "#3A97DB",
    "#B58900",
    "#8A8A8A",
)
"""Colours of all variants but the baseline. After Okabe and Ito, ordered dark, dark, light, light: where the seven
dashes begin again, a dark line meets a light one, so that two of one dash differ on grey paper too."""
ON_DARK = {
    "#000000": "#F4F4F2",
    "#005B96": "#5FB0F0",
    "#8B1A4F": "#F08CBB",
    "#E8641B": "#F5894A",
    "#1FA187": "#45CDB0",
    "#6B4300": "#C79A5B",
    "#00553A": "#5DB98E",
    "#3A97DB": "#A5D2F7",
    "#B58900": "#E3C04A",
    "#8A8A8A": "#B4B4B4",
}
"""What the page's script draws on a dark page in the place of each colour; each has a contrast of 4.5 or more."""
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot", "2px,2px,8px,2px")
MARKERS = (
    "circle",
    "square",
    "triangle-up",
    "diamond",
    "cross",
    "x",
    "triangle-down",
    "star",
    "hexagon",
    "pentagon",
)


@dataclass(frozen=True)
class Style:
    """The look of one variant."""

    colour: str
    dash: str
    marker: str

    def faint(self, opacity: float) -> str:
        """The colour with an opacity, as CSS writes it."""
        red = int(self.colour[1:3], 16)
        green = int(self.colour[3:5], 16)
        blue = int(self.colour[5:7], 16)
        return f"rgba({red},{green},{blue},{opacity})"


def styles(names: list[str], baseline: str | None) -> dict[str, Style]:
    """A look for each name; black is the baseline's alone.

    The numbers of colours, dashes and markers have no common divisor, so no two of 63 names look alike.
    """
    ordered = sorted(names, key=lambda name: name != baseline)
    colours = [BASELINE, *islice(cycle(COLOURS), len(ordered))]
    looks = zip(ordered, colours, cycle(DASHES), cycle(MARKERS), strict=False)
    return {name: Style(*look) for name, *look in looks}


def plain(text: str) -> str:
    """A text with its HTML escaped, so that plotly, which interprets some HTML in texts, draws it as it is."""
    return html.escape(text, quote=False)


def brief(text: str, most: int = 36) -> str:
    """A name for a legend, of at most `most` characters: the middle of a longer one is left out."""
    if len(text) > most:
        half = (most - 1) // 2
        text = f"{text[:half]}…{text[-half:]}"
    return plain(text)


def with_line_breaks(text: str, width: int = 18) -> str:
    """A name for an axis, in several lines if it is longer than `width` characters."""
    lines = [""]
    for piece in re.findall(rf"[^+_/= ]{{1,{width}}}[+_/= ]?|[+_/= ]", text):
        if lines[-1] and len(lines[-1]) + len(piece) > width:
            lines.append("")
        lines[-1] += piece
    return "<br>".join(plain(line) for line in lines)
