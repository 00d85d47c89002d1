"""The notice in a summary that says that its run diverged; reading it needs no torch."""

from typing import Any

DIVERGED = "the run diverged: "
"""The beginning of the notice."""


def divergence_in(summary: dict[str, Any]) -> str | None:
    """The notice of a summary that says that its run diverged; None for any other run."""
    notices = summary.get("notices")
    if not isinstance(notices, list):
        return None
    for notice in notices:
        if isinstance(notice, str) and notice.startswith(DIVERGED):
            return notice
    return None
