"""One figure as plotly's own document: traces, a layout, and a sentence on how to read it.

A figure without data is a sentence that says why. Every text that comes from a file goes through `style`, because
plotly interprets some HTML in texts.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

Trace = dict[str, Any]


@dataclass
class Figure:
    """One figure.

    Args:
        key: its id in the page.
        title: its heading.
        note: how to read it.
        traces, layout: plotly's; what `layout` leaves open is the page's.
        height: pixels of the plotting area; of one panel if there are several.
        panels: how many plots share the axes, side by side as far as the page is wide; the traces of the second name
            `x2` and `y2`, and so on.
        smooth: whether the page's slider smooths its lines.
        missing: why there is nothing to draw.
    """

    key: str
    title: str
    note: str = ""
    traces: list[Trace] = field(default_factory=list)
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 330
    panels: int = 1
    smooth: bool = False
    missing: str | None = None

    def document(self) -> dict[str, Any]:
        """The figure as the JSON object that the page's script reads."""
        return asdict(self)
