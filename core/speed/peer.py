"""The peer: the same model in transformers, with the same weights, batch and optimizer.

The weights go through our converter in memory, and transformers loads the files that it finds. One model is measured
with every implementation of experts that transformers offers; its own switch selects them.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from core.contracts.errors import UserError
from core.interop.format_lookup import config_for
from core.interop.run_weights import model_specs
from core.interop.tensors import InMemoryTensors, TensorSpec
from core.interop.to_hf import export_ops
from core.model.language_model import LanguageModel
from core.recipe.compose import Recipe
from core.speed.batches import TokenBatch
from core.speed.our_steps import LEARNING_RATE

MISSING = (
    "transformers is not installed, which training and decoding are compared with: "
    "pip install 'moeloom[hf]', or give --no-peer"
)

FORMATS = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
"""Number formats of the peer's weights by the precision of ours."""

OPTIMIZER_KEYS = ("betas", "eps", "weight_decay")
"""Settings of AdamW that both sides share."""


class NoPeerError(Exception):
    """Raised where transformers cannot do the same work; the message is a sentence."""


@dataclass(frozen=True)
class PeerFolder:
    """The model as transformers reads it.

    Args:
        path: a folder with config.json and model.safetensors.
        dtype: number format of its weights.
        architecture: the class in transformers.
    """

    path: Path
    dtype: torch.dtype
    architecture: str


def version() -> str:
    """The version of transformers.

    Raises:
        UserError: it is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as cause:
        raise UserError(MISSING) from cause
    return str(transformers.__version__)


def experts_implementations() -> list[str]:
    """Every implementation of experts that this transformers offers, its plain loop first."""
    from transformers.integrations import moe

    return ["eager", *moe.ALL_EXPERTS_FUNCTIONS.valid_keys()]


def check_expressible(recipe: Recipe) -> None:
    """Raises `NoPeerError` if transformers has no such model, optimizer or number format."""
    if recipe.precision.name not in FORMATS:
        raise NoPeerError(
            f"precision.name = {recipe.precision.name}: transformers trains in {', '.join(FORMATS)} only"
        )
    settings = vars(recipe.optimizer.config)
    if recipe.optimizer.name != "adamw" or settings.get("moments", "weights") != "weights":
        raise NoPeerError(
            f"optimizer.name = {recipe.optimizer.name}: the peer has torch's AdamW with moments like its weights only"
        )
    try:
        config_for(recipe.to_dict(), recipe.source)
    except UserError as cause:
        raise NoPeerError(str(cause)) from cause


def export(recipe: Recipe, model: LanguageModel, folder: Path) -> PeerFolder:
    """Writes our weights as transformers reads them; matrices in the format in which the peer computes."""
    from safetensors.torch import save_file

    dtype = FORMATS[recipe.precision.name]
    values = recipe.to_dict()
    layout, config = config_for(values, recipe.source)
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    weights = InMemoryTensors(state)
    mappings = list(layout.tensor_mappings(config, values, None))
    written = {}
    for mapping in mappings:
        kept = torch.promote_types(torch.float32, dtype) if mapping.exact else dtype
        written[mapping.theirs] = TensorSpec(kept, mapping.shape)
    target = _Tensors(written)
    for op in export_ops(mappings, model_specs(weights), written):
        op.run(weights, target)
    save_file(target.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    named = {**config, "torch_dtype": str(dtype).removeprefix("torch.")}
    (folder / "config.json").write_text(json.dumps(named), encoding="utf-8")
    return PeerFolder(folder, dtype, config["architectures"][0])


class _Tensors:
    """Tensors in memory, into which an export writes rows."""

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        self._specs = specs
        self.tensors: dict[str, Tensor] = {}
        for name, spec in specs.items():
            self.tensors[name] = torch.empty(spec.shape, dtype=spec.dtype)

    def write(self, name: str, first: int, rows: Tensor) -> None:
        """Writes rows from number `first` on."""
        spec = self._specs[name]
        self.tensors[name].view(spec.rows, spec.width)[first : first + len(rows)] = rows

    def sync(self) -> None:
        """Does nothing: there is no file."""


def load(folder: PeerFolder, device: torch.device, experts: str = "eager") -> Any:
    """The model in transformers, with scaled dot-product attention, which is its default."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder.path,
        dtype=folder.dtype,
        experts_implementation=experts,
        attn_implementation="sdpa",
        local_files_only=True,
    )
    return loaded.to(device)


class PeerSteps:
    """A model in transformers that takes training steps.

    A step is forward, loss, backward, norm and clipping of the gradients by torch, torch's fused AdamW and zero_grad:
    what its own Trainer does, without the rest of that Trainer.

    Args:
        folder: the exported model.
        recipe: its optimizer and its clipping are used.
        batches: the micro-batches of every step.
        device: where.
    """

    def __init__(
        self, folder: PeerFolder, recipe: Recipe, batches: list[TokenBatch], device: torch.device
    ) -> None:
        self.model = load(folder, device).train()
        self.batches = batches
        self.clip_norm = recipe.gradient_clip
        settings = vars(recipe.optimizer.config)
        shared = {key: settings[key] for key in OPTIMIZER_KEYS}
        decay = shared.pop("weight_decay")
        self.weights: list[nn.Parameter] = list(self.model.parameters())
        matrices = [weight for weight in self.weights if weight.ndim > 1]
        vectors = [weight for weight in self.weights if weight.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True, **shared)
        self.optimizers: list[torch.optim.Optimizer] = [self.optimizer]

    def use(self, experts: str) -> None:
        """Selects an implementation of experts."""
        if self.model.config._experts_implementation != experts:
            self.model.set_experts_implementation(experts)

    def run(self) -> None:
        """Takes one optimizer step."""
        for batch in self.batches:
            (self._mean_loss(batch) / len(self.batches)).backward()
        if self.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.weights, self.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def loss(self) -> float:
        """The loss of the step, without taking it."""
        return sum(float(self._mean_loss(batch)) for batch in self.batches) / len(self.batches)

    def _mean_loss(self, batch: TokenBatch) -> Tensor:
        """The mean cross-entropy of a micro-batch, over the same positions as ours."""
        out = self.model(
            batch.tokens_BL,
            labels=batch.tokens_BL,
            shift_labels=batch.targets_BL,
            use_cache=False,
        )
        loss: Tensor = out.loss
        return loss
