"""The same model in transformers: its weights are exported, loaded by `from_pretrained`, and take the same steps."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.on_gpu.compare import calc_diff
from benchmarks.on_gpu.shapes import Stepper, clip
from core.interop.format_lookup import config_for
from core.interop.run_weights import model_specs
from core.interop.tensors import InMemoryTensors, TensorSpec
from core.interop.to_hf import export_ops
from core.model.attend import KERNELS
from core.recipe.compose import Recipe


class _Memory:
    """Tensors in memory into which an export writes rows."""

    def __init__(self, specs: dict[str, TensorSpec]) -> None:
        self.tensors = {
            name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()
        }
        self._specs = specs

    def write(self, name: str, first: int, rows: Tensor) -> None:
        spec = self._specs[name]
        self.tensors[name].view(spec.rows, spec.width)[first : first + len(rows)] = rows

    def sync(self) -> None:
        pass


def export(recipe: Recipe, stepper: Stepper, folder: Path) -> None:
    """Writes config.json and model.safetensors, matrices in bf16, in the layout of `core.convert to-hf`."""
    from safetensors.torch import save_file

    values = recipe.to_dict()
    made, config = config_for(values, recipe.source)
    weights = InMemoryTensors(
        {name: tensor.detach().cpu() for name, tensor in stepper.model.state_dict().items()}
    )
    pieces, specs = list(made.tensor_mappings(config, values, None)), model_specs(weights)
    theirs = {}
    for piece in pieces:
        dtype = torch.float32 if piece.exact else torch.bfloat16
        theirs[piece.theirs] = TensorSpec(dtype, piece.shape)
    memory = _Memory(theirs)
    for op in export_ops(pieces, specs, theirs):
        op.run(weights, memory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(memory.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(
        json.dumps(config | {"torch_dtype": "bfloat16"}), encoding="utf-8"
    )


class Masters:
    """AdamW on fp32 copies of bf16 weights, the usual way to train a model in bf16; our models have fp32 weights too.

    Args:
        weights: bf16 weights; their gradients are read, and the weights are written.
        options: the options of torch's AdamW.
    """

    def __init__(self, weights: list[nn.Parameter], **options: Any) -> None:
        self.weights = weights
        self.masters = [weight.detach().float().requires_grad_() for weight in weights]
        self.optimizer = torch.optim.AdamW(self.masters, **options)

    @torch.no_grad()
    def step(self) -> None:
        """Takes a step on the fp32 copies with clipped gradients (norm 1), writes them back and drops the gradients."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        clip(self.masters)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_(self.weights, self.masters)


class Theirs:
    """The model of transformers in bf16, with moments in bf16: the optimizer needs less memory and work than ours.

    Args:
        folder: what `export` wrote.
        experts: an experts implementation of transformers.
        like: the stepper whose tokens it reads.
    """

    def __init__(self, folder: Path, experts: str, like: Stepper, device: str) -> None:
        from transformers import AutoModelForCausalLM

        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, experts_implementation=experts, attn_implementation="sdpa"
        )
        self.model = found.to(device).train()
        self.tokens_BL, self.targets_BL = like.context.tokens_BL, like.context.targets_BL
        self.weights = list(self.model.parameters())
        self.options: dict[str, Any] = {"lr": 1e-6, "betas": (0.9, 0.95), "fused": device == "cuda"}
        self.optimizer = torch.optim.AdamW(self.weights, **self.options)

    def loss(self) -> Tensor:
        """The loss that transformers computes: the mean over the same positions as ours."""
        out = self.model(
            self.tokens_BL, labels=self.tokens_BL, shift_labels=self.targets_BL, use_cache=False
        )
        loss: Tensor = out.loss
        return loss

    def gradients(self) -> None:
        """Runs forward and backward, and drops the gradients."""
        self.loss().backward()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Takes a whole optimizer step."""
        self.loss().backward()
        clip(self.weights)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @cached_property
    def masters(self) -> Masters:
        """The fp32 copies of the weights, made when they are first used."""
        return Masters(self.weights, **self.options)

    def forget(self) -> None:
        """Frees moments and fp32 copies; the next step begins with new ones."""
        self.optimizer.state.clear()
        vars(self).pop("masters", None)

    def step_with_masters(self) -> None:
        """Takes a whole optimizer step that updates fp32 weights with fp32 moments, as ours does."""
        self.loss().backward()
        self.masters.step()


def implementations() -> list[str]:
    """The names of the implementations of experts in transformers, the plain loop first."""
    from transformers.integrations import moe

    return ["eager", *moe.ALL_EXPERTS_FUNCTIONS.valid_keys()]


@torch.no_grad()
def agreement(ours: Stepper, theirs: Theirs, wide: Recipe) -> dict[str, float]:
    """The calc_diff of the logits of the first sequence: ours to theirs, and both to ours in fp32.

    With random weights many experts of a token are nearly tied, so that rounding chooses. The difference between the
    two models must therefore be compared with the difference that bf16 makes in each of them.

    Args:
        wide: the same recipe in fp32.
    """
    tokens_BL = ours.context.tokens_BL[:1]
    exact = Stepper.of(wide, str(tokens_BL.device), compiled=False, owner=ours).model.logits(
        tokens_BL
    )
    own, other = ours.model.logits(tokens_BL), theirs.model(tokens_BL, use_cache=False).logits
    return {
        "ours_to_theirs": calc_diff(own, other),
        "ours_to_fp32": calc_diff(own, exact),
        "theirs_to_fp32": calc_diff(other, exact),
    }


@contextmanager
def our_kernels() -> Iterator[None]:
    """Makes attention use the kernels that our models prefer, which transformers does not choose by itself."""
    kernels: list[SDPBackend] = KERNELS
    with sdpa_kernel(kernels, set_priority=True):
        yield
