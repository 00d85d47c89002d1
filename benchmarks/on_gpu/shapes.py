"""The models that are timed, as overrides of shipped recipes, and one training step of each.

A step is the same as in a run: forward, backward, the gradient's norm and clipping, AdamW on fp32 weights, the end of
step of the balancers. Tokens are random, so routers balance them no better than real ones.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch._dynamo
from torch import Tensor, nn

import core
from core.analysis.size import size_of
from core.assemble import compile_parts, make
from core.contracts.context import SequenceContext
from core.contracts.schedule import Progress
from core.model.language_model import LanguageModel
from core.model.parameters import named_parameters
from core.recipe.compose import Recipe
from core.training.totals import WindowTotals, call_on_step_end
from core.training.window import step_loss

torch._dynamo.config.recompile_limit = (
    64  # a block's code is compiled for every kind of block in every precision
)
LENGTH = ["data.sequence_length=4096", "model.rope.max_length=4096"]
MLA = "{name: mla, heads: 8, kv_rank: 512, nope_dim: 128, rope_dim: 64, value_dim: 128}"
V3_ROUTING = "{name: deepseek_v3, top_k: 6, scale: 2.5}"
TOY = {
    "dsv3_1b": [
        "model.dim=64",
        "model.blocks.moe.count=1",
        "data.tokenizer.vocab=512",
        "model.blocks.moe.ffn.experts=8",
    ],
    "dsv2_lite": ["model.dim=64", "data.tokenizer.vocab=512", "model.blocks.moe.ffn.experts=8"],
}
SMALL = [
    "data.sequence_length=64",
    "model.rope.max_length=64",
    "model.blocks.moe.ffn.expert_hidden=32",
]


@dataclass(frozen=True)
class Shape:
    """A model and its micro-batch.

    Args:
        recipe: a shipped recipe.
        overrides: what is changed in it.
        sequences: how many sequences of 4,096 tokens.
        fp8: whether it is timed in FP8 as well.
    """

    recipe: str
    overrides: list[str] = field(default_factory=list)
    sequences: int = 4
    fp8: bool = False

    def changes(self, *, quick: bool = False) -> list[str]:
        """All overrides of the recipe, except the precision."""
        toy = [*TOY[self.recipe], *SMALL, "batch.sequences=2"] if quick else []
        return [*self.overrides, *LENGTH, f"batch={{sequences: {self.sequences}}}", *toy]

    def compose(self, precision: str = "{name: bf16}", *, quick: bool = False) -> Recipe:
        """The recipe in a precision."""
        return core.compose(self.recipe, [*self.changes(quick=quick), f"precision={precision}"])


SHAPES = {
    "1b_mla": Shape(
        "dsv3_1b", [f"model.attention={MLA}", f"model.blocks.moe.ffn.router={V3_ROUTING}"]
    ),
    "1b": Shape("dsv3_1b", sequences=8),
    "3b_wide": Shape("dsv2_lite", ["model.blocks.moe.count=4"], fp8=True),
}
"""The loss-free paper's billion with DeepSeek-V3's attention and gates, which transformers has too; the same as it is
shipped; and DeepSeek-V2-Lite's widths with as many blocks as fit beside fp32 weights, gradients and moments."""


def random_context(recipe: Recipe, device: str) -> SequenceContext:
    """One micro-batch of random tokens."""
    size = (recipe.batch.sequences, recipe.data.sequence_length + 1)
    tokens_BM = torch.randint(
        recipe.data.tokenizer.vocab, size, generator=torch.Generator().manual_seed(0)
    ).to(device)
    return SequenceContext.of(
        tokens_BM[:, :-1].contiguous(), targets_BL=tokens_BM[:, 1:].contiguous()
    )


def fill(model: nn.Module, device: str) -> None:
    """Moves a model from the meta device to the device: matrices from N(0, 0.006), vectors of 1, buffers of 0.

    The device draws the numbers itself, because a host takes minutes.
    """
    model.to_empty(device=device)
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 1:
            nn.init.ones_(weight)
        else:
            nn.init.normal_(weight, std=0.006)
    for buffer in model.buffers():
        buffer.zero_()


def share(model: nn.Module, owner: nn.Module) -> None:
    """Gives a model on the meta device the parameters and buffers of another one by name; they share the memory."""
    parameters, buffers = dict(owner.named_parameters()), dict(owner.named_buffers())
    for path, module in list(model.named_modules()):
        for name in list(module._parameters):
            module._parameters[name] = parameters[f"{path}.{name}".lstrip(".")]
        for name in list(module._buffers):
            module._buffers[name] = buffers[f"{path}.{name}".lstrip(".")]


@contextmanager
def eagerly(model: nn.Module) -> Iterator[None]:
    """Runs the model without the compiled forms of its parts."""
    kept = {module: module._compiled_call_impl for module in model.modules()}
    for module in kept:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in kept.items():
            module._compiled_call_impl = compiled


def clip(weights: Sequence[Tensor]) -> None:
    """Clips the norm of all gradients to 1, as a training step does."""
    norm = torch.nn.utils.get_total_norm(
        weight.grad for weight in weights if weight.grad is not None
    )
    torch.nn.utils.clip_grads_with_norm_(weights, 1.0, norm)


@dataclass
class Stepper:
    """A model of ours that takes steps on one micro-batch.

    Args:
        model: on the device, in training mode.
        context: the micro-batch.
        flops: FLOPs of its forward and backward, by the convention of docs/describe.md.
        optimizer: the optimizer of the model's weights.
    """

    model: LanguageModel
    context: SequenceContext
    flops: float
    optimizer: torch.optim.Optimizer

    @classmethod
    def of(
        cls, recipe: Recipe, device: str, *, compiled: bool, owner: "Stepper | None" = None
    ) -> "Stepper":
        """A stepper with new weights, or with the weights and the optimizer of another stepper."""
        model, context = core.build(recipe, device="meta"), random_context(recipe, device)
        flops = size_of(model).flops_per_token * context.tokens_BL.numel()
        model = model.train()
        if owner is None:
            fill(model, device)
        else:
            share(model, owner.model)
        if compiled:
            compile_parts(model)
        if owner is not None:
            return cls(model, context, flops, owner.optimizer)
        optimizer = make(recipe.optimizer).make(named_parameters(model))
        for group in optimizer.param_groups:
            group["lr"] = 1e-6
        return cls(model, context, flops, optimizer)

    @property
    def tokens(self) -> int:
        """The number of tokens of the micro-batch."""
        return self.context.tokens_BL.numel()

    def loss(self, totals: WindowTotals | None = None) -> Tensor:
        """The training loss."""
        progress = Progress(step=1, tokens=self.tokens, total_steps=100, total_tokens=0)
        return step_loss(self.model, self.context, progress, totals)

    def gradients(self) -> None:
        """Runs forward and backward, and drops the gradients."""
        self.loss().backward()
        self.optimizer.zero_grad()

    def step(self) -> None:
        """Takes a whole optimizer step."""
        totals = WindowTotals()
        self.loss(totals).backward()
        clip(list(self.model.parameters()))
        self.optimizer.step()
        self.optimizer.zero_grad()
        progress = Progress(step=1, tokens=self.tokens, total_steps=100, total_tokens=0)
        with torch.no_grad():
            call_on_step_end(self.model, totals, progress)
            for state in self.model.step_states().values():
                state.end_step(done=True)
