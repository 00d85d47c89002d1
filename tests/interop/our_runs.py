"""Run folders of ours whose weights are all drawn at random, without the seconds of a training."""

import shutil
from pathlib import Path

import torch
from lab import Lab

import core
from core.checkpoints.listing import checkpoints_in
from core.checkpoints.reading import read_checkpoint
from core.training.run_folder import RunFolder


@torch.no_grad()
def random_run(lab: Lab, finished: Path, folder: Path, *overrides: str) -> Path:
    """A run folder as training leaves it, with random weights in its checkpoint."""
    recipe, draw = lab.recipe(*overrides), torch.Generator().manual_seed(11)
    model = core.build(recipe)
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        noise = torch.randn(tensor.shape, generator=draw)
        kinds = {
            "norm": 1 + 0.3 * noise,
            ".bias": 0.15 * noise - 1,
            "embedding": 0.5 * noise,
            "centroids": 0.4 * noise,
        }
        plain = noise / tensor.shape[-1] ** 0.5
        tensor.copy_(next((value for kind, value in kinds.items() if kind in f".{name}"), plain))
    run = RunFolder(folder)
    run.create()
    checkpoint = checkpoints_in(finished)[-1]
    content = {
        **read_checkpoint(checkpoint),
        "state_dict": {f"model.{k}": v for k, v in model.state_dict().items()},
    }
    target = folder / "checkpoints" / checkpoint.name
    target.parent.mkdir(exist_ok=True)
    torch.save(content, target)
    shutil.copy(finished / "tokenizer.json", run.tokenizer)
    run.write_recipe(recipe.to_dict())
    return folder
