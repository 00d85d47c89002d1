"""The device that a user names for a trained model."""

import torch

from core.analysis.describe import unmet_requirements
from core.contracts.errors import UserError
from core.recipe.compose import Recipe


def check_device(device: str, recipe: Recipe) -> None:
    """Checks that a model of a recipe can run on a device, before it is loaded.

    Raises:
        UserError: this machine has no such device, or the device cannot run a part of the recipe.
    """
    try:
        torch.device(device)
    except RuntimeError as cause:
        raise UserError(f"--device {device}: is no device; give cpu, cuda or cuda:N") from cause
    if device.startswith("cuda") and torch.cuda.is_available():
        unmet = unmet_requirements(recipe)
        if unmet:
            raise UserError(f"--device {device}: cannot run there: {'; '.join(unmet)}")
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as cause:
        # Torch is built without CUDA, there is no GPU, or it is a device without values.
        why = str(cause).splitlines()[0]
        raise UserError(f"--device {device}: the model cannot go there: {why}") from cause
