"""Both sides in processes of their own: which of the peer's implementations run here, memory, and start."""

from typing import Any

from core.speed.peer import PeerFolder
from core.speed.processes import PATIENCE, Probed, probe
from core.speed.task import COMPILED, OURS, THEIRS, Task

MODULE = "core.speed.probe"

SLOW = 30.0
"""How many times our first run's time a process of the peer is given, beside its patience."""

TOO_SLOW = 8.0
"""How many times our first run's time the peer's may take before it is given no second one."""


class Sides:
    """Starts processes that measure one side.

    Args:
        task: the model, and where.
        folder: the model as transformers reads it; None without a peer.
        work: what each side does: `work` is `train` or `decode`, and `text` says what is continued.

    Attributes:
        request: what a process of either side measures.
    """

    def __init__(self, task: Task, folder: PeerFolder | None, work: dict[str, Any]) -> None:
        self._folder = folder
        self.request = {
            **work,
            "recipe": task.measured.shape.recipe,
            "overrides": list(task.measured.overrides),
            "trust": task.trust,
            "device": str(task.device),
        }

    def ours(self) -> dict[str, Any]:
        """The measurements of our side, or `error`."""
        return self._single(self._run(OURS, [OURS]))

    def theirs(self, variant: str) -> dict[str, Any]:
        """The measurements of one variant of the peer, or `error`."""
        return self._single(self._run(THEIRS, [variant]))

    def screened(self, variants: list[str], ours: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """The measurements of the peer by variant, in as few processes as come to their end.

        A variant that takes the process with it has an `error`, and the others go on in another process.

        Args:
            variants: all that are tried.
            ours: the measurements of our side, which say how long to wait.
        """
        first = ours.get("first_seconds", 0.0)
        patience = PATIENCE + SLOW * first
        give_up = 1.0 + TOO_SLOW * first
        found: dict[str, dict[str, Any]] = {}
        pending = list(variants)
        while pending:
            together = _together(pending)
            probed = self._run(THEIRS, together, patience, give_up)
            for row in probed.rows:
                found[row["variant"]] = row
            missing = [name for name in together if name not in found]
            if missing:
                found[missing[0]] = {"error": probed.why or "it printed nothing"}
            pending = [name for name in pending if name not in found]
        return found

    def _run(
        self,
        side: str,
        variants: list[str],
        patience: float = PATIENCE,
        give_up: float = PATIENCE,
    ) -> Probed:
        """Runs a process; a variant whose first run takes longer than `give_up` seconds is given no second one."""
        request = {**self.request, "side": side, "variants": variants, "give_up": give_up}
        if self._folder is not None:
            request["folder"] = str(self._folder.path)
            request["dtype"] = str(self._folder.dtype).removeprefix("torch.")
            request["architecture"] = self._folder.architecture
        return probe(MODULE, request, patience=patience)

    def _single(self, probed: Probed) -> dict[str, Any]:
        return probed.rows[0] if probed.rows else {"error": probed.why}


def _together(variants: list[str]) -> list[str]:
    """The first variants that one process tries: one that compiles alone, others together."""
    plain = [name for name in variants if not name.endswith(COMPILED)]
    return plain or variants[:1]


def memory(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """The peak of memory of both sides, and what of it is neither weights, gradients nor moments.

    Args:
        ours, theirs: the measurements of their processes; None without a peer.
    """
    row: dict[str, Any] = {"memory_ratio": None, "activation_ratio": None, "memory": {}}
    for name, side in ((OURS, ours), (THEIRS, theirs)):
        if side is None or "error" in side:
            continue
        row["memory"][name] = {
            "variant": side["variant"],
            "peak_bytes": side["peak_bytes"],
            "state_bytes": side["state_bytes"],
            "activation_bytes": side["peak_bytes"] - side["state_bytes"],
        }
    if len(row["memory"]) == 2:
        own = row["memory"][OURS]
        other = row["memory"][THEIRS]
        row["memory_ratio"] = own["peak_bytes"] / other["peak_bytes"]
        row["activation_ratio"] = own["activation_bytes"] / other["activation_bytes"]
    return row


def start(ours: dict[str, Any], theirs: dict[str, Any] | None) -> dict[str, Any]:
    """Seconds of both sides from the start of Python to the end of the first step or call."""
    row: dict[str, Any] = {}
    for name, side in ((OURS, ours), (THEIRS, theirs)):
        if side is None or "error" in side:
            continue
        parts = {key: side[f"{key}_seconds"] for key in ("import", "build", "first")}
        row[name] = {**parts, "whole": sum(parts.values())}
    return {"start_seconds": row}
