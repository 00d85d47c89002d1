"""What `make bench` requires: the least and the largest values of ratios that one run measures."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Threshold:
    """A requirement of one ratio.

    Args:
        name: what the ratio is, as the sentence about it says.
        reason: why it is required.
        least, most: the bound; one of the two is None.
    """

    name: str
    reason: str
    least: float | None = None
    most: float | None = None

    def complaint(self, value: float | None) -> str | None:
        """A sentence about a value that is out of bounds or missing; None for one that is not."""
        if value is None:
            return f"{self.name} was not measured ({self.reason})"
        if self.least is not None and value < self.least:
            return f"{self.name} fell to {value:.2f}, below {self.least:.2f} ({self.reason})"
        if self.most is not None and value > self.most:
            return f"{self.name} rose to {value:.2f}, above {self.most:.2f} ({self.reason})"
        return None


TRAIN = Threshold(
    "training at 7 M parameters, ours / the best of transformers",
    "1.22 (1.20 to 1.25) when the bound was set",
    least=1.05,
)
DECODE = Threshold(
    "decoding at 7 M parameters, ours / the best of transformers without compiling",
    "1.42 (1.26 to 1.56) when the bound was set",
    least=1.15,
)
LIMIT = Threshold(
    "training at 7 M parameters, speed as a part of the limit",
    "0.77 (0.76 to 0.80) when the bound was set",
    least=0.65,
)
EXPERTS = Threshold(
    "a step with 256 experts / one with 16 of equal active size",
    "1.4 to 1.6 when the bound was set",
    most=1.8,
)
"""Bounds with a margin for the noise of a machine that does other work; they follow what is measured."""

THRESHOLDS = {"train": TRAIN, "decode": DECODE, "limit": LIMIT, "experts": EXPERTS}


def complaints(measured: dict[str, Any]) -> list[str]:
    """A sentence for each ratio that is out of its bounds.

    Args:
        measured: the ratios by the names of `THRESHOLDS`.
    """
    found = []
    for name, threshold in THRESHOLDS.items():
        complaint = threshold.complaint(measured.get(name))
        if complaint is not None:
            found.append(complaint)
    return found
