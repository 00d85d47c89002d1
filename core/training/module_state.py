"""What a training module keeps in a checkpoint beside weights and optimizers, and how it continues from it."""

from typing import TYPE_CHECKING, Any

import torch

from core.contracts.errors import UserError

if TYPE_CHECKING:
    from core.training.module import TrainingModule


def module_state(module: "TrainingModule") -> dict[str, Any]:
    """The module's own state, in plain containers and tensors."""
    paths = {role: list(ways) for role, ways in module.model.kernels_used().ran.items()}
    states = {path: layer.step_state() for path, layer in module.model.step_states().items()}
    own = {
        "windows_done": module.windows_done,
        "skipped_steps": module.skipped_steps,
        "skipped_in_a_row": module.skipped_in_a_row,
        "not_finite_since": module.not_finite_since,
        "seconds": module.seconds,
        "wall_seconds": module.wall_seconds,
        "assigned": module.assigned,
        "dropped": module.dropped,
        "validated": dict(module.validated),
        "validation_pending": module.validation_pending,
        "threads": torch.get_num_threads(),
        "paths": paths,
        "step_states": states,
    }
    if module.spikes is not None:
        own["spikes"] = module.spikes.state()
    return own


def load_module_state(module: "TrainingModule", own: dict[str, Any]) -> None:
    """Continues from the module's own state.

    Raises:
        UserError: on a CPU, another number of threads, with which the bits would differ.
    """
    threads = torch.get_num_threads()
    if module.same_threads and module.device.type == "cpu" and own["threads"] != threads:
        raise UserError(
            f"--resume: the run used {own['threads']} threads and this process has {threads}, "
            f"which would change its bits; set OMP_NUM_THREADS={own['threads']}"
        )
    module.windows_done = own["windows_done"]
    module.skipped_steps = own["skipped_steps"]
    module.skipped_in_a_row = own["skipped_in_a_row"]
    module.not_finite_since = own.get("not_finite_since")
    module.seconds = own["seconds"]
    module.wall_before = own["wall_seconds"]
    module.assigned = own["assigned"]
    module.dropped = own["dropped"]
    module.validated = dict(own["validated"])
    if module.spikes is not None:
        module.spikes.load_state(own["spikes"])
    module.validation_pending = own.get("validation_pending", False)
    if module.validation_pending:
        module.pending_step = module.windows_done
    for role, ways in own.get("paths", {}).items():
        for way in ways:
            module.model.kernels_used().note(role, way)
    for path, layer in module.model.step_states().items():
        layer.load_step_state(own["step_states"][path])
