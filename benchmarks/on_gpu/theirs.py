"""The same weights in transformers: written from our model's, loaded by `from_pretrained`, stepping as ours does."""

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
from core.interop.formats import config_for
from core.interop.run_weights import own_kinds
from core.interop.tensors import Kind, Loaded
from core.interop.to_hf import moves_out
from core.model.attend import KERNELS
from core.recipe.compose import Recipe


class _Memory:
    """Tensors that rows are written into."""

    def __init__(self, kinds: dict[str, Kind]) -> None:
        self.tensors = {name: torch.empty(kind.shape, dtype=kind.dtype) for name, kind in kinds.items()}
        self._kinds = kinds

    def write(self, name: str, first: int, rows: Tensor) -> None:
        kind = self._kinds[name]
        self.tensors[name].view(kind.rows, kind.width)[first : first + len(rows)] = rows

    def sync(self) -> None:
        pass


def export(recipe: Recipe, stepper: Stepper, folder: Path) -> None:
    """config.json and model.safetensors, matrices in bf16, as `core.convert to-hf` lays them out."""
    from safetensors.torch import save_file

    values = recipe.to_dict()
    made, config = config_for(values, recipe.source)
    weights = Loaded({name: tensor.detach().cpu() for name, tensor in stepper.model.state_dict().items()})
    pieces, kinds = list(made.pieces(config, values, None)), own_kinds(weights)
    theirs = {piece.theirs: Kind(torch.float32 if piece.exact else torch.bfloat16, piece.shape) for piece in pieces}
    memory = _Memory(theirs)
    for move in moves_out(pieces, kinds, theirs):
        move.run(weights, memory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(memory.tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "bfloat16"}), encoding="utf-8")


class Masters:
    """AdamW on fp32 copies of bf16 weights, which is what ours is: the usual way to train a model held in bf16.

    Args:
        weights: in bf16; their gradients are read and they are written.
        options: of torch's AdamW.
    """

    def __init__(self, weights: list[nn.Parameter], **options: Any) -> None:
        self.weights = weights
        self.masters = [weight.detach().float().requires_grad_() for weight in weights]
        self.optimizer = torch.optim.AdamW(self.masters, **options)

    @torch.no_grad()
    def step(self) -> None:
        """Gradients into fp32, their norm clipped to 1, AdamW, weights back into bf16; gradients are dropped."""
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        clip(self.masters)
        self.optimizer.step()
        self.optimizer.zero_grad()
        torch._foreach_copy_(self.weights, self.masters)


class Theirs:
    """transformers' model in bf16, moments too: less memory and less arithmetic for the optimizer than ours has.

    Args:
        folder: from `export`.
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
        """Its own: the mean over the same positions as ours."""
        out = self.model(self.tokens_BL, labels=self.tokens_BL, shift_labels=self.targets_BL, use_cache=False)
        loss: Tensor = out.loss
        return loss

    def gradients(self) -> None:
        """Forward and backward; gradients are dropped."""
        self.loss().backward()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """A whole optimizer step."""
        self.loss().backward()
        clip(self.weights)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @cached_property
    def masters(self) -> Masters:
        """fp32 copies of its weights, made when they are asked for."""
        return Masters(self.weights, **self.options)

    def forget(self) -> None:
        """Give back moments and masters; the next step begins with new ones."""
        self.optimizer.state.clear()
        vars(self).pop("masters", None)

    def step_with_masters(self) -> None:
        """A whole optimizer step that updates what ours updates: fp32 weights with fp32 moments."""
        self.loss().backward()
        self.masters.step()


def implementations() -> list[str]:
    """The names of everything that transformers has for experts, its plain loop first."""
    from transformers.integrations import moe

    return ["eager", *moe.ALL_EXPERTS_FUNCTIONS.valid_keys()]


@torch.no_grad()
def agreement(ours: Stepper, theirs: Theirs, wide: Recipe) -> dict[str, float]:
    """calc_diff of the logits of the first sequence, ours and theirs, and of either to ours in fp32.

    Random weights leave many of a token's experts nearly tied, and rounding chooses: what bf16 does to one of the two
    is what the difference of both must be held against.

    Args:
        wide: the same recipe in fp32.
    """
    tokens_BL = ours.context.tokens_BL[:1]
    exact = Stepper.of(wide, str(tokens_BL.device), compiled=False, owner=ours).model.logits(tokens_BL)
    own, other = ours.model.logits(tokens_BL), theirs.model(tokens_BL, use_cache=False).logits
    return {
        "ours_to_theirs": calc_diff(own, other),
        "ours_to_fp32": calc_diff(own, exact),
        "theirs_to_fp32": calc_diff(other, exact),
    }


@contextmanager
def our_kernels() -> Iterator[None]:
    """Attention by the kernel that we prefer, which transformers left alone does not ask for."""
    kernels: list[SDPBackend] = KERNELS
    with sdpa_kernel(kernels, set_priority=True):
        yield
