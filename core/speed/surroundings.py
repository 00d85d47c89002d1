"""Where a measurement was made: machine, versions, threads."""

import os
from typing import Any

import torch

import core
from core.training.machine import code, machine


def surroundings(device: torch.device, peer_version: str | None) -> dict[str, Any]:
    """What every row says about the machine and the versions.

    Args:
        device: where was measured.
        peer_version: that of transformers; None without a peer.
    """
    here = machine()
    name = here["cpu"]
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    load = None
    if hasattr(os, "getloadavg"):
        load = os.getloadavg()[0]
    return {
        "device": device.type,
        "device_name": name,
        "cores": here["cores"],
        "threads": torch.get_num_threads(),
        "load_average": load,
        "versions": {
            "moeloom": core.__version__,
            "commit": code()["commit"],
            "torch": torch.__version__,
            "transformers": peer_version,
        },
    }
