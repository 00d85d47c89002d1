"""Sets of moments as sorted, disjoint spans of whole nanoseconds: their union, intersection, difference and length.

Times are integers, so that lengths add up exactly.
"""

from collections.abc import Iterable

Span = tuple[int, int]
"""A span of time [start, end) in ns."""

Spans = list[Span]
"""A set of moments: sorted spans that neither overlap nor touch, none of them empty."""


def union(spans: Iterable[Span]) -> Spans:
    """The moments that lie in any of some spans, which may overlap and be empty."""
    merged: Spans = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return merged


def intersection(one: Spans, two: Spans) -> Spans:
    """The moments that lie in both sets."""
    common: Spans = []
    i = 0
    j = 0
    while i < len(one) and j < len(two):
        start = max(one[i][0], two[j][0])
        end = min(one[i][1], two[j][1])
        if start < end:
            common.append((start, end))
        if one[i][1] < two[j][1]:
            i += 1
        else:
            j += 1
    return common


def difference(one: Spans, two: Spans) -> Spans:
    """The moments of the first set that do not lie in the second."""
    rest: Spans = []
    j = 0
    for start, end in one:
        while j < len(two) and two[j][1] <= start:
            j += 1
        k = j
        while k < len(two) and two[k][0] < end:
            if start < two[k][0]:
                rest.append((start, two[k][0]))
            start = max(start, two[k][1])
            k += 1
        if start < end:
            rest.append((start, end))
    return rest


def length(spans: Spans) -> int:
    """The length of a set of moments in ns."""
    return sum(end - start for start, end in spans)
