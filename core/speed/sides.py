"""Both sides in processes of their own: which of the peer's implementations run here, memory, and start."""

from typing import Any

import torch

from core.speed import peer
from core.speed.peer import PeerFolder
from core.speed.processes import PATIENCE, Probed, probe
from core.speed.shapes import Comparable

MODULE = "core.speed.probe"

SLOW = 30.0
"""How many times our first steps' time the peer's processes are given."""

TOO_SLOW = 8.0
"""How many times our first step's time the peer's may take, before no second one is waited for."""


class Sides:
    """Starts processes that measure one side.

    Args:
        measured: the model.
        folder: the model as transformers reads it; None without a peer.
        device: where.
        trust: whether the recipe may name code of its own.
    """

    def __init__(
        self, measured: Comparable, folder: PeerFolder | None, device: torch.device, *, trust: bool
    ) -> None:
        self._folder = folder
        self._request = {
            "recipe": measured.shape.recipe,
            "overrides": list(measured.overrides),
            "trust": trust,
            "device": str(device),
        }

    def ours(self) -> dict[str, Any]:
        """The measurements of our side, or `error`."""
        return self._single(self._run("ours", ["ours"]))

    def theirs(self, experts: str) -> dict[str, Any]:
        """The measurements of the peer with an implementation of experts, or `error`."""
        return self._single(self._run("theirs", [experts]))

    def screened(self, ours: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The measurements of the peer by implementation, in as few processes as come to their end.

        An implementation that takes the process with it has an `error`, and the others go on in another process.

        Args:
            ours: the measurements of our side, which say how long to wait.
        """
        pending = peer.experts_implementations()
        step = ours.get("first_step_seconds", 0.0) + ours.get("step_seconds", 0.0)
        patience = PATIENCE / 5 + SLOW * step
        give_up = 1.0 + TOO_SLOW * ours.get("first_step_seconds", 0.0)
        found: dict[str, dict[str, Any]] = {}
        while pending:
            probed = self._run("theirs", pending, patience, give_up)
            for row in probed.rows:
                found[row["experts"]] = row
            pending = [name for name in pending if name not in found]
            if pending:
                found[pending[0]] = {"error": probed.why or "it printed nothing"}
                pending = pending[1:]
        return found

    def _run(
        self,
        side: str,
        experts: list[str],
        patience: float = PATIENCE,
        give_up: float = PATIENCE,
    ) -> Probed:
        """Runs a process; one whose first step takes longer than `give_up` seconds takes no second one."""
        request = {**self._request, "side": side, "experts": experts, "give_up": give_up}
        if self._folder is not None:
            request["folder"] = str(self._folder.path)
            request["dtype"] = str(self._folder.dtype).removeprefix("torch.")
            request["architecture"] = self._folder.architecture
        return probe(MODULE, request, patience=patience)

    def _single(self, probed: Probed) -> dict[str, Any]:
        return probed.rows[0] if probed.rows else {"error": probed.why}


def memory(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """The peak of memory of both sides, and what of it is neither weights, gradients nor moments.

    Args:
        ours, theirs: the measurements of their processes; None without a peer.
    """
    row: dict[str, Any] = {"memory_ratio": None, "activation_ratio": None, "memory": {}}
    for name, side in (("ours", ours), ("theirs", theirs)):
        if side is None or "error" in side:
            continue
        row["memory"][name] = {
            "peak_bytes": side["peak_bytes"],
            "state_bytes": side["state_bytes"],
            "activation_bytes": side["peak_bytes"] - side["state_bytes"],
        }
    if len(row["memory"]) == 2:
        own = row["memory"]["ours"]
        other = row["memory"]["theirs"]
        row["memory_ratio"] = own["peak_bytes"] / other["peak_bytes"]
        row["activation_ratio"] = own["activation_bytes"] / other["activation_bytes"]
    return row


def start(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Seconds of both sides from the start of Python to the end of the first step."""
    row: dict[str, Any] = {}
    for name, side in (("ours", ours), ("theirs", theirs)):
        if side is None or "error" in side:
            continue
        parts = {key: side[f"{key}_seconds"] for key in ("import", "build", "first_step")}
        row[name] = {**parts, "whole": sum(parts.values())}
    return {"start_seconds": row}
