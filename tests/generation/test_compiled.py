"""Text is written by the model as it is, compiled or not."""

from collections.abc import Callable
from typing import Any

import torch
from model import tiny

from core.assemble import compile_parts
from core.generation.sample import sample

DENSE = ("model.blocks.dense.count=1", "model.blocks.moe.count=0")


def test_P60_a_sample_of_a_compiled_model_compiles_nothing() -> None:
    """A compiled block would be compiled anew for every length of its cache."""
    compiled: list[Any] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = tiny.build(*DENSE).eval()
    text = list(sample(model, [1, 2, 3], tokens=6))
    compile_parts(model, backend=backend)
    assert list(sample(model, [1, 2, 3], tokens=6)) == text
    assert compiled == []
    model.logits(torch.tensor([[1, 2, 3]]))
    assert compiled
    done = len(compiled)
    assert list(sample(model, [1, 2, 3], tokens=6)) == text
    assert len(compiled) == done
